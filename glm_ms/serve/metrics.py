"""Numbers for Prometheus, with the names of vLLM and the prefix `glm_ms:`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glm_ms.serve.answer import Answer, Event
from glm_ms.serve.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_DURATIONS = {
    "request_queue_time": "From a request to its slots.",
    "time_to_first_token": "From a request to its first token.",
    "inter_token_latency": "Between two tokens of an answer, as a client sees them.",
    "e2e_request_latency": "From a request to the end of its answers.",
}


class Metrics:
    """The numbers of one model. Nothing is shared with other models of the process.

    Args:
        name: of the model, the label of all numbers.
    """

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.durations = {}
        for key, text in _DURATIONS.items():
            histogram = Histogram(f"glm_ms:{key}_seconds", text, ["model_name"], buckets=_BUCKETS, registry=None)
            self.registry.register(histogram)
            self.durations[key] = histogram.labels(name)
        self.registry.register(_OfScheduler(name, scheduler))

    def text(self) -> bytes:
        """All numbers in the text format of Prometheus."""
        return generate_latest(self.registry)


class Watch:
    """Takes the times of one answer, from the request on."""

    def __init__(self, metrics: Metrics, answer: Answer) -> None:
        self._durations, self._answer = metrics.durations, answer
        self._start = self._last = time.monotonic()
        self._seen = False

    def see(self, event: Event) -> None:
        """Notes an event of the answer."""
        if not event.tokens:
            return
        now = time.monotonic()
        if self._seen:
            self._durations["inter_token_latency"].observe((now - self._last) / len(event.tokens))
        else:
            self._durations["request_queue_time"].observe(self._answer.queue_seconds or 0.0)
            self._durations["time_to_first_token"].observe(now - self._start)
        self._last, self._seen = now, True

    def end(self) -> None:
        """Notes the end of the answer."""
        self._durations["e2e_request_latency"].observe(time.monotonic() - self._start)


class _OfScheduler(Collector):
    """Reads the numbers of a scheduler when Prometheus asks for them."""

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self._name, self._scheduler = name, scheduler

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._scheduler.stats
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        for key, text, value in (
            ("num_requests_running", "Requests with slots.", stats.running),
            ("num_requests_waiting", "Requests that wait for slots.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the pages of the cache that running requests use, 0 to 1.", usage),
        ):
            yield self._with_value(GaugeMetricFamily(f"glm_ms:{key}", text, labels=["model_name"]), value)
        for key, text, value in (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("generation_tokens", "Generated tokens.", stats.generated_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.", stats.prompt_tokens),
            ("prefix_cache_hits", "Of these, tokens that were found.", stats.cached_tokens),
            ("spec_decode_num_drafts", "Proposals of prompt lookup.", stats.speculation.proposals),
            ("spec_decode_num_draft_tokens", "Tokens of these.", stats.speculation.proposed),
            ("spec_decode_num_accepted_tokens", "Of these, tokens that were right.", stats.speculation.accepted),
            ("request_failures", "Requests whose computation failed.", stats.failed),
        ):
            yield self._with_value(CounterMetricFamily(f"glm_ms:{key}", text, labels=["model_name"]), value)
        ended = CounterMetricFamily(
            "glm_ms:request_success", "Answers by the reason of their end.", labels=["model_name", "finished_reason"]
        )
        for reason, count in sorted(stats.finished.items()):
            ended.add_metric([self._name, reason], count)
        yield ended

    def _with_value(self, family: Any, value: float) -> Metric:
        family.add_metric([self._name], value)
        return family
