"""PyTorch files (`.bin`, `.pth`, `.pt`), read one shard at a time; needs torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glm_ms.convert.tensor_file import TensorFile, TensorInfo, describe_content
from glm_ms.storage.errors import CheckpointError, capped

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_READ_CHUNK = 1 << 20
_ZIP_END, _ZIP_END_SIZE = b"PK\x05\x06", 22  # the last record of a ZIP file, without its comment


class TorchFile(TensorFile):
    """Reads a state dict that `torch.save` wrote. Files are mapped, so unread tensors cost no memory.

    Raises CheckpointError if torch is not installed, or the file is broken or has anything but dense tensors under
    names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._state: dict[str, Any] | None = None
        state = self._load()
        foreign = [repr(key) for key, value in state.items() if not hasattr(value, "dtype")]
        if foreign:
            raise CheckpointError(
                f"{path}: entries that are not tensors: {capped(foreign)}; save the state dict alone: "
                "torch.save(model.state_dict(), PATH)"
            )
        unnamed = [repr(key) for key in state if not isinstance(key, str)]
        if unnamed:
            raise CheckpointError(f"{path}: keys that are not names of parameters: {capped(unnamed)}")
        empty = [name for name, tensor in state.items() if not _is_dense(tensor)]
        if empty:
            raise CheckpointError(
                f"{path}: tensors without values of their own (sparse, nested, quantized or of the device meta): "
                f"{capped(empty)}; save dense tensors: tensor.to_dense(), or load the weights before saving them"
            )
        self.entries = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).replace("torch.", ""))
            for name, tensor in state.items()
        }
        self.release()

    def read(self, name: str) -> np.ndarray:
        import torch

        if self._state is None:
            self._state = self._load()
        self.readable(name)
        tensor = self._state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16).copy()
        return tensor.numpy().copy()

    def verify(self) -> None:
        """torch does not compare the CRC-32 of the tensors in its ZIP files."""
        with self.path.open("rb") as file:
            if not file.read(len(_ZIP)).startswith(_ZIP):
                return
        try:
            with zipfile.ZipFile(self.path) as archive:
                damaged = [item.filename for item in archive.infolist() if not _crc_fits(archive, item)]
                count = len(archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{self.path}: broken or truncated PyTorch file, fetch it again ({error})") from None
        # torch.serialization.set_crc32_options(False) writes none that fits.
        if damaged and len(damaged) < count:
            raise CheckpointError(
                f"{self.path}: damaged: the CRC-32 of {capped(damaged)} does not match; fetch it again"
            )

    def release(self) -> None:
        self._state = None

    def _load(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            head = file.read(64)
            surplus = _bytes_after_zip(file) if head.startswith(_ZIP) else 0
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
            if head.startswith(_ZIP):
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            else:  # the format before torch 1.6 cannot be mapped
                with self.path.open("rb") as file:
                    state = torch.load(file, map_location="cpu", weights_only=True)
                    surplus = len(file.read())
        except Exception as error:  # a damaged pickle can raise anything
            # Other text of torch advises to load the file in an unsafe way.
            text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
            if text.startswith("Unsupported global"):
                raise CheckpointError(
                    f"{self.path}: contains something besides tensors, which is not loaded; save the state dict alone: "
                    "torch.save(model.state_dict(), PATH), or fetch the file again if it is damaged"
                ) from None
            raise CheckpointError(
                f"{self.path}: broken or truncated PyTorch file, fetch it again ({text.splitlines()[0]})"
            ) from error
        if surplus:
            raise CheckpointError(
                f"{self.path}: damaged: {surplus} bytes follow the end of the PyTorch file; fetch it again"
            )
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path}: expected a dict of tensors, found {type(state).__name__}")
        return state


def _bytes_after_zip(file: BinaryIO) -> int:
    """Bytes behind the last record of a ZIP file, which ends with its comment; 0 if that record is not found."""
    size = file.seek(0, 2)
    begin = file.seek(max(size - _ZIP_END_SIZE - 0xFFFF, 0))
    tail = file.read()
    place = tail.rfind(_ZIP_END)
    if place < 0 or len(tail) - place < _ZIP_END_SIZE:
        return 0
    comment = int.from_bytes(tail[place + _ZIP_END_SIZE - 2 : place + _ZIP_END_SIZE], "little")
    return max(size - (begin + place + _ZIP_END_SIZE + comment), 0)


def _is_dense(tensor: Any) -> bool:
    import torch

    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _crc_fits(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> bool:
    """Reads one entry of an archive in pieces."""
    try:
        with archive.open(item) as file:
            while file.read(_READ_CHUNK):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True
