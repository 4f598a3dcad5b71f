"""/metrics: vLLM's names, with what happened in them."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import matquant
from http_service import complete, make_service
from matquant.serve.app import make_app
from matquant.serve.batching import Batching
from matquant.serve.limits import Limits
from matquant.serve.metrics import Metrics
from serving import PATIENT_S, Gate, Receiver, generation, reference_engine, run, starting

# names of vLLM 0.33 for what this server does
NAMES = re.findall(
    r"\w+",
    """
num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc prefix_cache_queries
prefix_cache_hits cache_config_info num_preemptions request_num_preemptions admission_rejections prompt_tokens
prompt_tokens_cached generation_tokens
request_success iteration_tokens_total time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
request_generation_tokens request_params_n request_params_max_tokens spec_decode_num_drafts
spec_decode_num_draft_tokens spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos
""",
)
OURS = ["generation_tokens", "width_changes", "served_bits_per_weight", "step_seconds"]
NEW_TOKENS = 8  # of an answer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return reference_engine(tmp_path_factory.getbasetemp())


@pytest.fixture
def serve(engine: matquant.Engine) -> Iterator[Callable[..., Batching]]:
    with starting(engine) as get:
        yield get


def values(text: str) -> dict[str, float]:
    """Samples by name and further labels, such as "name" or "name{reason=capacity}"."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            more = [f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name")]
            found[sample.name + (f"{{{','.join(more)}}}" if more else "")] = sample.value
    return found


def shown(batcher: Any) -> dict[str, float]:
    return values(Metrics(batcher, model_name="tiny").text().decode())


@pytest.fixture(scope="module")
def answered(engine: matquant.Engine) -> dict[str, float]:
    """/metrics after two requests of which each has two answers."""
    with starting(engine) as get, TestClient(make_app(make_service(engine, batcher=get()), Limits())) as client:
        for stream in (False, True):
            assert complete(client, ignore_eos=True, n=2, stream=stream).status_code == 200
        text = client.get("/metrics").text
        declared = set(re.findall(r"^# TYPE (\S+)", text, flags=re.MULTILINE))
        for name in [*(f"vllm:{name}" for name in NAMES), *(f"matquant:{name}" for name in OURS)]:
            assert declared & {name, f"{name}_total"}, f"{name} is missing"
        return values(text)


def test_times_of_a_request_add_up(answered: Mapping[str, float]) -> None:
    seconds = {}
    for part in ("queue", "prefill", "decode", "inference"):
        assert answered[f"vllm:request_{part}_time_seconds_count"] == 4
        seconds[part] = answered[f"vllm:request_{part}_time_seconds_sum"]
    assert seconds["inference"] == pytest.approx(seconds["prefill"] + seconds["decode"])
    assert min(seconds.values()) > 0
    whole = answered["vllm:e2e_request_latency_seconds_sum"]
    assert whole >= seconds["queue"] + seconds["inference"] - 0.05
    spent = sum(answered[f"matquant:step_seconds_total{{part={part}}}"] for part in ("native", "choosing"))
    assert 0 < spent < whole
    assert answered["matquant:step_seconds_total{part=drafting}"] == 0


def test_steps_count_the_tokens_that_they_read_and_choose(
    answered: Mapping[str, float], engine: matquant.Engine
) -> None:
    name, prompts = "vllm:iteration_tokens_total", 4 * len(engine.prompt_ids("Once upon"))
    cached = answered["vllm:prefix_cache_hits_total"]
    assert answered["vllm:prefix_cache_queries_total"] == prompts
    assert answered[f"{name}_sum"] == prompts - cached + 4 * NEW_TOKENS
    assert answered[f"{name}_count"] == answered[f"{name}_bucket{{le=+Inf}}"] == answered["matquant:engine{name=steps}"]
    assert answered[f"{name}_bucket{{le=1.0}}"] < answered[f"{name}_bucket{{le=32.0}}"]


def test_waiting_sequences_are_counted_by_reason(serve: Callable[..., Batching], engine: matquant.Engine) -> None:
    batcher, gate, receivers = serve(max_num_seqs=1), Gate(), [Receiver() for _ in range(3)]
    ids = engine.prompt_ids("Once upon a time")
    batcher.submit(generation(ids, bits=8, max_tokens=2, constraint=gate), receivers[0])
    assert gate.reached.wait(PATIENT_S)
    for receiver in receivers[1:]:
        batcher.submit(generation(ids, bits=8, max_tokens=2), receiver)
    found = shown(batcher)
    gate.open.set()
    for receiver in receivers:
        receiver.wait()
    assert found["vllm:num_requests_running"] == 1
    assert found["vllm:num_requests_waiting"] == found["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 2
    assert found["vllm:num_requests_waiting_by_reason{reason=deferred}"] == 0
    assert found["vllm:num_preemptions_total"] == 0


def test_a_sequence_that_waits_for_a_prompt_like_its_own_is_deferred(
    serve: Callable[..., Batching], engine: matquant.Engine
) -> None:
    seen: list[dict[str, float]] = []

    class Watching(Receiver):
        def __call__(self, found: Any) -> None:
            super().__call__(found)
            seen.append(shown(batcher))

    batcher, gate, receivers = serve(chunk=8), Gate(), [Watching(), Receiver(), Receiver()]
    ids = (engine.prompt_ids("Once upon a time there was a little dog") * 9)[:64]
    batcher.submit(generation(ids[:4], bits=8, max_tokens=12, constraint=gate), receivers[0])
    assert gate.reached.wait(PATIENT_S)
    for receiver in receivers[1:]:
        batcher.submit(generation(ids, bits=8, max_tokens=2), receiver)
    gate.open.set()
    for receiver in receivers:
        receiver.wait()
    assert {found["vllm:num_requests_waiting_by_reason{reason=deferred}"] for found in seen} == {0, 1}
    for found in seen:
        waiting = [found[f"vllm:num_requests_waiting_by_reason{{reason={why}}}"] for why in ("capacity", "deferred")]
        assert found["vllm:num_requests_waiting"] == sum(waiting)


def test_accepted_drafts_are_counted_by_their_place(serve: Callable[..., Batching], engine: matquant.Engine) -> None:
    batcher = serve(speculate=3)
    ids = engine.prompt_ids("Once upon a time, there was a little dog. Once upon a time, there was")
    run(batcher, generation(ids, bits=8, max_tokens=40))
    found = shown(batcher)
    places = [found[f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{position={place}}}"] for place in range(7)]
    assert sum(places) == found["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert places == sorted(places, reverse=True)  # one counts only if those before it do
    assert places[3:] == [0, 0, 0, 0]
    assert found["vllm:spec_decode_num_drafts_total"] >= places[0]
    assert found["matquant:step_seconds_total{part=drafting}"] > 0


def test_changes_of_width_are_counted_by_reason(serve: Callable[..., Batching], engine: matquant.Engine) -> None:
    batcher = serve(policy=True, widths=(8, 4), latency_s=1e-9)
    run(batcher, generation(engine.prompt_ids("Once upon a time"), max_tokens=20))
    found = shown(batcher)
    assert found["matquant:width_changes_total{direction=down,reason=latency}"] >= 1
    assert found["matquant:width_changes_total{direction=down,reason=waiting}"] == 0
