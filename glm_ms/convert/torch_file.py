"""PyTorch files (`.bin`, `.pth`, `.pt`), read one shard at a time; needs torch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.convert.tensor_file import TensorFile, TensorInfo, describe_content
from glm_ms.storage.errors import CheckpointError, capped

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


class TorchFile(TensorFile):
    """Reads a state dict that `torch.save` wrote. Files are mapped, so unread tensors cost no memory.

    Raises CheckpointError if torch is not installed, or the file is broken or has anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._state: dict[str, Any] | None = None
        state = self._load()
        foreign = [repr(key) for key, value in state.items() if not hasattr(value, "dtype")]
        if foreign:
            raise CheckpointError(f"{path}: entries that are not tensors: {capped(foreign)}")
        self.entries = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).replace("torch.", ""))
            for name, tensor in state.items()
        }
        self.release()

    def read(self, name: str) -> np.ndarray:
        import torch

        if self._state is None:
            self._state = self._load()
        tensor = self._state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16).copy()
        return tensor.numpy().copy()

    def release(self) -> None:
        self._state = None

    def _load(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            head = file.read(64)
        if not head.startswith((_ZIP, _PICKLE)):
            raise CheckpointError(f"{self.path}: not a PyTorch file: it is {describe_content(head)}")
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f'{self.path}: reading PyTorch files needs torch: pip install "glm_ms[torch]", '
                "or convert the checkpoint to safetensors"
            ) from None
        try:
            # Only ZIP files can be mapped; the format before torch 1.6 is read at once.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=head.startswith(_ZIP) or None)
        except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{self.path}: broken or truncated PyTorch file, fetch it again ({reason})"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path}: expected a dict of tensors, found {type(state).__name__}")
        return state
