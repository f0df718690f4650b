"""Networks whose weights are split over cards: their cells, the strategies of their operators, the slices of their
parameters.

`config` and `partition` need no MindSpore.
"""
