"""Serving in Prometheus' terms: `tributary_serving_*` of every replica, from the last look.

Names follow vLLM's where the thing is the same (`time_to_first_token_seconds`,
`inter_token_latency_seconds`, `request_queue_time_seconds`, ...), so that dashboards are soon
adapted. A scrape asks nobody and waits for nothing: it reads what `ServingWatch` saw within a
second. A replica that is down keeps its last counts and has `up` 0. Labels are bounded: replicas by
`serving_watch.MAX_REPLICAS`, adapters of a replica by the meter's own table (64 and `other`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ledger.api.serving_totals import EVICTIONS, TIERS
from ledger.api.serving_watch import Replica, ServingWatch

PREFIX = "tributary_serving_"
MAX_ROUTER_COUNTS = 64
STATES = ("ready", "draining", "down")

HISTOGRAMS = {
    "ttft_s": ("time_to_first_token_seconds", "From submission to the first token"),
    "inter_token_s": ("inter_token_latency_seconds", "Between two tokens of one answer"),
    "queue_s": ("request_queue_time_seconds", "From submission to a row of the batch"),
    "request_s": ("e2e_request_latency_seconds", "From submission to the end of the answer"),
    "prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request"),
    "completion_tokens": ("request_generation_tokens", "Tokens of an answer"),
    "decode_step_s": ("decode_step_seconds", "One forward of one token a row, and its sampling"),
    "prefill_step_s": ("prefill_step_seconds", "One forward over a chunk of prompts"),
    "batch_rows": ("batch_rows", "Rows of a decode step"),
    "batch_adapters": ("batch_adapters", "Distinct adapters of a decode step"),
}
GAUGES = {
    "rows": ("num_requests_running", "Requests that have a row of the batch"),
    "queued": ("num_requests_waiting", "Requests that wait for a row"),
    "max_rows": ("max_rows", "Rows of a full batch"),
}
COUNTERS = {
    "prefill_tokens": ("prompt_tokens", "Prompt tokens that were read"),
    "tokens": ("generation_tokens", "Tokens that were produced"),
    "decode_rows": ("decode_rows", "Rows of all decode steps"),
    "base_rows": ("base_rows", "Those of them that asked the base model itself"),
}
WHERE = {"registered": "registered", "slots": "in_slots", "host": "in_host"}


ONE = ("replica",)
Values = Mapping[Any, float]
"""By the values of the labels, in their order."""


class ServingCollector(Collector):
    """Registered with the API's registry; `collect` runs at each scrape, on any thread."""

    def __init__(self, watch: ServingWatch) -> None:
        self._watch = watch

    def describe(self) -> list[Metric]:
        return []  # nothing is known before the first look

    def collect(self) -> Iterator[Metric]:
        replicas = sorted(self._watch.replicas.values(), key=lambda replica: replica.name)
        yield from self._health(replicas)
        for key, (name, about) in GAUGES.items():
            yield _gauge(name, about, {(r.name,): r.stats.get(key, 0) for r in replicas})
        for key, (name, about) in COUNTERS.items():
            yield _counter(name, about, {(r.name,): _metrics(r).get(key, 0) for r in replicas})
        for key, (name, about) in HISTOGRAMS.items():
            yield _histogram(name, about, key, replicas)
        yield from _steps(replicas)
        yield from _tiers(replicas)
        yield from _adapters(replicas, dict(self._watch.names))
        yield _router(self._watch.router)
        yield _gauge("viewers", "Open connections of the live page", {(): self._watch.viewers}, ())

    def _health(self, replicas: list[Replica]) -> Iterator[Metric]:
        now = self._watch.clock()
        yield _gauge(
            "up", "1 for a replica that answered the last look", {(r.name,): r.up for r in replicas}
        )
        states = {(r.name, s): r.state == s for r in replicas for s in STATES}
        yield _gauge("replica_state", "1 for the state it is in", states, ("replica", "state"))
        ages = {(r.name,): now - r.heard_at for r in replicas}
        yield _gauge("sample_age_seconds", "Since the replica said these values", ages)
        rates = {(r.name,): r.tokens_per_s if r.up else 0.0 for r in replicas}
        yield _gauge("generation_tokens_per_second", "Of the last ten seconds", rates)


def _steps(replicas: list[Replica]) -> Iterator[Metric]:
    phases = {
        (r.name, phase): _metrics(r).get(f"{phase}_steps", 0)
        for r in replicas
        for phase in ("prefill", "decode")
    }
    yield _counter("steps", "Forwards of the model", phases, ("replica", "phase"))
    for name, about, key, label in (
        ("lora_form_steps", "Decode steps by the form of their adapters' product", "forms", "form"),
        ("requests_finished", "Answers by how they ended", "finished", "finished_reason"),
        ("requests_refused", "Requests that were not accepted", "refused", "reason"),
    ):
        values = {(r.name, k): n for r in replicas for k, n in _metrics(r).get(key, {}).items()}
        yield _counter(name, about, values, ("replica", label))


def _tiers(replicas: list[Replica]) -> Iterator[Metric]:
    def tier(names: Mapping[str, str]) -> Values:
        return {
            (r.name, tier): r.stats.get("adapters", {}).get(key, 0)
            for r in replicas
            for tier, key in names.items()
        }

    yield _counter(
        "adapter_lookups", "Where the adapter of a row was found", tier(TIERS), ("replica", "tier")
    )
    yield _counter(
        "adapter_evictions", "Adapters that gave way", tier(EVICTIONS), ("replica", "tier")
    )
    yield _gauge("adapters", "Adapters by where they are", tier(WHERE), ("replica", "where"))
    held = {(r.name,): r.stats.get("adapters", {}).get("host_bytes", 0) for r in replicas}
    yield _gauge("adapter_host_bytes", "Host memory that adapters take", held)


def _adapters(replicas: list[Replica], names: Mapping[str, str]) -> Iterator[Metric]:
    labels = ("replica", "adapter", "model")
    rows = [
        ((r.name, adapter, names.get(adapter, adapter)), counts)
        for r in replicas
        for adapter, counts in _metrics(r).get("adapters", {}).items()
    ]
    for key, name, about in (
        ("requests", "adapter_requests", "Answers of an adapter; `other` are the rest together"),
        ("prompt_tokens", "adapter_prompt_tokens", "Prompt tokens of an adapter's answers"),
        ("completion_tokens", "adapter_generation_tokens", "Tokens of an adapter's answers"),
    ):
        yield _counter(name, about, {label: counts[key] for label, counts in rows}, labels)
    waits = SummaryMetricFamily(
        f"{PREFIX}adapter_time_to_first_token_seconds",
        "From submission to the first token, by adapter",
        labels=labels,
    )
    for label, counts in rows:
        waits.add_metric(label, count_value=counts["first_tokens"], sum_value=counts["ttft_s"])
    yield waits


def _router(counts: Mapping[str, Any]) -> Metric:
    """What the router says of itself, by its own names: plain numbers only."""
    numbers = {
        (str(name),): value
        for name, value in list(counts.items())[:MAX_ROUTER_COUNTS]
        if isinstance(value, int | float)
    }
    return _gauge("router", "The router's own counts, by their names", numbers, ("count",))


def _metrics(replica: Replica) -> Mapping[str, Any]:
    found: Mapping[str, Any] = replica.stats.get("metrics", {})
    return found


def _gauge(name: str, about: str, values: Values, labels: Sequence[str] = ONE) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, about, labels=labels)
    for label, value in values.items():
        family.add_metric(label, float(value))
    return family


def _counter(
    name: str, about: str, values: Values, labels: Sequence[str] = ONE
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, about, labels=labels)
    for label, value in values.items():
        family.add_metric(label, float(value))
    return family


def _histogram(name: str, about: str, key: str, replicas: list[Replica]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, about, labels=("replica",))
    for replica in replicas:
        found = _metrics(replica).get("histograms", {}).get(key)
        if found:
            buckets, total = [], 0
            for bound, count in zip([*found["bounds"], None], found["counts"], strict=True):
                total += count
                buckets.append(("+Inf" if bound is None else repr(float(bound)), float(total)))
            family.add_metric((replica.name,), buckets=buckets, sum_value=found["sum"])
    return family
