"""The counters of /metrics: vLLM's names and labels, and ours under ``matquant:``."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from matquant.serve.work import Batcher

LABELS = ("model_name", "engine")
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
GAUGES = {  # a key of Batcher.stats -> vLLM's name
    "running": ("vllm:num_requests_running", "Sequences that are being generated."),
    "waiting": ("vllm:num_requests_waiting", "Sequences that wait for a place."),
    "kv_usage": ("vllm:kv_cache_usage_perc", "Share of the key/value memory that running sequences hold."),
}
COUNTED = {
    "prompt_tokens": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "cached_tokens": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "drafts": ("vllm:spec_decode_num_drafts", "Drafts, each of one or more tokens of a sequence."),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Tokens drafted."),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted."),
}
WIDTH_CHANGES = "Changes of the width by load."
HISTOGRAMS = {
    "first_token": ("vllm:time_to_first_token_seconds", "From the request to its first token.", SECONDS),
    "between_tokens": ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", SECONDS),
    "per_token": ("vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", SECONDS),
    "whole": ("vllm:e2e_request_latency_seconds", "From the request to the end of its answer.", SECONDS),
    "prompt_tokens": ("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS),
    "new_tokens": ("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS),
    "n": ("vllm:request_params_n", "The field n of a request.", (1, 2, 5, 10, 20)),
    "max_tokens": ("vllm:request_params_max_tokens", "The field max_tokens of a request.", TOKENS),
}


class Metrics:
    """The counters of one server."""

    def __init__(self, batcher: Batcher, *, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self._labels = {"model_name": model_name, "engine": "0"}
        self._histograms = {
            key: Histogram(name, words, LABELS, buckets=buckets, **own).labels(**self._labels)
            for key, (name, words, buckets) in HISTOGRAMS.items()
        }
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts.", own)
        self._cached = self._counter("vllm:prompt_tokens_cached", "Tokens of prompts that were in the cache.", own)
        self._new = self._counter("vllm:generation_tokens", "Tokens generated.", own)
        self._ended = Counter(
            "vllm:request_success", "Answers, by why they ended.", (*LABELS, "finished_reason"), **own
        )
        self._rejected = Counter("vllm:admission_rejections", "Requests not admitted.", (*LABELS, "reason"), **own)
        self._by_width = Counter("matquant:generation_tokens", "Tokens generated, by width.", (*LABELS, "bits"), **own)
        self._bits = Gauge("matquant:served_bits_per_weight", "Bits per weight of the last answer.", LABELS, **own)
        self.registry.register(_Stats(batcher, self._labels))

    def _counter(self, name: str, words: str, own: Any) -> Any:
        return Counter(name, words, LABELS, **own).labels(**self._labels)

    def observe(self, key: str, value: float) -> None:
        """Add a value to a histogram of HISTOGRAMS."""
        self._histograms[key].observe(value)

    def rejected(self, reason: str) -> None:
        """Count a request that was not admitted."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt."""
        self._prompt.inc(tokens)
        self._cached.inc(cached)
        self.observe("prompt_tokens", tokens)

    def answer(self, served: Mapping[str, int], *, finish: str, bits_per_weight: float | None) -> None:
        """Count an answer. served: tokens by label of a width."""
        tokens = sum(served.values())
        self._new.inc(tokens)
        self.observe("new_tokens", tokens)
        self._ended.labels(**self._labels, finished_reason=finish).inc()
        for label, count in served.items():
            self._by_width.labels(**self._labels, bits=label).inc(count)
        if bits_per_weight is not None:
            self._bits.labels(**self._labels).set(bits_per_weight)

    def text(self) -> bytes:
        """Return all counters in the text format of Prometheus."""
        return generate_latest(self.registry)


class _Stats:
    """The engine side's numbers, read when /metrics is."""

    def __init__(self, batcher: Batcher, labels: Mapping[str, str]) -> None:
        self._batcher, self._labels = batcher, labels

    def collect(self) -> Iterator[Any]:
        stats = dict(self._batcher.stats())
        if limit := stats.get("kv_bytes_limit"):
            stats["kv_usage"] = stats.get("kv_bytes_reserved", 0.0) / limit  # as in vLLM: kept prefixes give way
        for key, (name, words) in COUNTED.items():
            yield self._counter(name, words, stats.get(key, 0.0))
        changes = CounterMetricFamily("matquant:width_changes", WIDTH_CHANGES, labels=[*LABELS, "direction"])
        for direction in ("down", "up"):
            values = [*self._labels.values(), direction]
            changes.add_metric(values, float(stats.pop(f"width_changes/{direction}", 0.0)))
        yield changes
        for key, (name, words) in GAUGES.items():
            yield self._gauge(name, words, stats.pop(key, 0.0))
        family = GaugeMetricFamily("matquant:engine", "Numbers of the engine.", labels=[*LABELS, "name"])
        for key, value in sorted(stats.items()):
            family.add_metric([*self._labels.values(), key], float(value))
        yield family

    def _counter(self, name: str, words: str, value: float) -> Any:
        family = CounterMetricFamily(name, words, labels=LABELS)
        family.add_metric(list(self._labels.values()), float(value))
        return family

    def _gauge(self, name: str, words: str, value: float) -> Any:
        family = GaugeMetricFamily(name, words, labels=LABELS)
        family.add_metric(list(self._labels.values()), float(value))
        return family
