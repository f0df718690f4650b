"""Proposals of prompt lookup: what followed the last tokens before, and when nothing is proposed."""

from __future__ import annotations

from glm_ms.generation.lookup import Lookup

CHEAP = 0.02


def test_proposes_what_followed_the_last_tokens():
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3], most=3, limit=50)
    assert lookup.propose(CHEAP) == [4, 5, 6]
    lookup.append(4)
    assert lookup.propose(CHEAP) == [5, 6, 7]
    lookup.append(9)
    assert lookup.propose(CHEAP) == [], "4, 9 is new"


def test_one_common_token_is_not_enough():
    assert Lookup([1, 2, 3, 4, 5, 1], most=3, limit=50).propose(CHEAP) == []


def test_the_longest_match_counts_and_of_equal_ones_the_last():
    ids = [1, 2, 3, 10, 9, 2, 3, 11, 9, 2, 3, 12, 5, 1, 2, 3]
    assert Lookup(ids, most=1, limit=50).propose(CHEAP) == [10], "1, 2, 3 and not only 2, 3"
    assert Lookup([*ids, 7, 2, 3], most=1, limit=50).propose(CHEAP) == [7], "the last 2, 3 was followed by 7"


def test_a_text_that_repeats_itself_is_proposed_beyond_its_end():
    assert Lookup([7, 1, 2, 3, 1, 2, 3, 1, 2], most=7, limit=50).propose(CHEAP) == [3, 1, 2, 3, 1, 2, 3]


def test_the_last_token_of_a_sequence_is_not_proposed():
    ids = [1, 2, 3, 4, 5, 6, 1, 2]
    for limit, count in ((8, 0), (9, 0), (10, 1), (11, 2), (50, 4)):
        assert len(Lookup(ids, most=4, limit=limit).propose(CHEAP)) == count


def test_a_high_price_shortens_proposals_and_ends_them():
    ids = [*range(20), *range(8)]
    counts = [len(Lookup(ids, most=10, limit=100).propose(price)) for price in (0.02, 0.2, 0.5, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 10
    assert counts[-1] == 1, "a trial"


def refuse(lookup: Lookup, times: int, price: float) -> list[int]:
    """Appends tokens of a cycle, and refuses every proposal; returns at which of them there were proposals."""
    found = []
    for number in range(times):
        if lookup.propose(price):
            lookup.learn(0, refused=True)
            found.append(number)
        lookup.append(number % 5)
    return found


def test_a_sequence_whose_proposals_fail_pauses_longer_and_longer():
    lookup = Lookup([0, 1, 2, 3, 4] * 3, most=5, limit=10_000)
    found = refuse(lookup, 1000, price=0.3)
    gaps = [after - before for before, after in zip(found, found[1:])]
    assert gaps[-1] == 128
    assert len(found) < 25


def test_a_success_ends_the_pause():
    lookup = Lookup([0, 1, 2, 3, 4] * 3, most=5, limit=10_000)
    refuse(lookup, 300, price=0.3)
    lengths = []
    for number in range(300, 600):
        draft = lookup.propose(0.3)
        if draft:
            assert draft == [(number + place) % 5 for place in range(len(draft))]
            lookup.learn(len(draft), refused=False)
            lengths.append(len(draft))
        lookup.append(number % 5)
    assert lengths[0] == 1
    assert lengths[-1] == 5
