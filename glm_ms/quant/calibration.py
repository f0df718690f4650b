"""What the linear layers of a network are given on real text, for `glm_ms.quant.compensation`.

The weights pass through memory block by block, as in quantization: all rows of text run through a block when the first
of its layers is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from glm_ms.convert.reader import CheckpointReader
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import LINEARS_OF_BLOCK, OUTPUT_LAYER, Cells, GLMBlock
from glm_ms.model.layers import Norm
from glm_ms.ops.portable import AttentionBias, rotary_tables
from glm_ms.quant.checkpoint import EMBEDDING
from glm_ms.quant.compensation import Inputs

_BLOCKS, _FINAL_NORM = "transformer.encoder.layers", "transformer.encoder.final_layernorm"
# Tokens that run through a block, and whose products are added to the moments, together; columns of the moments that
# are computed at a time.
_TOKENS, _COLUMNS = 2048, 1024
_MULTIPLE = 32  # of the length of a batch: few shapes
Row = tuple[np.ndarray, np.ndarray]  # ids and positions of the tokens, int [S] each


class Calibration:
    """Gives the `Inputs` of the linear layers of a checkpoint, in the order of the network.

    At a time memory has one block in float32, all hidden states, and for each layer of the block that has not been
    asked for a matrix float32 [in, in].

    Args:
        reader: a whole checkpoint whose names and shapes have been checked.
        rows: tokens of texts, below `config.seq_length` each.

    Raises CheckpointError, also in `inputs_of`, for a tensor that cannot be read. Runs in PyNative mode on the device
    of the context, in float32.
    """

    def __init__(self, reader: CheckpointReader, config: GLMConfig, rows: Sequence[Row]) -> None:
        self._reader = reader
        self._config = config = dataclasses.replace(
            config, param_init_type="float32", compute_dtype="float32", hidden_dropout=0.0, attention_dropout=0.0
        )
        table = reader.read(EMBEDDING, "float32")
        self._batches = [_Batch.of(part, table) for part in _parts(rows)]
        with no_init_parameters():
            self._block = _Block(config)
            self._norm = Norm(config) if config.post_layer_norm else None
        self._hooks = {name: _Moments() for name in LINEARS_OF_BLOCK}
        for name, hook in self._hooks.items():
            attrgetter(name)(self._block.block).register_forward_pre_hook(hook)
        self._done = 0  # blocks
        self._ready: dict[str, _Moments] = {}

    def inputs_of(self, layer: str) -> Inputs:
        """The inputs of a linear layer, once. Blocks are asked for in their order, the output layer last.

        Raises KeyError for a layer of an earlier block, and for one that is not there.
        """
        while layer not in self._ready:
            if self._done > self._config.num_layers:
                raise KeyError(layer)
            self._ready = {}
            mode = ms.get_context("mode")
            ms.set_context(mode=ms.PYNATIVE_MODE)  # rows of every length without compiling, and hooks
            try:
                self._ready = self._run_block() if self._done < self._config.num_layers else self._run_norm()
            finally:
                ms.set_context(mode=mode)
            self._done += 1
        return Inputs.of(self._ready.pop(layer).take())

    def _run_block(self) -> dict[str, _Moments]:
        prefix = f"{_BLOCKS}.{self._done}."
        _fill(self._block, self._reader, prefix)
        for hook in self._hooks.values():
            hook.clear()
        for batch in self._batches:
            for hook in self._hooks.values():
                hook.real = batch.real
            batch.hidden = self._block(batch.hidden, *batch.places)
        return {prefix + name: hook for name, hook in self._hooks.items()}

    def _run_norm(self) -> dict[str, _Moments]:
        found, norm = _Moments(), self._norm
        if norm is not None:
            _fill(norm, self._reader, f"{_FINAL_NORM}.")
        for batch in self._batches:
            found.real = batch.real
            found(None, (batch.hidden if norm is None else norm(batch.hidden),))
        return {OUTPUT_LAYER: found}


class _Block(nn.Cell):
    """One block of a network over rows of hidden states; its parameters have their names inside the block."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(auto_prefix=False)
        self.block = GLMBlock(config, 0, Cells())
        self.attention_bias = AttentionBias()
        cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
        self.cos, self.sin, self.expand = Tensor(cos, ms.float32), Tensor(sin, ms.float32), ops.ExpandDims()

    def construct(self, x: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, H], positions and mask int32 [B, S], slots int32 [S] -> [B, S, H]."""
        cos, sin = self.expand(self.cos[positions], 2), self.expand(self.sin[positions], 2)
        return self.block(x, cos, sin, self.attention_bias(slots, slots, mask, mask))


@dataclass
class _Batch:
    """Rows of text side by side.

    Attributes:
        hidden: states before the next block, float32 [B, S, H].
        places: positions int32 [B, S], slots int32 [S], mask int32 [B, S].
        real: what is not padding, bool [B * S].
    """

    hidden: Tensor
    places: tuple[Tensor, Tensor, Tensor]
    real: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row], table: np.ndarray) -> _Batch:
        """Padded at the end to a multiple of `_MULTIPLE`; `table` is that of the embedding."""
        longest = max(len(ids) for ids, _ in rows)
        ids, positions, mask = np.zeros((3, len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), np.int32)
        for place, row in enumerate(rows):
            length = len(row[0])
            ids[place, :length], positions[place, :length] = row
            mask[place, :length] = 1
        slots = np.arange(ids.shape[1], dtype=np.int32)
        return cls(Tensor(table[ids]), (Tensor(positions), Tensor(slots), Tensor(mask)), mask.reshape(-1) == 1)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of similar lengths, about `_TOKENS` tokens with the padding in each part."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if part and (len(part) + 1) * (len(row[0]) + _MULTIPLE) > _TOKENS:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


class _Moments:
    """A hook that adds up x^T x of the inputs x of a layer: the lower triangle, float32 [in, in].

    Attributes:
        real: the tokens of the next inputs that count, bool [B * S].
    """

    real: np.ndarray

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._sum: np.ndarray | None = None
        self._waiting: list[np.ndarray] = []
        self._tokens = 0

    def __call__(self, cell: nn.Cell | None, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].asnumpy()
        self._waiting.append(x.reshape(-1, x.shape[-1])[self.real])
        if sum(map(len, self._waiting)) >= _TOKENS:
            self._add()

    def take(self) -> np.ndarray:
        """The mean over all tokens; it begins anew. Raises ValueError without a token."""
        self._add()
        if self._sum is None:
            raise ValueError("no tokens: the rows of text are empty")
        taken = self._sum
        taken /= np.float32(self._tokens)
        self.clear()
        return taken

    def _add(self) -> None:
        if not self._waiting:
            return
        x, self._waiting = np.concatenate(self._waiting), []
        if self._sum is None:
            self._sum = np.zeros((x.shape[1], x.shape[1]), np.float32)
        for start in range(0, x.shape[1], _COLUMNS):
            self._sum[start:, start : start + _COLUMNS] += x[:, start:].T @ x[:, start : start + _COLUMNS]
        self._tokens += len(x)


def _fill(cell: nn.Cell, reader: CheckpointReader, prefix: str) -> None:
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(reader.read(f"{prefix}{parameter.name}", "float32")))
