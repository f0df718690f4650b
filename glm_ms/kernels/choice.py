"""Which operators of a network run as fused kernels: all, none, or those that agree with the portable ones here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

import mindspore as ms
from mindspore import nn

from glm_ms.generation.graphs import GRAPHS
from glm_ms.kernels.remembered import Outcome, cache_folder, file_for, outcomes
from glm_ms.kernels.run_checks import RunCheck, Use, products_of, run_checks
from glm_ms.model.config import GLMConfig
from glm_ms.model.layers import DTYPES
from glm_ms.ops import ascend, packing, portable, quantized, registry
from glm_ms.version import __version__

AUTO = "auto"
# Kernels that agree with the portable operators, all, none.
Wanted = Union[Literal["auto"], bool]
Say = Callable[[str], None]
_DIGEST = 8


def use_kernels(
    network: nn.Cell, config: GLMConfig, use: Use, wanted: Wanted, say: Say,
    on_first: Callable[[Callable[[], Any]], Any] = lambda work: work()
) -> None:  # fmt: skip
    """Installs fused kernels in a network that is not compiled yet.

    With "auto" every kernel that the run needs is compared with the portable operator, in the sizes and types of `use`,
    and installed if it agrees within the tolerance of its case. The outcome is remembered for this kind of card, these
    versions and these sizes. Devices without kernels keep the portable operators; a CPU without a line.

    Args:
        wanted: "auto"; True installs all kernels without comparing them, False none.
        say: takes lines for the user: what was chosen and why.
        on_first: calls a function on the first rank of a run and returns its JSON value on every rank, so that all
            ranks have the same kernels.
    """
    dtype = DTYPES[config.compute_dtype]
    if wanted is False or (wanted == AUTO and not registry.operators_of(registry.device())):
        return
    refused = {name: "it has no gradient" for name in registry.without_gradient()} if use.trains else {}
    if wanted is True or registry.why_portable() is not None:
        for line in registry.fuse_kernels(network, dtype, refused):
            say(line)
        return
    present = registry.fusable(network, dtype) - refused.keys()
    checks = [check for check in run_checks(config, use, products_of(network)) if check.operator in present]
    if not present:
        return
    found, remark = on_first(lambda: GRAPHS.run(_compared, checks, say))
    refused.update({name: "not needed by this run" for name in present - {check.operator for check in checks}})
    for check in checks:
        agrees, why = found[check.name]
        if not agrees:
            refused.setdefault(check.operator, f"{check.name}: {why}")
    say("; ".join([*registry.fuse_kernels(network, dtype, refused), remark]))


def machine() -> str:
    """What outcomes belong to: card, versions, and the code of the operators."""
    code = hashlib.sha256()
    for module in (ascend, packing, portable, quantized):
        code.update(Path(str(module.__file__)).read_bytes())
    cann = ascend.cann_version()
    parts = [
        ascend.soc_version() or registry.device(), f"CANN {cann}" if cann else "", f"MindSpore {ms.__version__}",
        f"glm_ms {__version__} {code.hexdigest()[:_DIGEST]}"
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def _compared(checks: Sequence[RunCheck], say: Say) -> tuple[dict[str, Outcome], str]:
    """Outcome of every check, and a remark on where it comes from."""
    name, folder, start, run = machine(), cache_folder(), time.perf_counter(), list[str]()

    def running(check: RunCheck) -> Outcome:
        if not run:
            say("comparing fused kernels with the portable operators on this card, once for these sizes")
        run.append(check.name)
        return check.run()

    found = outcomes(name, {check.name: partial(running, check) for check in checks}, folder, say)
    place = "" if folder is None else f", {file_for(name, folder)}"
    how = f"compared in {time.perf_counter() - start:.0f} s" if run else "as compared by an earlier start"
    return found, f"{how}{place}"
