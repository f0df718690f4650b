"""The error of this package."""

from __future__ import annotations

from glm_ms.storage.errors import CheckpointError


class AdapterError(CheckpointError):
    """An adapter cannot be built, read, or does not belong to its network; the message names file and remedy."""
