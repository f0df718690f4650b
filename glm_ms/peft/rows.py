"""Adapters of rows: LoRA adapters of any rank and P-Tuning prefixes that one network serves side by side.

The rows of a batch may have different adapters, or none (multi-LoRA: Chen et al. 2023, arXiv:2310.18547). Every linear
layer keeps the matrices of all adapters in two tables and gathers those of each row, so adapters come and go without
compiling.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.glm import GLMNetwork
from glm_ms.peft.adapter import AdapterError, StoredAdapter, check_tensors, has_adapter
from glm_ms.peft.lora import A, B, LoraConfig, check_effect, check_modules
from glm_ms.peft.ptuning import PrefixAdapter, PrefixConfig, check_network, keys_and_values
from glm_ms.storage.suggest import did_you_mean

# The number of rows without an adapter. Its matrices are zeros.
NO_ADAPTER = 0


@dataclass(frozen=True)
class AdapterBounds:
    """What a network can serve, fixed when it is compiled.

    Args:
        max_adapters: adapters at the same time; 0: none, and the network is left as it is.
        max_rank: largest rank of a LoRA adapter; matrices of smaller ranks are padded with zeros, which add nothing.
        modules: names of the linear layers that can have an update; None: all.
        max_prefix: most positions of a P-Tuning prefix; 0: no prefixes.
    """

    max_adapters: int = 0
    max_rank: int = 16
    modules: tuple[str, ...] | None = None
    max_prefix: int = 0


class RowUpdate(nn.Cell):
    """B A x of one linear layer, with the A and B of each row's adapter. Its parameters are no weights of the network.

    Attributes:
        a, b: [adapters + 1, r, in] and [adapters + 1, r, out], in the type of the layer. B includes the scale.
    """

    def __init__(self, linear: nn.Cell, bounds: AdapterBounds) -> None:
        super().__init__()
        self.in_features, self.out_features, dtype = linear.in_features, linear.out_features, linear.dtype
        self.nothing = Tensor(0, dtype)

        def table(width: int) -> Parameter:
            zeros = np.zeros((bounds.max_adapters + 1, bounds.max_rank, width), np.float32)
            return Parameter(Tensor(zeros, dtype), requires_grad=False)

        self.a, self.b = table(self.in_features), table(self.out_features)
        self.gather, self.reshape = ops.Gather(), ops.Reshape()
        self.down, self.up = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()

    def construct(self, x: Tensor, numbers: Tensor | None) -> Tensor:
        """x [B, S, in] or [B * S, in], numbers of adapters int32 [B] -> [B, S, out] or [B * S, out].

        None: no row has an adapter, and the result is a scalar 0.
        """
        if numbers is None:
            return self.nothing
        shape = ops.shape(x)
        rows = self.reshape(x, (ops.shape(numbers)[0], -1, self.in_features))
        y = self.up(self.down(rows, self.gather(self.a, numbers, 0)), self.gather(self.b, numbers, 0))
        return self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +


@dataclass(frozen=True)
class RowParts:
    """What an adapter adds to a row.

    Attributes:
        updates: name of a linear layer -> float32 A [r, in] and B times the scale, [r, out].
        prefix: keys and values before those of the tokens, float32 [2 * layers, P, G, D]; None without any.
    """

    updates: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    prefix: np.ndarray | None = None


@dataclass(eq=False)
class RowAdapter:
    """A loaded adapter.

    Attributes:
        name: by which rows ask for it.
        stored: as it was read.
        number: of its matrices in the tables.
        prefix: as in `RowParts`.
        serial: differs from those of all adapters before, also of the same name.
        rows: number of rows that use it now.
        loaded: whether new rows find it.
    """

    name: str
    stored: StoredAdapter
    number: int
    prefix: np.ndarray | None
    serial: int
    rows: int = 0
    loaded: bool = True

    @property
    def gone(self) -> bool:
        """Whether nothing uses it any more."""
        return not self.loaded and not self.rows


class RowAdapters:
    """The adapters that a network serves, by name.

    Args:
        network: its linear layers get a `RowUpdate` each, if `bounds` has adapters. It must have no adapter then.
        bounds: what there is room for.
        prefix_unit: the lengths of prefixes must be multiples of it.

    Raises:
        AdapterError: the network has an adapter, or a module of `bounds` does not exist.
    """

    def __init__(self, network: GLMNetwork, bounds: AdapterBounds, prefix_unit: int = 1) -> None:
        self.network, self.bounds, self.prefix_unit = network, bounds, prefix_unit
        self._loaded: dict[str, RowAdapter] = {}
        self._leaving: list[RowAdapter] = []  # unloaded, but with rows
        self._serials = itertools.count(1)
        self._updates: dict[str, RowUpdate] = {}
        self._free = list(range(NO_ADAPTER + 1, bounds.max_adapters + 1))
        if not bounds.max_adapters:
            return
        if has_adapter(network):
            raise AdapterError("this network has an adapter of its own; load the base alone to serve several adapters")
        linears = network.linears()
        modules = linears if bounds.modules is None else bounds.modules
        for unknown in (name for name in modules if name not in linears):
            raise AdapterError(f"modules: {unknown}: no linear layer of this network{did_you_mean(unknown, linears)}")
        for name in modules:
            self._updates[name] = linears[name].lora = update = RowUpdate(linears[name], bounds)
            for letter, table in (("a", update.a), ("b", update.b)):
                table.name = f"rows.{name}.{letter}"  # MindSpore has named it by its place in the layer

    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._loaded)

    def present(self) -> list[RowAdapter]:
        """All adapters that rows use or may use."""
        return [*self._loaded.values(), *self._leaving]

    def find(self, name: str) -> RowAdapter:
        """The loaded adapter of a name; ValueError without one."""
        if name not in self._loaded:
            raise ValueError(f"adapter {name!r}: not loaded{did_you_mean(name, self._loaded)}")
        return self._loaded[name]

    def load(self, name: str, stored: StoredAdapter) -> RowAdapter:
        """Adds an adapter. Call it in the graph thread.

        Raises:
            AdapterError: it does not fit the network or the bounds, changes nothing, cannot be served beside others,
                the name is taken, or there are as many adapters as there is room for. Nothing has changed then.
        """
        if name in self._loaded:
            raise AdapterError(f"adapter {name!r}: is loaded already, from {self._loaded[name].stored.path}")
        if not self._free:
            wait = f"; {len(self._leaving)} unloaded ones still answer" if self._leaving else ""
            raise AdapterError(
                f"{stored.path}: no room for another adapter: --max-adapters is {self.bounds.max_adapters}{wait}; "
                "unload one, or start with more"
            )
        parts = _parts_of(stored, self.network)
        self._check_bounds(stored, parts)
        number = self._free.pop(0)
        self._write(number, parts)
        self._loaded[name] = adapter = RowAdapter(name, stored, number, parts.prefix, next(self._serials))
        return adapter

    def unload(self, name: str) -> RowAdapter:
        """Removes an adapter, and returns it. Rows that use it keep it to their end, new ones do not find it.

        Raises ValueError without it.
        """
        adapter = self.find(name)
        adapter.loaded = False
        del self._loaded[name]
        self._leaving.append(adapter)
        self._settle(adapter)
        return adapter

    def leave(self, adapter: RowAdapter) -> None:
        """Counts a row out that has been counted in `adapter.rows`."""
        adapter.rows -= 1
        self._settle(adapter)

    def _settle(self, adapter: RowAdapter) -> None:
        """Gives the number of an unloaded adapter to others once its last row has ended."""
        if adapter.gone:
            self._leaving.remove(adapter)
            self._free.append(adapter.number)

    def _check_bounds(self, stored: StoredAdapter, parts: RowParts) -> None:
        outside = [name for name in parts.updates if name not in self._updates]
        if outside:
            served = ", ".join(_families(self._updates)) or "no layer"
            raise AdapterError(
                f"{stored.path}: updates {outside[0]}, and this network serves updates of {served} only; give it when "
                "the server starts, or start with room for more adapters (--max-adapters)"
            )
        rank = max((a.shape[0] for a, _ in parts.updates.values()), default=0)
        if rank > self.bounds.max_rank:
            raise AdapterError(
                f"{stored.path}: has rank {rank}, the largest one here is {self.bounds.max_rank}; start with "
                f"--max-lora-rank {rank}"
            )
        length = 0 if parts.prefix is None else parts.prefix.shape[1]
        if length > self.bounds.max_prefix:
            raise AdapterError(
                f"{stored.path}: a prefix of {length} positions, the longest one here has {self.bounds.max_prefix}; "
                f"start with --max-prefix {length}"
            )
        if length % self.prefix_unit:
            raise AdapterError(
                f"{stored.path}: a prefix of {length} positions; the kernels of this device take multiples of "
                f"{self.prefix_unit} only; set context.use_fused_kernels=False, or train one of such a length"
            )

    def _write(self, number: int, parts: RowParts) -> None:
        """Overwrites one entry of every table, in place: compiled graphs read the same memory."""
        rank, index = self.bounds.max_rank, Tensor(np.array([number], np.int32))
        for name, update in self._updates.items():
            for table, matrix in zip((update.a, update.b), parts.updates.get(name, (None, None))):
                entry = np.zeros((1, rank, table.shape[2]), np.float32)
                if matrix is not None:
                    entry[0, : matrix.shape[0]] = matrix
                ops.ScatterUpdate()(table, index, Tensor(entry, table.dtype))


def bounds_for(
    adapters: Sequence[StoredAdapter],
    max_adapters: int | None = None,
    max_rank: int | None = None,
    max_prefix: int | None = None,
) -> AdapterBounds:
    """Bounds of a server that starts with some adapters.

    Args:
        adapters: those.
        max_adapters, max_rank, max_prefix: as in `AdapterBounds`; None: what the adapters need. With room for more
            adapters than these, all linear layers can have an update, and ranks up to 16.
    """
    count = len(adapters) if max_adapters is None else max_adapters
    more = count > len(adapters)
    ranks = [array.shape[0] for one in adapters for name, array in one.tensors.items() if name.endswith(A)]
    lengths = [one.config.pre_seq_len for one in adapters if isinstance(one.config, PrefixConfig)]
    return AdapterBounds(
        max_adapters=count,
        max_rank=max([*ranks, AdapterBounds.max_rank] if more else ranks, default=1) if max_rank is None else max_rank,
        modules=None if more else tuple(dict.fromkeys(name for one in adapters for name in one.modules)),
        max_prefix=max(lengths, default=0) if max_prefix is None else max_prefix,
    )


def _families(names: Mapping[str, object]) -> list[str]:
    """Names without the numbers of the layers."""
    return list(dict.fromkeys(".".join(part for part in name.split(".") if not part.isdigit()) for name in names))


def _lora_parts(stored: StoredAdapter, network: GLMNetwork) -> RowParts:
    linears, config = network.linears(), cast(LoraConfig, stored.config)
    check_modules(stored, linears)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in stored.modules:
        shapes[f"{name}.{A}"] = (config.rank, linears[name].in_features)
        shapes[f"{name}.{B}"] = (linears[name].out_features, config.rank)
    check_tensors(stored.tensors, shapes, stored.path)
    check_effect(stored)
    largest = np.finfo(np.float16 if network.config.compute_dtype == "float16" else np.float32).max
    updates = {}
    for name in stored.modules:
        with np.errstate(over="ignore"):
            b = stored.tensors[f"{name}.{B}"].T * np.float32(config.scaling)
        if np.abs(b).max() > largest:
            raise AdapterError(f"{stored.path}: {name}.{B} times lora_alpha / r is too large; check lora_alpha")
        updates[name] = stored.tensors[f"{name}.{A}"], np.ascontiguousarray(b)
    return RowParts(updates)


def _prefix_parts(stored: StoredAdapter, network: GLMNetwork) -> RowParts:
    check_network(stored.path, network.config)
    shapes = PrefixAdapter.shapes(cast(PrefixConfig, stored.config), network.config, {})
    check_tensors(stored.tensors, shapes, stored.path)
    return RowParts(prefix=keys_and_values(stored.tensors, network.config))


# Type of adapter -> function that checks one for a network and gives what it adds to a row.
_PARTS: dict[str, Callable[[StoredAdapter, GLMNetwork], RowParts]] = {"lora": _lora_parts, "ptuning2": _prefix_parts}


def _parts_of(stored: StoredAdapter, network: GLMNetwork) -> RowParts:
    kind = stored.config.kind
    if kind not in _PARTS:
        raise AdapterError(
            f"{stored.path}: adapters of type {kind} cannot be served beside others, only {', '.join(_PARTS)}; give it "
            "as the only adapter of its base"
        )
    return _PARTS[kind](stored, network)
