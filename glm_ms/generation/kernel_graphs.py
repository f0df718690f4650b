"""`KernelGraphs`: runs over pages by the C++ kernels of the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor, nn

from glm_ms.generation.graphs import GRAPHS, FixedGraph
from glm_ms.generation.page_graphs import CHUNK, PageGraphs
from glm_ms.generation.pages import PAGE, RESERVED
from glm_ms.model.glm import MLP, GLMBlock, GLMEncoder, GLMNetwork, GLMTransformer, SelfAttention
from glm_ms.model.kernels import KernelGLM
from glm_ms.model.layers import Embedding, Linear, Norm
from glm_ms.ops.cpu import library
from glm_ms.ops.cpu.rows import COUNT, POSITION, TOKEN, PageMemory, RunTable, Span, run_table
from glm_ms.ops.registry import device
from glm_ms.peft.lora import LowRankUpdate
from glm_ms.peft.ptuning import PrefixEncoder, keys_and_values
from glm_ms.peft.rows import AdapterBounds, RowAdapters, RowUpdate
from glm_ms.quant.linear import QuantizedLinear

if TYPE_CHECKING:
    from glm_ms.generation.paged import PagedDecoder

# Most tokens of a run: enough for the products to run at the speed of arithmetic.
ROWS = 128
# The classes that kernels compute. Not their subclasses, which may compute something else.
COVERED = (
    GLMNetwork, GLMTransformer, GLMEncoder, GLMBlock, SelfAttention, MLP, Embedding, Norm, Linear, QuantizedLinear,
    LowRankUpdate, RowUpdate, PrefixEncoder,
)  # fmt: skip


def why_portable(network: GLMNetwork) -> str | None:
    """Why a network runs its portable cells and not the kernels of the CPU; None if the kernels cover it."""
    if device() != "CPU":
        return f"the device is {device()}"
    if library.load() is None:
        return library.reason()
    for cell in _replaced_cells(network):
        if type(cell) not in COVERED:
            return f"the network has a cell of the class {type(cell).__name__}, which no kernel computes"
    return None


def _replaced_cells(network: GLMNetwork) -> Iterator[nn.Cell]:
    """The cells that kernels run in place of."""
    net = network.transformer
    yield from (network, net, net.embedding, net.encoder)
    for block in net.encoder.layers:
        yield from (block, block.input_layernorm, block.self_attention, block.post_attention_layernorm, block.mlp)
    for cell in (net.encoder.final_layernorm, net.prefix_encoder):
        if cell is not None:
            yield cell
    for linear in network.linears().values():
        yield linear
        if linear.lora is not None:
            yield linear.lora


class KernelGraphs(PageGraphs):
    """One graph for prompts and steps of every size.

    A row has the same bits in every run. Nothing is computed or written for rows that are not there.

    Args:
        graph: of the `KernelGLM` of the network, if others have made one; with adapters in `bounds` each has its own.
        largest_chunk: see `PageGraphs`.
        storage: type of keys and values, a key of `glm_ms.ops.cpu.storage.STORAGE`.
    """

    exact_rows = True

    def __init__(
        self, network: GLMNetwork, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None,
        *, graph: FixedGraph | None = None, largest_chunk: int = ROWS, storage: str = "float32"
    ) -> None:  # fmt: skip
        super().__init__(network, slots, capacity, chunk, bounds)
        self.largest_chunk, self.found_in = max(chunk, largest_chunk), PAGE
        self.network, self.storage = network, storage
        self.adapters = RowAdapters(network, self.bounds)
        self.graph = FixedGraph(KernelGLM(network, ROWS)) if graph is None or self.bounds.max_adapters else graph
        self._memory: PageMemory

    def compile(self, decoder: PagedDecoder) -> None:
        decoder.serve()
        self._run([])

    def serve(self, decoder: PagedDecoder) -> PageMemory:
        config = self.network.config
        memory = decoder.memory
        if memory is None:
            sizes = config.num_layers, RESERVED + self.pages, config.num_kv_heads, config.kv_channels
            memory = self._memory = PageMemory(self.storage, *sizes)
            self._write_prefix()
        self._memory = memory
        return memory

    def release(self) -> None:
        """Nothing: a decoder takes its memory with it."""

    def _write_prefix(self) -> None:
        encoder = self.network.transformer.prefix_encoder
        if encoder is None:
            return
        tensors = {parameter.name: parameter.asnumpy() for parameter in encoder.get_parameters()}
        parts = keys_and_values(tensors, self.network.config)
        content = np.zeros((len(parts), self.prefix_pages * PAGE, *parts.shape[2:]), np.float32)
        content[:, self.first :] = parts
        for number in range(self.prefix_pages):
            page = content[:, number * PAGE : (number + 1) * PAGE]
            self.write(RESERVED + number, page[::2], page[1::2])

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._memory.copy(source, target)

    def write(self, page: int, keys: np.ndarray, values: np.ndarray) -> None:
        self._memory.write(page, keys, values)

    def read(self, span: Span) -> tuple[np.ndarray, bool]:
        logits, finite = self.extend([span])
        return logits, finite[0]

    def step(self, places: Sequence[int], spans: Sequence[Span]) -> tuple[np.ndarray, Sequence[bool]]:
        return self.extend(spans)

    def extend(self, spans: Sequence[Span]) -> tuple[np.ndarray, Sequence[bool]]:
        logits: list[np.ndarray] = []
        finite: list[bool] = []
        for some in _runs(spans):
            run = self._run([span for _, span in some])
            logits.append(run.logits)
            row = 0
            for number, span in some:
                sound = bool(run.finite[row : row + len(span.ids)].all())
                row += len(span.ids)
                if number < len(finite):
                    finite[number] &= sound
                else:
                    finite.append(sound)
        return logits[0] if len(logits) == 1 else np.concatenate(logits), finite

    def _run(self, spans: Sequence[Span]) -> RunTable:
        run = run_table(spans, self._memory, ROWS, self.vocab_size)
        config, rows = self.network.config, run.table[1 : int(run.table[0, COUNT]) + 1]
        # The kernels read memory at these places.
        for token in _outside(rows[:, TOKEN], config.padded_vocab_size):
            raise ValueError(f"token {token}: the vocabulary has ids 0 to {config.padded_vocab_size - 1}")
        for position in _outside(rows[:, POSITION], config.seq_length):
            raise ValueError(
                f"position {position}: the network has positions 0 to {config.seq_length - 1} (config.seq_length)"
            )
        # The run has ended when its result is here.
        GRAPHS.run(lambda: self.graph(Tensor(run.table)).asnumpy())
        return run


def _outside(values: np.ndarray, count: int) -> np.ndarray:
    """Those values that are not in [0, count)."""
    return values[(values < 0) | (values >= count)]


def _runs(spans: Sequence[Span]) -> Iterator[list[tuple[int, Span]]]:
    """Spans with their numbers, in groups of at most ROWS tokens; a longer span is divided."""
    group: list[tuple[int, Span]] = []
    room = ROWS
    for number, span in enumerate(spans):
        for part in _parts(span):
            if len(part.ids) > room:
                yield group
                group, room = [], ROWS
            group.append((number, part))
            room -= len(part.ids)
    if group:
        yield group


def _parts(span: Span) -> Iterator[Span]:
    count = len(span.ids)
    for start in range(0, count, ROWS):
        end = min(start + ROWS, count)
        wanted = max(0, min(end, count) - max(start, count - span.logits))
        ids, positions = span.ids[start:end], span.positions[start:end]
        yield replace(span, ids=ids, positions=positions, index=span.index + start, logits=wanted)
