"""The error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """A data file or a setting for it cannot be used; the message names the place and the remedy."""
