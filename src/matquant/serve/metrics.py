"""The counters of /metrics: vLLM's names and labels, and ours under ``matquant:``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from matquant.engine.pace import LENGTHS
from matquant.serve.work import Batcher

LABELS = ("model_name", "engine")
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
GAUGES = {  # a key of Batcher.stats -> vLLM's name
    "running": ("vllm:num_requests_running", "Sequences that are being generated."),
    "waiting": ("vllm:num_requests_waiting", "Sequences that wait, for whatever reason."),
    "kv_usage": ("vllm:kv_cache_usage_perc", "Share of the key/value memory that running sequences hold."),
}
COUNTED = {
    "preemptions": ("vllm:num_preemptions", "Sequences stopped for lack of memory: none, they reserve what they need."),
    "prompt_tokens": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "cached_tokens": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "drafts": ("vllm:spec_decode_num_drafts", "Drafts, each of one or more tokens of a sequence."),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Tokens drafted."),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted."),
}
WAITING = "Sequences that wait for a place or its memory (capacity), or for a prompt that begins alike (deferred)."
Values = Mapping[tuple[str, ...], float]  # of a family, by the values of further labels
# keys of Batcher.stats that have labels in them -> name, words, names of the labels, their values
LABELLED: Mapping[str, tuple[str, str, Sequence[str], Sequence[tuple[str, ...]]]] = {
    "accepted_tokens/{}": (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens that were accepted, by place in the draft.",
        ("position",),
        [(str(position),) for position in range(max(LENGTHS))],
    ),
    "width_changes/{}/{}": (
        "matquant:width_changes",
        "Changes of the width by load.",
        ("direction", "reason"),
        [("down", "latency"), ("down", "waiting"), ("up", "recovered")],
    ),
    "{}_s": (
        "matquant:step_seconds",
        "Seconds of the engine thread, by what it did.",
        ("part",),
        [("native",), ("choosing",), ("drafting",)],
    ),
}
HISTOGRAMS = {
    "first_token": ("vllm:time_to_first_token_seconds", "From the request to its first token.", SECONDS),
    "between_tokens": ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", SECONDS),
    "per_token": ("vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", SECONDS),
    "whole": ("vllm:e2e_request_latency_seconds", "From the request to the end of its answer.", SECONDS),
    "queue": ("vllm:request_queue_time_seconds", "Until the request was given a place.", SECONDS),
    "prefill": ("vllm:request_prefill_time_seconds", "From its place to its first token.", SECONDS),
    "decode": ("vllm:request_decode_time_seconds", "From its first token to its last.", SECONDS),
    "inference": ("vllm:request_inference_time_seconds", "From its place to its last token.", SECONDS),
    "prompt_tokens": ("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS),
    "new_tokens": ("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS),
    "preempted": ("vllm:request_num_preemptions", "How often a request was stopped for lack of memory.", (1, 2, 5, 10)),
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
        deferred, waiting = stats.pop("deferred", 0.0), stats.get("waiting", 0.0)
        stats |= {"running": stats.get("running", 0.0) - deferred, "waiting": waiting + deferred}
        yield self._cache(stats)
        yield self._sizes(stats)
        for key, (name, words) in COUNTED.items():
            yield self._family(CounterMetricFamily, name, words, {(): stats.get(key, 0.0)})
        for key, (name, words, labels, known) in LABELLED.items():
            values = {own: stats.pop(key.format(*own), 0.0) for own in known}
            yield self._family(CounterMetricFamily, name, words, values, *labels)
        for key, (name, words) in GAUGES.items():
            yield self._family(GaugeMetricFamily, name, words, {(): stats.pop(key, 0.0)})
        reasons: Values = {("capacity",): waiting, ("deferred",): deferred}
        yield self._family(GaugeMetricFamily, "vllm:num_requests_waiting_by_reason", WAITING, reasons, "reason")
        numbers: Values = {(key,): value for key, value in sorted(stats.items())}
        yield self._family(GaugeMetricFamily, "matquant:engine", "Numbers of the engine.", numbers, "name")

    def _family(self, kind: Any, name: str, words: str, values: Values, *labels: str) -> Any:
        """Return a family. labels: names of those that ``values`` has."""
        family = kind(name, words, labels=[*LABELS, *labels])
        for own, value in values.items():
            family.add_metric([*self._labels.values(), *own], float(value))
        return family

    def _cache(self, stats: Mapping[str, float]) -> Any:
        """Return what is fixed about the memory of keys and values: 1, with the facts as labels."""
        facts = {
            "kv_cache_memory_bytes": f"{stats.get('kv_bytes_limit', 0.0):.0f}",
            "kv_cache_size_tokens": f"{stats.get('kv_tokens_limit', 0.0):.0f}",
            "kv_cache_max_concurrency": f"{stats.get('kv_contexts_limit', 0.0):.2f}",  # of full contexts
            "enable_prefix_caching": "True",
        }
        words = "The memory of keys and values."
        return self._family(GaugeMetricFamily, "vllm:cache_config_info", words, {tuple(facts.values()): 1.0}, *facts)

    def _sizes(self, stats: dict[str, float]) -> Any:
        """Return the histogram of tokens per step; its keys are taken out of ``stats``."""
        prefix = "iteration_tokens/"
        steps = {float(key.removeprefix(prefix)): stats.pop(key) for key in list(stats) if key.startswith(prefix)}
        buckets = [
            ("+Inf" if bound == math.inf else f"{bound:.1f}", sum(steps[size] for size in steps if size <= bound))
            for bound in (*STEP_TOKENS, math.inf)
        ]
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
        total = sum(size * count for size, count in steps.items())
        family.add_metric(list(self._labels.values()), buckets, total)
        return family
