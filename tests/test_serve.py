"""The server's routes in process: models, completions, chats, streams, log-probabilities, errors, tokens, limits."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import matquant
from cases import each
from http_service import assert_error, chat, complete, events, make_engine, make_service, stop_all
from matquant.hf.renderer import warm
from matquant.serve import running
from matquant.serve.app import make_app
from matquant.serve.fields import CHAT, COMPLETION
from matquant.serve.limits import Limits
from matquant.serve.metrics import Metrics
from matquant.serve.run import drain
from matquant.serve.service import Service
from one_by_one import OneByOne
from serving import starting

ANSWERED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]


@pytest.fixture(scope="module")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return make_engine(llama, tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture
def service(engine: matquant.Engine) -> Service:
    return make_service(engine)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service, Limits())) as client:
        yield client


# -------------------------------------------------------------------------------------------------------------- widths


def test_models_lists_every_width_and_plan(client: TestClient) -> None:
    found = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in found] == ["tiny", "tiny:int8", "tiny:int4", "tiny:int2", "tiny:mixed"]
    assert found[2]["matquant"] == {"bits": 4, "bits_per_weight": 4.5, "tokens_per_s": 20.0}
    assert client.get("/v1/models/tiny:int4").json() == found[2]
    assert_error(client.get("/v1/models/other"), 404, "model", "tiny:int8")


@each("name", ["tiny", "tiny:auto", *(f"tiny:int{bits}" for bits in range(1, 9)), "tiny:mixed"])
def test_every_name_that_a_request_may_give_is_described(client: TestClient, name: str) -> None:
    assert complete(client, model=name, max_tokens=1).status_code == 200
    found = client.get(f"/v1/models/{name}").json()
    assert (found["id"], found["root"]) == (name, "tiny")
    if name == "tiny:int5":
        assert found["matquant"] == {"bits": 5, "bits_per_weight": None, "tokens_per_s": None}


@each("name", ["tiny:int0", "tiny:int9", "tiny:", "tiny:4", "tiny:3.2bpw", "other:int4"])
def test_names_that_requests_may_not_give_are_not_described(client: TestClient, name: str) -> None:
    asked, listed = complete(client, model=name), client.get(f"/v1/models/{name}")
    assert_error(listed, 404, "model", "tiny:int8")
    assert listed.json() == asked.json()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_named_width_gives_the_text_of_the_engine_at_that_width(
    client: TestClient, engine: matquant.Engine, bits: int
) -> None:
    options: dict[str, Any] = {"max_tokens": 50, "temperature": 0}
    body = complete(client, model=f"tiny:int{bits}", **options).json()
    assert body["choices"][0]["text"] == engine.generate("Once upon", bits=bits, **options)
    assert body["model"] == f"tiny:int{bits}"
    for other in {8, 4, 2} - {bits}:
        assert body["choices"][0]["text"] != engine.generate("Once upon", bits=other, **options)


def test_a_plan_is_served_by_name(client: TestClient, service: Service, engine: matquant.Engine) -> None:
    expected = engine.generate("Once upon", plan=service.models.plans["mixed"], max_tokens=8, temperature=0)
    for fields in ({"model": "tiny:mixed"}, {"model": "tiny", "plan": "mixed"}):
        body = complete(client, temperature=0, **fields).json()
        assert body["choices"][0]["text"] == expected
        assert body["matquant"]["served"] == [{"plan": "mixed", "tokens": body["usage"]["completion_tokens"]}]
        assert body["matquant"]["bits_per_weight"] == 4.2


def test_the_answer_says_which_widths_served_it(engine: matquant.Engine) -> None:
    service = make_service(engine, batcher=OneByOne(engine, automatic=[8, 8, 8, 4]))
    with TestClient(make_app(service, Limits())) as client:
        response = complete(client, ignore_eos=True)
        body = response.json()
        assert body["model"] == "tiny:auto"
        assert body["matquant"]["served"] == [{"bits": 8, "tokens": 3}, {"bits": 4, "tokens": 5}]
        assert body["matquant"]["bits_per_weight"] == 6.0
        assert response.headers["x-matquant-width"] == "int8=3,int4=5"
        assert sum(entry["tokens"] for entry in body["matquant"]["served"]) == body["usage"]["completion_tokens"] == 8
        stream = complete(client, ignore_eos=True, stream=True, stream_options={"include_usage": True})
        assert stream.headers["x-matquant-width-start"] == "int8"
        assert events(stream)[-1]["matquant"] == body["matquant"]


@each(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": "tiny:int9"}, 404, "model"),
        ({"model": "tiny:int4", "bits": 2}, 400, "bits"),
        ({"bits": 4, "plan": "mixed"}, 400, "plan"),
        ({"plan": "none"}, 400, "plan"),
        ({"bits": 0}, 400, "bits"),
        ({"bits": 2, "min_bits": 3}, 400, "min_bits"),
        ({"model": "tiny:mixed", "min_bits": 3}, 400, "min_bits"),
        ({"service_tier": "scale"}, 400, "service_tier"),
    ],
)
def test_widths_that_do_not_agree_are_rejected(
    client: TestClient, fields: dict[str, Any], status: int, param: str
) -> None:
    assert_error(complete(client, **fields), status, param)


def test_service_tiers_set_priority_and_width(client: TestClient, service: Service) -> None:
    found = {}
    for tier in ("auto", "priority", "flex"):
        body = complete(client, service_tier=tier, min_bits=3).json()
        found[tier] = (body["service_tier"], service.batcher.seen[-1].priority, service.batcher.seen[-1].least_bits)
    assert found == {"auto": ("default", 0, 3), "priority": ("priority", 1, 8), "flex": ("flex", -1, 3)}
    assert "service_tier" not in complete(client).json()


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_chat_is_rendered_by_the_template(client: TestClient, engine: matquant.Engine, service: Service) -> None:
    body = chat(client, temperature=0, messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).json()
    prompt = engine.vocabulary.plain("<user>Hi</user><assistant>")
    assert list(service.batcher.seen[-1].ids) == prompt
    assert body["choices"][0]["message"]["content"] == engine.generate(prompt, bits=8, max_tokens=8, temperature=0)
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["prompt_tokens"] == len(prompt)


def test_a_last_message_is_continued(client: TestClient, engine: matquant.Engine, service: Service) -> None:
    body = chat(client, messages=ANSWERED, continue_final_message=True, echo=True, max_tokens=2).json()
    assert engine.vocabulary.decode(service.batcher.seen[-1].ids) == "<user>Hi</user><assistant>So"
    assert body["choices"][0]["message"]["content"].startswith("So")


def test_a_stream_has_the_text_of_the_answer(client: TestClient) -> None:
    whole = chat(client, seed=3, temperature=1, ignore_eos=True).json()
    found = events(
        chat(client, seed=3, temperature=1, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    )
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    text = "".join(entry["choices"][0]["delta"].get("content") or "" for entry in found[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["choices"] == []
    for count in ("prompt_tokens", "completion_tokens"):
        assert found[-1]["usage"][count] == whole["usage"][count]
    assert {entry["id"] for entry in found} == {found[0]["id"]}


def test_counts_come_with_every_chunk_only_where_counts_are_wanted(client: TestClient) -> None:
    for wanted in (False, True):
        options = {"include_usage": wanted, "continuous_usage_stats": True}
        found = events(complete(client, ignore_eos=True, stream=True, stream_options=options))
        assert [bool(entry.get("usage")) for entry in found] == [wanted] * len(found)


def test_several_answers_differ_and_are_reproducible(client: TestClient) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    texts = [choice["text"] for choice in complete(client, **fields).json()["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in complete(client, **fields).json()["choices"]]
    streamed = ["", "", ""]
    for entry in events(complete(client, **fields, stream=True)):
        streamed[entry["choices"][0]["index"]] += entry["choices"][0]["text"]
    assert streamed == texts
    many = complete(client, prompt=["a", "b"], n=2, max_tokens=2).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_an_answer(client: TestClient, stream: bool) -> None:
    text = complete(client, temperature=0, ignore_eos=True, max_tokens=20).json()["choices"][0]["text"]
    stop = text[5:8]
    place = text.index(stop)
    for include in (False, True):
        response = complete(
            client, temperature=0, max_tokens=20, stop=[stop, "zzzz"], include_stop_str_in_output=include, stream=stream
        )
        if stream:
            found = "".join(entry["choices"][0]["text"] for entry in events(response))
            last = events(response)[-1]["choices"][0]
        else:
            last = response.json()["choices"][0]
            found = last["text"]
        assert found == text[: place + (len(stop) if include else 0)]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


def test_stop_tokens_end_an_answer(client: TestClient) -> None:
    text = complete(client, temperature=0, ignore_eos=True).json()["choices"][0]["text"]
    letter = next(letter for letter in text if letter.isascii())
    (token,) = client.post("/tokenize", json={"prompt": letter}).json()["tokens"]
    body = complete(client, temperature=0, stop_token_ids=[token]).json()
    found = body["choices"][0]
    expected = text[: text.index(letter)]
    assert (found["text"], found["finish_reason"], found["stop_reason"]) == (expected.rstrip("\ufffd"), "stop", token)
    assert body["usage"]["completion_tokens"] == len(expected) + 1


def test_sampling_fields_reach_the_engine(client: TestClient, service: Service) -> None:
    fields = {"temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "seed": -1, "min_tokens": 2}
    fields |= {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"5": -100}}
    assert complete(client, **fields).status_code == 200
    seen = service.batcher.seen[-1]
    assert (seen.sampling.temperature, seen.sampling.top_k, seen.sampling.top_p, seen.sampling.min_p) == (
        0.5,
        0,
        0.9,
        0.1,
    )
    assert (seen.repetition_penalty, seen.presence_penalty, seen.frequency_penalty) == (1.2, 1.0, -1.0)
    assert (seen.min_tokens, seen.logit_bias, seen.sampling.seed) == (2, {5: -100.0}, 2**63 - 1)
    complete(client, top_p=0.5)
    assert service.batcher.seen[-1].sampling.temperature == 1.0, "top_p means sampling"


# ------------------------------------------------------------------------------------------------- log-probabilities


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_echo_scores_the_prompt_as_the_harness_reads_it(client: TestClient, engine: matquant.Engine) -> None:
    ids = engine.vocabulary.plain("The cat saw mice")
    fields = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1, "bits": 4}
    found = complete(client, **fields).json()["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:-1], engine.score(ids, bits=4), atol=1e-5)
    assert not np.allclose(found["token_logprobs"][1:-1], engine.score(ids, bits=3), atol=1e-3)
    rows = engine.session(64).extend(ids, engine.widths(4), all_logits=True)
    greedy = [int(row[: engine.choosable].argmax()) == token for row, token in zip(rows, ids[1:], strict=False)]
    said = [
        logprob == max(top.values())
        for logprob, top in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True)
    ]
    assert said == greedy
    assert "".join(found["tokens"][:-1]) == "The cat saw mice"
    assert found["text_offset"][:5] == [0, 1, 2, 3, 4]


def test_scoring_alone_needs_no_new_token(client: TestClient) -> None:
    fields: dict[str, Any] = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
    body = complete(client, **fields).json()
    assert body["choices"][0]["text"] == "abc"
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 3
    chosen = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    assert logprobs["top_logprobs"] == [None, *({token: logprob} for token, logprob in list(chosen)[1:])]
    assert body["usage"]["completion_tokens"] == 0
    streamed = events(complete(client, **fields, stream=True))
    assert "".join(entry["choices"][0]["text"] for entry in streamed) == "abc"
    assert sum(len((entry["choices"][0]["logprobs"] or {"tokens": []})["tokens"]) for entry in streamed) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_spell_its_text(client: TestClient, stream: bool) -> None:
    response = chat(client, logprobs=True, top_logprobs=3, temperature=0, ignore_eos=True, stream=stream)
    if stream:
        entries = [e["choices"][0] for e in events(response)]
        content = [token for e in entries if e["logprobs"] for token in e["logprobs"]["content"]]
        text = "".join(e["delta"].get("content") or "" for e in entries)
    else:
        choice = response.json()["choices"][0]
        content, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert len(content) == 8
    spelt = b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace")
    assert spelt.rstrip("\ufffd") == text.rstrip("\ufffd")
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in content), "greedy"


# ------------------------------------------------------------------------------------------------------ tokens, state


def test_text_and_tokens(client: TestClient, engine: matquant.Engine) -> None:
    found = client.post("/tokenize", json={"prompt": "Hi ü", "return_token_strs": True}).json()
    assert found["tokens"] == engine.vocabulary.prompt("Hi ü")
    assert found["count"] == len(found["token_strs"]) == 5
    assert found["max_model_len"] == engine.context
    assert client.post("/detokenize", json={"tokens": [*found["tokens"], 256]}).json()["prompt"] == "Hi ü<|endoftext|>"
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    messages = [{"role": "user", "content": "Hi"}]
    assert client.post("/tokenize", json={"messages": messages}).json()["count"] == len("<user>Hi</user><assistant>")


def test_state(client: TestClient, service: Service) -> None:
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    assert client.get("/version").json()["model"] == "tiny"
    assert client.get("/load").json() == {"server_load": 0}
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import", page.text), "the page is one file"
    service.is_draining = True
    assert_error(client.get("/health"), 503)
    assert_error(complete(client), 503, words="stopping")


def test_kept_prefixes_are_no_usage_of_the_cache(engine: matquant.Engine) -> None:
    class Busy(OneByOne):
        def stats(self) -> dict[str, float]:
            return {"kv_bytes": 900.0, "kv_bytes_reserved": 100.0, "kv_bytes_limit": 1000.0}

    batcher = Busy(engine)
    text = Metrics(batcher, model_name="tiny").text().decode()
    batcher.stop(0)
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.1\n' in text


def test_answers_name_the_width_of_their_prompt_if_it_is_another(engine: matquant.Engine) -> None:
    asked = [{"bits": 2}, {"bits": 4}, {"plan": "mixed"}, {}, {"bits": 2, "prompt": [5]}]
    asked += [{"bits": 2, "echo": True, "logprobs": 1}]
    with starting(engine) as get:
        for prefill_bits, expected in ((4, [4, None, 4, None, None, None]), (2, [None] * 6)):
            service = make_service(engine, batcher=get(prefill_bits=prefill_bits))
            with TestClient(make_app(service, Limits())) as client:
                reports = [complete(client, **fields).json()["matquant"] for fields in asked]
                stream = complete(client, bits=2, stream=True, stream_options={"include_usage": True})
            reports.append(events(stream)[-1]["matquant"])
            assert [report.get("prompt_bits") for report in reports] == [*expected, expected[0]]


def test_metrics_count_tokens_by_width(client: TestClient) -> None:
    complete(client, bits=4, ignore_eos=True)
    complete(client, bits=2, ignore_eos=True, stream=True)
    text = client.get("/metrics").text
    labels = 'engine="0",model_name="tiny"'
    for line in (
        f"vllm:generation_tokens_total{{{labels}}} 16.0",
        f"vllm:prompt_tokens_total{{{labels}}} 18.0",
        f'matquant:generation_tokens_total{{bits="4",{labels}}} 8.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 2.0',
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 2.0",
        f"vllm:inter_token_latency_seconds_count{{{labels}}} 14.0",
        f"vllm:num_requests_running{{{labels}}} 0.0",
    ):
        assert line in text


# -------------------------------------------------------------------------------------------------------------- errors


@each(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{**ANSWERED[1], "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"stop_token_ids": [5000]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"suffix": "x"}, "suffix"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {"continue_final_message": True, "add_generation_prompt": True, "messages": ANSWERED},
            "continue_final_message",
        ),
    ],
)
def test_wrong_fields_are_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = chat(client, **fields)
    assert_error(response, 400, param)
    assert response.headers["x-should-retry"] == "false"


def test_prompts_that_do_not_fit_are_rejected(client: TestClient) -> None:
    assert_error(complete(client, prompt="x" * 70), 400, "prompt")
    assert_error(complete(client, prompt=[5000]), 400, "prompt", "outside the vocabulary")
    assert_error(complete(client, prompt=[[1], []]), 400, "prompt")
    assert_error(complete(client, best_of=3), 400, "best_of")
    assert_error(complete(client, max_tokens=0), 400, "max_tokens")
    assert_error(client.post("/v1/completions", json={}), 400, "prompt", "missing")
    assert_error(chat(client, max_tokens=None, messages=[{"role": "user", "content": "x" * 70}]), 400, "messages")


def test_unknown_fields_are_named_in_a_header(client: TestClient) -> None:
    response = chat(client, zebra=1, user="me", apple=[2])
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "apple, zebra"
    assert "x-ignored-fields" not in chat(client).headers
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = client.post(path, json={**fields, "zebra": 1, "model": "tiny:int4"})
        assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "zebra")
        assert_error(client.post(path, json={**fields, "model": "other"}), 404, "model")


@each(
    "fields",
    [
        {"structured_outputs": {"choice": ["\ud800", "b"]}},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "\udfff"}}]},
        {"messages": [{"role": "user", "content": "a\ud83d"}]},
        {"stop": ["\udc00"]},
        {"chat_template_kwargs": {"\ud800": 1}},
    ],
)
def test_half_a_surrogate_pair_is_no_text(client: TestClient, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "\U0001f431"}], "max_tokens": 2, **fields}
    response = client.post("/v1/chat/completions", content=json.dumps(body))  # with escapes
    assert_error(response, 400, next(iter(fields)), "half a surrogate pair")
    body |= {**dict.fromkeys(fields), "messages": ANSWERED[:1]}
    assert client.post("/v1/chat/completions", content=json.dumps(body)).status_code == 200


def test_a_request_that_no_queue_holds_is_no_matter_of_waiting(client: TestClient, service: Service) -> None:
    service.batcher.capacity = 3
    assert complete(client, n=3).status_code == 200
    assert_error(complete(client, n=4), 400, "n", "more than 3 answers")
    assert_error(complete(client, prompt=["a"] * 4), 400, "prompt", "more than 3 answers")


def test_what_is_not_json_or_not_here(client: TestClient) -> None:
    for body in (b"{", b"[1]", b"null", b"\xff", b'{"a":' * 100_000, b'{"prompt": NaN}', b'{"prompt":"\\ud800"}'):
        assert_error(
            client.post("/v1/completions", content=body),
            400,
            client.post("/v1/completions", content=body).json()["error"]["param"],
        )
    assert_error(client.post("/v1/embeddings", json={}), 404, words="generates text only")
    assert_error(client.get("/nothing"), 404)
    assert_error(client.get("/v1/completions"), 405)


def test_a_failed_generation_is_an_error(client: TestClient, service: Service) -> None:
    service.batcher.failure = "the model gives nan"
    for stream in (False, True):
        assert_error(complete(client, stream=stream), 500, words="the model gives nan")


def test_a_model_without_a_template_has_no_chats(llama: Path, tmp_path: Path) -> None:
    service = make_service(make_engine(llama, tmp_path, template=""))
    with TestClient(make_app(service, Limits())) as client:
        assert complete(client).status_code == 200
        assert client.get("/version").json()["has_chat_template"] is False
        assert_error(chat(client), 400, "messages", "use /v1/completions")


def test_a_full_server_says_when_to_come_back(engine: matquant.Engine) -> None:
    service = make_service(engine, batcher=OneByOne(engine, most=1))
    with TestClient(make_app(service, Limits())) as client:
        for stream in (False, True):
            response = complete(client, n=2, stream=stream)
            assert_error(response, 429)
            assert response.headers["retry-after"] == "2"
            deadline = time.monotonic() + 5
            while not service.batcher.handles[-1].ended.is_set():
                assert time.monotonic() < deadline, "the first of the two was not cancelled"
                time.sleep(0.005)
        assert complete(client).status_code == 200
        assert 'reason="max_num_queued_reqs"} 2.0' in client.get("/metrics").text


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    without_effect = {"model", "user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"}
    names = {*CHAT, *COMPLETION} - without_effect - {"best_of"}
    assert sorted(name for name in names if f"`{name}`" not in page) == []


# -------------------------------------------------------------------------------------------------------- disconnection


async def call(app: Any, body: dict[str, Any], *, leave_after: int) -> list[dict[str, Any]]:
    """Post a completion as an ASGI server does, and disconnect after so many messages were sent (0: at once)."""
    sent: list[dict[str, Any]] = []
    left = asyncio.Event()
    inputs = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inputs:
            return inputs.pop()
        if leave_after:
            await left.wait()
        else:
            await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            left.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": ""}
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_clients_that_left_are_cancelled(service: Service, stream: bool) -> None:
    service.batcher.delay_s = 0.02
    fields = {"prompt": "ab", "max_tokens": 50, "ignore_eos": True, "stream": stream, "n": 2}
    sent = asyncio.run(call(make_app(service, Limits()), fields, leave_after=4 if stream else 0))
    assert all(handle.cancelled.is_set() for handle in service.batcher.handles)
    assert service.active == 0
    assert len(sent) < 20
    service.batcher.stop(5)
    assert sum(int(generation.max_tokens) for generation in service.batcher.seen) == 100


async def stream_and(service: Service, work: Any, **fields: Any) -> str:
    """The body of a streamed completion, beside which ``work`` is awaited."""
    fields = {"prompt": "ab", "max_tokens": 50, "ignore_eos": True, "stream": True, **fields}
    answer = asyncio.ensure_future(call(make_app(service, Limits()), fields, leave_after=10**6))
    await asyncio.sleep(0.1)
    await work
    return b"".join(message.get("body", b"") for message in await answer).decode()


def test_answers_that_outlast_the_drain_end_as_aborted(service: Service) -> None:
    service.batcher.delay_s = 0.05
    body = asyncio.run(stream_and(service, drain(service, 0.0)))
    last = json.loads(body.split("\n\n")[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "abort"
    assert body.endswith("data: [DONE]\n\n")
    assert service.active == 0


def test_a_slow_stream_is_kept_open(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PING_S", 0.01)
    service.batcher.delay_s = 0.05
    body = asyncio.run(stream_and(service, asyncio.sleep(0), max_tokens=3))
    assert body.count(": ping\n\n") >= 3
    assert body.count('"finish_reason":"length"') == 1


# --------------------------------------------------------------------------------------------------------------- limits


def test_a_key_is_needed_where_one_is_set(service: Service) -> None:
    with TestClient(make_app(service, Limits(api_keys=("secret", "other")))) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer é".encode()},
        ):
            response = client.get("/v1/models", headers=headers)
            assert_error(response, 401)
        for key in ("secret", "other"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200
        assert client.get("/metrics").status_code == 401


def test_large_bodies_are_rejected_before_they_are_read(service: Service) -> None:
    with TestClient(make_app(service, Limits(body_bytes=1000))) as client:
        assert_error(complete(client, prompt="x" * 1000), 413)
        assert_error(client.post("/v1/completions", content=iter([b"x" * 600, b"x" * 600])), 413)
        assert complete(client).status_code == 200


def test_other_hosts_and_origins_are_rejected_unless_allowed(service: Service) -> None:
    origin = {"origin": "https://example.com"}
    with TestClient(make_app(service, Limits(hosts=("localhost",))), base_url="http://localhost:8000") as client:
        assert client.get("/v1/models").status_code == 200
        assert_error(client.get("/v1/models", headers={"host": "evil.example"}), 403)
        assert_error(client.get("/v1/models", headers=origin), 403)
        assert client.get("/v1/models", headers={"origin": "http://localhost:8000"}).status_code == 200
    with TestClient(make_app(service, Limits(origins=("https://example.com",)))) as client:
        response = client.get("/v1/models", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://example.com"
        assert_error(client.get("/v1/models", headers={"origin": "https://other.example"}), 403)


warm()  # the process that renders templates starts while the model is made
