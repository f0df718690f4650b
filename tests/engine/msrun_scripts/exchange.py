"""Run by msrun: every method of Ranks between two processes, and a weight that differs on one of them."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor
from mindspore.communication import get_group_size, get_rank, init

from glm_ms.engine.ranks import RankError, Ranks, check_equal_on_ranks

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
init()
ranks = Ranks(get_rank(), get_group_size())
assert ranks.size == 2

values = [{"裙": 0.1 + 0.2, "long": "x" * 5000}, None]  # lengths of all kinds
assert ranks.gather(values[ranks.rank]) == values
assert ranks.from_first(f"of rank {ranks.rank}") == "of rank 0"

done: list[int] = []


def work(item: int) -> list[int]:
    done.append(item)
    return [item, ranks.rank]


for number in (0, 1, 4, 5):
    done.clear()
    assert list(ranks.share_out(range(number), work)) == [[i, i % 2] for i in range(number)]
    assert done == list(range(ranks.rank, number, 2))


def error_of(action, *arguments: object) -> Exception:
    try:
        action(*arguments)
    except Exception as error:
        return error
    raise AssertionError("no error")


def fail_on_three(item: int) -> int:
    if item == 3:
        raise KeyError("the fourth")
    return item


error = error_of(lambda: list(ranks.share_out(range(6), fail_on_three)))
assert isinstance(error, RankError if ranks.first else KeyError), repr(error)
assert "the fourth" in str(error)
assert not ranks.first or "rank 1 has failed: KeyError" in str(error)

ranks.agree("settings", {"seed": 3})
error = error_of(ranks.agree, "settings", {"a": 1, "seed": ranks.rank})
assert str(error).startswith("settings: seed is 0 on rank 0 and 1 on rank 1; "), error

weights = [Parameter(Tensor([[1.0, 2.0]], ms.float32), name=name) for name in ("first", "second")]
check_equal_on_ranks(weights, ranks)
if ranks.rank == 1:
    weights[1].set_data(Tensor([[1.0, 2.0000002]], ms.float32))
error = error_of(check_equal_on_ranks, weights, ranks)
other = 1 - ranks.rank
assert str(error).startswith(f"the weights of rank {ranks.rank} are not those of rank {other}: second differ"), error
print("all is well", flush=True)
