"""Exchange of values between the ranks (processes) of a parallel run.

It uses AllGather, which every target has, and no files, so that servers need no common file system.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.communication import get_group_size, get_rank

from glm_ms.settings import Settings

# Message sizes are powers of two: some targets compile every new shape.
_SMALLEST_MESSAGE = 64
# Seconds. MindSpore's collectives on CPU time out after 30, less than an evaluation or a checkpoint may take.
_CPU_PATIENCE = "3600"

Item = TypeVar("Item")


class RankError(ValueError):
    """Ranks have different values where they must be equal, or one of them has failed."""


@dataclass(frozen=True)
class Ranks:
    """This process, from 0, among all of a run. All call the methods in the same order; with one they cost nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process shows and writes for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks in their order, on every rank; finite floats arrive to the last digit.

        Raises RankError if another rank has ended.
        """
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = _all_gather(np.array([len(text)], np.int32))
        room = max(_SMALLEST_MESSAGE, 1 << (int(lengths.max()) - 1).bit_length())
        message = np.frombuffer(text.ljust(room), np.int32)
        texts = _all_gather(message).reshape(self.size, -1)
        return [json.loads(texts[i].tobytes()[: lengths[i]]) for i in range(self.size)]

    def from_first(self, value: Any) -> Any:
        """The value of the first rank, on every rank; those of the others are ignored."""
        return self.gather(value if self.first else None)[0]

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Any]) -> Iterator[Any]:
        """Calls `work` for all items, each on one rank; yields its JSON results in order, on every rank.

        The items are the same on all ranks, and may be fewer. The ranks take turns and exchange their results after
        every round: the call for an item is the same as in a single process, for any number of ranks. An error of
        `work` is raised on its rank, and quoted in a RankError on the others.
        """
        for start in range(0, len(items), self.size):
            mine = start + self.rank
            try:
                value = work(items[mine]) if mine < len(items) else None
            except Exception as error:
                self.gather([None, f"{type(error).__name__}: {error}"])
                raise
            found = self.gather([value, None])
            for rank, (_, reason) in enumerate(found):
                if reason is not None:
                    raise RankError(f"rank {rank} has failed: {reason}")
            yield from (value for value, _ in found[: len(items) - start])

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """Checks that all ranks have the same JSON values by name; `what` names them in the error.

        Raises RankError, with the first value in which a rank differs from the first rank.
        """
        values = self.gather(dict(value))
        for rank, other in enumerate(values):
            for name in sorted(set(values[0]) | set(other)):
                ours, theirs = values[0].get(name), other.get(name)
                if ours != theirs:
                    raise RankError(
                        f"{what}: {name} is {ours!r} on rank 0 and {theirs!r} on rank {rank}; give every server the "
                        "same command and the same files"
                    )


def ranks_of(settings: Settings) -> Ranks:
    """The ranks of a run; those of a parallel one must be connected already."""
    return Ranks(get_rank(), get_group_size()) if settings.use_parallel else Ranks()


def check_equal_on_ranks(parameters: Iterable[Parameter], ranks: Ranks) -> None:
    """Checks that replicated parameters are the same on all ranks, bit by bit.

    Data parallel ranks make the same updates; one that differs (faulty memory, an old checkpoint on one server) would
    spoil the run silently. Raises RankError with the first tensor that differs, and the rank.
    """
    if ranks.size == 1:
        return
    sums = {parameter.name: _checksum(parameter) for parameter in parameters}
    for rank, other in enumerate(ranks.gather(sums)):
        different = [name for name in sums if other.get(name) != sums[name]] + sorted(set(other) - set(sums))
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise RankError(
                f"the weights of rank {ranks.rank} are not those of rank {rank}: {different[0]}{more} differ. Nothing "
                "more is saved. Start or resume with the same weights on every server; if they were equal, a card or "
                "its memory is faulty"
            )


def be_patient(settings: Settings) -> None:
    """Makes collectives on CPU wait for a rank that evaluates or saves; call it before the ranks are connected.

    MS_NODE_TIMEOUT in the environment has priority. The scheduler keeps its own value: there it decides how soon a lost
    server is noticed.
    """
    if settings.context.device_target == "CPU" and os.environ.get("MS_ROLE") != "MS_SCHED":
        os.environ.setdefault("MS_NODE_TIMEOUT", _CPU_PATIENCE)


def _all_gather(values: np.ndarray) -> np.ndarray:
    """int32 [N] of every rank -> int32 [ranks * N]."""
    try:
        return ops.AllGather()(Tensor(values, ms.int32)).asnumpy()
    except RuntimeError as error:
        raise RankError(
            "another rank has ended or does not answer; the log of the one that failed first has the reason "
            f"({str(error).strip().splitlines()[0]})"
        ) from None


def _checksum(parameter: Parameter) -> int:
    # bfloat16 has no NumPy type; float32 holds it exactly.
    value = parameter.value().astype(ms.float32).asnumpy()
    return zlib.crc32(np.ascontiguousarray(value).data, zlib.crc32(str(value.shape).encode()))
