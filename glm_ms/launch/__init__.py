"""Starting a run on many cards: rank tables of Ascend servers, and the start of one process a card.

Nothing here needs MindSpore: rank tables are also made where it is not installed.
"""
