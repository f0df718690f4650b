"""JSON and Markdown of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glm_ms.bench.measure import DECODE, Group, Result
from glm_ms.bench.subjects import OURS
from glm_ms.bench.timings import Timing
from glm_ms.version import __version__

SCHEMA = 1
# Foreign load from which a measurement is called disturbed.
DISTURBED = 0.05
_HEAD = ("measurement", "program", "weights", "median", "quartiles", "tokens/s", "ratio", "x memory", "memory")


def document(
    groups: Sequence[Group], machine: dict[str, Any], command: str, geometry: str, timings: Sequence[Timing] = ()
) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {
        "schema": SCHEMA,
        "glm_ms": __version__,
        "command": command,
        "geometry": geometry,
        "machine": machine,
        "versions": {name: version for group in groups for name, version in group.versions.items()},
        "config": groups[0].config.to_dict() if groups else {},
        "agreement": [
            {"layers": group.config.num_layers, "threads": group.threads, **group.agreement} for group in groups
        ],
        "results": [
            {**result.to_dict(), "ratio": ratio(result, group.results), "memory_ratio": memory_ratio(result)}
            for group in groups
            for result in group.results
        ],
        "timings": [timing.to_dict() for timing in timings],
    }


def ratio(result: Result, results: Iterable[Result]) -> float | None:
    """Time of a program over that of glm_ms in the same case: with equal weights, or else with its first ones.

    Above 1: glm_ms is faster. None: one of them was not measured.
    """
    ours = [r for r in results if r.case == result.case and r.subject == OURS and r.samples]
    same = [r for r in ours if r.weights == result.weights] or ours
    return result.median / same[0].median if same and result.samples else None


def memory_ratio(result: Result) -> float | None:
    """Time of a step over that of a plain read of its weights; only for DECODE."""
    if result.case.mode != DECODE or not result.samples or not result.bandwidth:
        return None
    return result.median / (result.weight_bytes / result.bandwidth)


def table(groups: Sequence[Group]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [_row(_HEAD), _row(["---"] * len(_HEAD))]
    several = len({(group.config.num_layers, group.threads) for group in groups}) > 1
    for group in groups:
        where = f", layers {group.config.num_layers}, threads {group.threads}" if several else ""
        for result in sorted(group.results, key=lambda result: group.cases.index(result.case)):
            lines.append(_row([result.case.title() + where, *_cells(result, group.results)]))
    return lines


def _cells(result: Result, results: Sequence[Result]) -> list[str]:
    if not result.samples:
        return [result.subject, result.weights, "-", result.error.replace("|", "/"), "-", "-", "-", "-"]
    low, high = result.spread
    tokens = result.case.tokens_of_sample
    rate = f"{tokens / result.median:.1f}" if tokens else "-"
    return [
        result.subject, result.weights, _median(result), f"{_time(low)} to {_time(high)}", rate,
        _number(ratio(result, results)), _number(memory_ratio(result)), f"{result.peak_memory / 2**30:.2f} GiB",
    ]  # fmt: skip


def timing_table(timings: Sequence[Timing]) -> list[str]:
    """Lines of a Markdown table of measurements without a network; none without measurements."""
    if not timings:
        return []
    lines = [_row(("measurement", "median", "least", "most", "tokens/s")), _row(["---"] * 5)]
    for timing in timings:
        rate = f"{timing.tokens / timing.median:,.0f}" if timing.tokens else "-"
        extremes = min(timing.samples), max(timing.samples)
        lines.append(_row([timing.title, _median(timing), *map(_time, extremes), rate]))
    return lines


def warnings(groups: Sequence[Group], timings: Sequence[Timing] = ()) -> list[str]:
    """What makes measurements doubtful."""
    measured: list[Result | Timing] = [*(result for group in groups for result in group.results), *timings]
    loads = [one.foreign_load for one in measured if one.foreign_load is not None and one.samples]
    high = [load for load in loads if load > DISTURBED]
    if not high:
        return []
    return [
        f"warning: other programs took up to {max(high):.0%} of the cores during {len(high)} of {len(loads)} "
        "measurements; their times are too high, and ratios doubtful. Measure again on an idle machine"
    ]


def machine_lines(machine: dict[str, Any], groups: Sequence[Group]) -> list[str]:
    """The machine in a few words."""
    rates = [r.bandwidth for group in groups for r in group.results if r.bandwidth]
    read = f", memory read at {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s" if rates else ""
    sets = ", ".join(machine["instruction_sets"]) or "no known vector instructions"
    return [f"{machine['processor']}, {machine['cores']} cores ({sets}){read}, {machine['date']}"]


def _median(measured: Result | Timing) -> str:
    disturbed = measured.foreign_load is not None and measured.foreign_load > DISTURBED
    return f"{_time(measured.median)}{' (disturbed)' if disturbed else ''}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else (
        f"{seconds * 1e6:.0f} us"
    )  # fmt: skip
