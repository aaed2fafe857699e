"""Figures for Prometheus, under the names that dashboards for vLLM already know where the meaning is the
same.

Every server has a registry of its own, so several can live in one process. `axicon:` names are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from axicon.generate.request import Delta, DraftStats, EngineStats
from axicon.generate.steptimes import BOUNDS, StepTimes
from services.adapters import Named

FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5)
WHOLE = (0.1, 0.2, 0.4, 0.8, 1.5, 2.5, 5, 10, 15, 20, 30, 60, 120, 300, 600)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class EngineCollector(Collector):
    """What the engine counts itself, read when Prometheus asks."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self.model = model
        self.stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for name, text, value in (
            ("vllm:num_requests_running", "Choices being generated.", stats.running),
            ("vllm:num_requests_waiting", "Choices that wait for a place.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache that is set aside, 0 to 1.", _share(stats)),
            ("axicon:step_seconds", "Wall time of the last step.", stats.step_seconds),
            ("axicon:step_tokens", "Tokens computed in the last step.", stats.step_tokens),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total),
            ("vllm:generation_tokens", "Tokens generated.", stats.generated_tokens_total),
            ("axicon:steps", "Steps of the engine.", stats.steps_total),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
        yield _step_histogram(self.model, stats.decode_steps)
        yield from _drafts(self.model, stats.drafts)
        yield from _caches(self.model, stats)
        yield from _prefixes(self.model, stats)
        ended = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason, count in stats.finished_total.items():
            ended.add_metric([self.model, reason], count)
        yield ended


class RunCollector(Collector):
    """How far adapters are that follow a run."""

    def __init__(self, adapters: Callable[[], Iterable[Named]]) -> None:
        self.adapters = adapters

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        step, behind, stuck = (
            GaugeMetricFamily(name, text, labels=["model_name"])
            for name, text in (
                ("axicon:adapter_step", "Step of its run that an adapter is at."),
                ("axicon:adapter_steps_behind", "Later steps that the log of its run had at the last look."),
                ("axicon:adapter_stuck", "1 where its run cannot be followed any more."),
            )
        )
        for one in list(self.adapters()):
            if one.followed is not None:
                step.add_metric([one.name], one.step)
                behind.add_metric([one.name], one.behind)
                stuck.add_metric([one.name], one.followed.trouble is not None)
        yield from (step, behind, stuck)


def _drafts(model: str, drafts: Mapping[str, DraftStats]) -> Iterator[Metric]:
    """What guessing ahead has come to, by method and depth in the tree."""
    labels = ["model_name", "method"]
    checked = CounterMetricFamily("axicon:draft_tokens", "Guessed tokens checked.", labels=[*labels, "depth"])
    right = CounterMetricFamily("axicon:draft_accepted", "Guessed tokens kept.", labels=[*labels, "depth"])
    left_out = CounterMetricFamily(
        "axicon:drafts_left_out", "Guesses not checked, as it would not have paid.", labels=labels
    )
    failed = CounterMetricFamily(
        "axicon:drafts_failed", "Choices that went on without guesses after a failure.", labels=labels
    )
    gain = GaugeMetricFamily(
        "axicon:speculation_gain", "Estimated tokens per second over those without guesses.", labels=labels
    )
    for method, stats in drafts.items():
        for family, counts in ((checked, stats.drafted), (right, stats.accepted)):
            for depth, count in enumerate(counts, 1):
                family.add_metric([model, method, str(depth)], count)
        left_out.add_metric([model, method], stats.left_out)
        failed.add_metric([model, method], stats.failed)
        gain.add_metric([model, method], stats.gain)
    yield from (checked, right, left_out, failed, gain)


def _caches(model: str, stats: EngineStats) -> Iterator[Metric]:
    """What the caches hold and gave up, by policy."""
    labels = ["model_name", "policy"]
    size = GaugeMetricFamily("axicon:kv_bytes", "Bytes of keys and values that choices hold.", labels=labels)
    for policy, count in stats.kv_bytes.items():
        size.add_metric([model, policy], count)
    slots = GaugeMetricFamily("axicon:kv_slots", "Cache slots per head set aside.", labels=labels)
    for policy, count in stats.kv_slots.items():
        slots.add_metric([model, policy], count)
    evicted = CounterMetricFamily(
        "axicon:kv_evicted", "Cache slots given up, in the mean over layers and heads.", labels=labels
    )
    for policy, count in stats.kv_evicted_total.items():
        evicted.add_metric([model, policy], count)
    yield from (size, slots, evicted)


def _prefixes(model: str, stats: EngineStats) -> Iterator[Metric]:
    """What requests took over from earlier ones whose prompts begin alike."""
    prefixes = stats.prefixes
    for name, text, value in (
        ("axicon:prefix_cache_slots", "Cache slots per head that kept prompts take.", prefixes.slots),
        ("axicon:prefix_cache_bytes", "Bytes that kept prompts take.", stats.kept_bytes),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
    for name, text, value in (
        ("vllm:prefix_cache_queries", "Prompt tokens looked up.", prefixes.asked_total),
        ("vllm:prefix_cache_hits", "Prompt tokens taken over, not computed.", prefixes.reused_total),
        ("axicon:prefix_cache_requests", "Choices that took some over.", prefixes.requests_total),
        ("axicon:prefix_cache_dropped", "Kept tokens given back for room.", prefixes.dropped_total),
    ):
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([model], value)
        yield counter


def _step_histogram(model: str, times: StepTimes) -> Metric:
    uppers = [*(f"{bound:.6g}" for bound in BOUNDS), "+Inf"]
    buckets = list(zip(uppers, accumulate(times.counts), strict=True))
    text = "Wall time of steps that only decode."
    histogram = HistogramMetricFamily("axicon:decode_step_seconds", text, labels=["model_name"])
    histogram.add_metric([model], buckets, times.seconds)
    return histogram


def _share(stats: EngineStats) -> float:
    return stats.slots_reserved / stats.slots if stats.slots else 0.0


class Metrics:
    """What one server measures. Called from the event loop only."""

    def __init__(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        adapters: Callable[[], Iterable[Named]] = lambda: (),
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(model, stats))
        self.registry.register(RunCollector(adapters))
        self._model = model
        self.overload = Counter(
            "axicon:overload_refusals", "Requests answered with 429.", ["model_name"], registry=self.registry
        ).labels(model)
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN
        )
        self.between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two deltas of one choice.", BETWEEN
        )
        self.whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its end.", WHOLE
        )
        self.prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a choice.", LENGTHS
        )
        self.answer_length = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a choice.", LENGTHS
        )
        self.loop_lag = self._histogram("axicon:event_loop_lag_seconds", "How late the event loop runs.", LAG)

    def ended(self, delta: Delta, seconds: float) -> None:
        """A choice ended with `delta`, so many seconds after its request."""
        self.whole.observe(seconds)
        self.prompt_length.observe(delta.prompt_tokens)
        self.answer_length.observe(delta.completion_tokens)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(
            self._model
        )
