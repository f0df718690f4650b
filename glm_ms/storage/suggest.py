"""Near misses for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def misspelled(word: object, candidates: Iterable[str], cutoff: float = 0.8) -> list[str]:
    """At most two candidates that are spelled nearly like `word`, nearest first; ignores case.

    `cutoff` is the similarity from 0 to 1 that counts as near, see `difflib.get_close_matches`.
    """
    spelled = {item.lower(): item for item in candidates}
    near = difflib.get_close_matches(str(word).lower(), list(spelled), n=2, cutoff=cutoff)
    return [spelled[item] for item in near]


def nearest(word: object, candidates: Iterable[str]) -> list[str]:
    """At most two candidates spelled like `word`; else those that begin with it, or that it begins with."""
    candidates, key = list(candidates), str(word).lower()
    near = misspelled(key, candidates, cutoff=0.7)
    if not near and len(key) >= 3:
        longer = [item for item in candidates if len(item) >= 3]
        near = [item for item in longer if item.lower().startswith(key) or key.startswith(item.lower())]
    return near[:2]


def did_you_mean(word: object, candidates: Iterable[str], otherwise: str = "") -> str:
    """End of an error message: "; did you mean a or b?", or `otherwise` if no candidate is near."""
    near = nearest(word, candidates)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
