"""How much each input of a linear layer counts: the mean of its squares on real text.

The weights pass through memory block by block, as in quantization: all rows of text run through a block before its
weights are replaced by those of the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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

_BLOCKS, _FINAL_NORM = "transformer.encoder.layers", "transformer.encoder.final_layernorm"
Row = tuple[np.ndarray, np.ndarray]  # ids and positions of the tokens, int [S] each


def importance_of(
    reader: CheckpointReader,
    config: GLMConfig,
    rows: Sequence[Row],
    on_block: Callable[[int], None] = lambda index: None,
) -> dict[str, np.ndarray]:
    """Name of every linear layer -> mean square of each of its inputs over all tokens, float32 [in].

    Args:
        reader: a whole checkpoint whose names and shapes have been checked.
        rows: tokens of texts, below `config.seq_length` each.
        on_block: called with the index of each block that is done.

    Raises CheckpointError for a tensor that cannot be read. Runs in PyNative mode on the device of the context, in
    float32.
    """
    config = dataclasses.replace(
        config, param_init_type="float32", compute_dtype="float32", hidden_dropout=0.0, attention_dropout=0.0
    )
    table = reader.read(EMBEDDING, "float32")
    hidden = [Tensor(table[ids][None]) for ids, _ in rows]
    del table
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)  # rows of every length without compiling, and hooks
    try:
        return _collected(reader, config, rows, hidden, on_block)
    finally:
        ms.set_context(mode=mode)


def _collected(
    reader: CheckpointReader, config: GLMConfig, rows: Sequence[Row], hidden: list[Tensor],
    on_block: Callable[[int], None]
) -> dict[str, np.ndarray]:  # fmt: skip
    tokens, found = sum(len(ids) for ids, _ in rows), dict[str, np.ndarray]()
    with no_init_parameters():
        block = _Block(config)
        norm = Norm(config) if config.post_layer_norm else None
    sums = {name: _SumOfSquares() for name in LINEARS_OF_BLOCK}
    for name, total in sums.items():
        attrgetter(name)(block.block).register_forward_pre_hook(total)
    for index in range(config.num_layers):
        _fill(block, reader, f"{_BLOCKS}.{index}.")
        for place, (_, positions) in enumerate(rows):
            hidden[place] = block(hidden[place], *_places(positions))
        for name, total in sums.items():
            found[f"{_BLOCKS}.{index}.{name}"] = total.take() / np.float32(tokens)
        on_block(index)
    last = _SumOfSquares()
    if norm is not None:
        _fill(norm, reader, f"{_FINAL_NORM}.")
    for x in hidden:
        last(None, (x if norm is None else norm(x),))
    return {**found, OUTPUT_LAYER: last.take() / np.float32(tokens)}


class _Block(nn.Cell):
    """One block of a network over rows of hidden states; its parameters have their names inside the block."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(auto_prefix=False)
        self.block = GLMBlock(config, 0, Cells())
        self.attention_bias = AttentionBias()
        cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
        self.cos, self.sin, self.expand = Tensor(cos, ms.float32), Tensor(sin, ms.float32), ops.ExpandDims()

    def construct(self, x: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """x [1, S, H], positions and mask int32 [1, S], slots int32 [S] -> [1, S, H]."""
        cos, sin = self.expand(self.cos[positions], 2), self.expand(self.sin[positions], 2)
        return self.block(x, cos, sin, self.attention_bias(slots, slots, mask, mask))


class _SumOfSquares:
    """A hook that adds up the squares of each input of a layer, in float64."""

    def __init__(self) -> None:
        self._sum: np.ndarray | float = 0.0

    def __call__(self, cell: nn.Cell | None, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].asnumpy()
        self._sum = self._sum + np.square(x.reshape(-1, x.shape[-1])).sum(0, dtype=np.float64)

    def take(self) -> np.ndarray:
        """The sums so far, float32; they begin anew."""
        taken, self._sum = np.asarray(self._sum, np.float32), 0.0
        return taken


def _fill(cell: nn.Cell, reader: CheckpointReader, prefix: str) -> None:
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(reader.read(f"{prefix}{parameter.name}", "float32")))


def _places(positions: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, slots and mask of a row without padding."""
    length = len(positions)
    positions = np.ascontiguousarray(positions, np.int32)[None]
    return Tensor(positions), Tensor(np.arange(length, dtype=np.int32)), Tensor(np.ones((1, length), np.int32))
