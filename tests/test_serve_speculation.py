"""Speculation in the server: answers are those without it, whoever else is served and whatever drafts."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from starlette.testclient import TestClient

import matquant
from http_service import chat, complete, events, make_engine, make_service
from matquant.core.spec import Plan
from matquant.engine import pace as pacing
from matquant.engine.lookup import Lookup
from matquant.engine.pace import Pace, Times, Wish, choose_together
from matquant.engine.sampling import Sampling
from matquant.serve import stepping
from matquant.serve.admission import Limits
from matquant.serve.app import make_app
from matquant.serve.batching import Batching, start
from matquant.serve.limits import Limits as HttpLimits
from matquant.serve.scheduling import Group, Piece
from matquant.serve.structured import Grammars
from matquant.serve.work import Generation
from serving import COSTS, PATIENT_S, Gate, Receiver, alone, generation, reference_engine, run, starting

TEXT = "Once upon a time, there was a little dog. Once upon a time, there was"
PLAN = Plan(default=4, bits={"model.layers.0.mlp.down_proj": 8, "model.layers.1.self_attn.q_proj": 2})
SAMPLED = Sampling(temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return reference_engine(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def ids(engine: matquant.Engine) -> list[int]:
    return engine.prompt_ids(TEXT)


@pytest.fixture
def serve(engine: matquant.Engine) -> Iterator[Callable[..., Batching]]:
    """start() with options, stopped at the end."""
    with starting(engine, speculate=7) as get:
        yield get


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[int], int]]:
    """Of every native step: its rows, the numbers of its requests, and how many of its rows want logits."""
    seen: list[tuple[int, set[int], int]] = []
    compute = stepping.Stepper.run

    def spy(self: stepping.Stepper, group: Group) -> np.ndarray:
        rows = len(group.tokens)
        seen.append((rows, {piece.slot.number for piece in group.pieces}, rows - group.first_logit))
        return compute(self, group)

    monkeypatch.setattr(stepping.Stepper, "run", spy)
    return seen


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" drafts for models of any size, and whether it pays or not."""
    monkeypatch.setattr(pacing, "SHORTEST_S", 0.0)
    monkeypatch.setattr(pacing, "GAIN", 0.5)


def drafted(batcher: Batching) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    stats = batcher.stats()
    return int(stats.get("draft_tokens", 0)), int(stats.get("accepted_tokens", 0))


# ---------------------------------------------------------------------------------------------------------- same text


@pytest.mark.parametrize("plan", [Plan(default=8), Plan(default=3), Plan(default=2), PLAN], ids=["8", "3", "2", "plan"])
@pytest.mark.parametrize("speculate", ["auto", 1, 3, 7])
def test_text_is_that_of_the_engine(
    serve: Callable[..., Batching],
    engine: matquant.Engine,
    ids: list[int],
    plan: Plan,
    speculate: str | int,
    always: None,
) -> None:
    samplings = (Sampling(), SAMPLED, Sampling(temperature=1.1, top_k=40, top_p=0.9, seed=2))
    batcher = serve(speculate=speculate)
    for sampling in samplings:
        one = generation(ids, plan=plan, sampling=sampling, ends=engine.ends, max_tokens=20)
        got = run(batcher, one)[0]
        assert (got.tokens[:-1] if got.finish == "stop" else got.tokens) == alone(engine, one)
        assert set(got.bits) == {"plan" if plan.bits else str(plan.default)}
    count, accepted = drafted(batcher)
    assert count >= accepted >= (plan.default != 2)  # at int2 prompt lookup alone drafts


def mixed(ids: list[int], count: int) -> list[Generation]:
    """Generations at several widths, greedy and sampled, of several lengths."""
    plans = [Plan(default=8), Plan(default=4), PLAN]
    return [
        generation(
            ids[number % 3 :] + ids[: 2 * number],
            plan=plans[number % len(plans)],
            max_tokens=4 + 5 * (number % 5),
            sampling=Sampling() if number % 2 else Sampling(temperature=1.0, top_p=0.95, seed=number),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("speculate", ["auto", 3])
def test_a_mixed_load_is_bit_equal_to_each_request_alone(
    serve: Callable[..., Batching],
    engine: matquant.Engine,
    ids: list[int],
    speculate: str | int,
    groups: list[tuple[int, set[int], int]],
    always: None,
) -> None:
    requests = mixed(ids, 17)
    batcher = serve(speculate=speculate, chunk=16)
    assert [got.tokens for got in run(batcher, *requests)] == [alone(engine, one) for one in requests]
    assert drafted(batcher)[1] > 0
    assert any(len(numbers) > 4 for _, numbers, _ in groups)  # at first more than may draft


def test_two_to_four_sequences_draft_and_five_do_not(
    serve: Callable[..., Batching],
    engine: matquant.Engine,
    ids: list[int],
    groups: list[tuple[int, set[int], int]],
) -> None:
    for count in (1, 2, 3, 4, 5):
        requests = [generation(ids[number:], bits=8, max_tokens=12) for number in range(count)]
        batcher = serve()
        groups.clear()
        assert [got.tokens for got in run(batcher, *requests)] == [alone(engine, one) for one in requests]
        verified = [wanted for rows, numbers, wanted in groups if len(numbers) == count and rows == wanted > count]
        assert max(verified, default=0) == {1: 8, 2: 8, 3: 6, 4: 8, 5: 0}[count]


def test_nothing_is_drafted_while_a_prompt_is_read(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher, receiver, gate = serve(chunk=4), Receiver(), Gate()
    batcher.submit(generation(ids, bits=8, max_tokens=8, constraint=gate), receiver)
    gate.reached.wait(PATIENT_S)
    reading = Receiver()
    batcher.submit(generation((ids * 9)[:64], bits=4, max_tokens=1), reading)
    gate.open.set()
    receiver.wait()
    reading.wait()
    assert drafted(batcher) == (0, 0)


def test_a_text_is_the_same_when_the_width_changes_within_it(serve: Callable[..., Batching], ids: list[int]) -> None:
    pattern = [8] * 6 + [4] * 2 + [8] + [2] * 4 + [4] * 11
    one = generation(ids, sampling=SAMPLED)
    plain, fast = (
        run(serve(speculate=speculate, force=lambda _, number: pattern[number]), one)[0] for speculate in ("off", 7)
    )
    assert (fast.tokens, fast.bits) == (plain.tokens, plain.bits)
    assert plain.bits == [str(bits) for bits in pattern]
    assert any(event.accepted for event in fast.events)


# ----------------------------------------------------------------------------------------------- from logits to tokens


class Even:
    """Only even tokens; it notes those that it took."""

    ended = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self, logits: np.ndarray) -> None:
        logits[1::2] = -np.inf
        logits[(self.taken[-1] if self.taken else 0) // 2 * 2] = -np.inf  # and none twice in a row

    def accept(self, token: int) -> None:
        self.taken.append(token)

    def copy(self) -> "Even":
        ahead = Even()
        ahead.taken += self.taken
        return ahead

    def allowed(self, tokens: Sequence[int]) -> int:
        pairs = zip([self.taken[-1] if self.taken else 0, *tokens], tokens, strict=False)
        return next((place for place, (a, b) in enumerate(pairs) if b % 2 or a == b), len(tokens))

    def forced(self) -> list[int]:
        return []


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.05, "logit_bias": {40: 3.5}},
        {"presence_penalty": 0.3, "frequency_penalty": 0.2, "sampling": SAMPLED},
        {"min_tokens": 12},
        {"constraint": True},
        {"constraint": True, "sampling": SAMPLED},
        {"prompt_logprobs": True},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 5},
    ],
    ids=["bias", "presence", "min", "grammar", "sampled-grammar", "echo", "1", "2", "5"],
)
def test_events_are_those_without_drafts(
    serve: Callable[..., Batching], ids: list[int], options: dict[str, Any]
) -> None:
    """Tokens, log-probabilities, widths and endings; and a constraint takes the tokens of the answer only."""
    found = []
    end = run(serve(speculate="off"), generation(ids, bits=8))[0].tokens[9]
    for speculate in ("off", 7):
        constraint = Even() if "constraint" in options else None
        one = generation(ids, bits=8, logprobs=3, ends=frozenset([end]), **{**options, "constraint": constraint})
        got = run(serve(speculate=speculate), one)[0]
        found.append(
            [(event.token, event.bits, event.prompt, event.cached_tokens, event.finish) for event in got.events]
        )
        if constraint is not None:
            assert constraint.taken == [token for token in got.tokens if token != end]
    assert found[0] == found[1]


@pytest.mark.parametrize("source", ["steps", "lookup"])
def test_no_draft_is_what_the_constraint_excludes(
    serve: Callable[..., Batching], ids: list[int], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its mask a slice would draft odd tokens, and what was copied from the text may have them."""
    monkeypatch.setattr(Lookup, "find", lambda self: "lookup8" if source == "lookup" else "")
    monkeypatch.setattr(Lookup, "propose", lambda self, count: [40, 42, 41, 44][:count])
    batcher, constraint = serve(), Even()
    seen: list[list[int]] = []
    take = stepping.Stepper._choose

    def spy(self: stepping.Stepper, piece: Piece, logits: np.ndarray, drafts: Sequence[int], reason: str) -> None:
        before = constraint.copy()
        take(self, piece, logits, drafts, reason)
        seen.append(list(drafts))
        assert before.allowed(drafts) == len(drafts)

    monkeypatch.setattr(stepping.Stepper, "_choose", spy)
    got = run(batcher, generation(ids, bits=8, max_tokens=60, constraint=constraint))[0]
    assert got.finish == "length"
    if source == "lookup":
        assert {tuple(drafts) for drafts in seen} >= {(40, 42)}
    else:
        assert drafted(batcher)[1] > 20


def test_a_text_that_a_constraint_forces_is_drafted_without_steps(
    serve: Callable[..., Batching], engine: matquant.Engine, groups: list[tuple[int, set[int], int]]
) -> None:
    grammars = Grammars(
        engine.vocabulary.tokenizer.to_str(), vocab=engine.model.architecture.vocab, ends=sorted(engine.ends)
    )
    words = "The quick brown fox jumps over the lazy dog and then sleeps until noon."
    prompt = engine.prompt_ids("Write: ")
    for speculate, steps in (("off", (12, 99)), (7, (1, 6))):
        constraint = grammars.compile(LLMatcher.grammar_from_regex(re.escape(words)), param="regex")
        groups.clear()
        one = generation(prompt, bits=8, max_tokens=99, constraint=constraint, ends=engine.ends)
        tokens = run(serve(speculate=speculate), one)[0].tokens
        text = engine.vocabulary.tokenizer.decode([token for token in tokens if token not in engine.ends])
        assert text.strip() == words
        assert steps[0] <= len(groups) <= steps[1]


class Broken(Even):
    """A constraint whose drafts fail."""

    def copy(self) -> "Even":
        raise ValueError("no copy")

    def allowed(self, tokens: Sequence[int]) -> int:
        raise ValueError("no look ahead")


def test_a_constraint_that_cannot_look_ahead_is_not_drafted_for(serve: Callable[..., Batching], ids: list[int]) -> None:
    one = [generation(ids, bits=8, constraint=make()) for make in (Even, Broken)]
    even, broken = (run(serve(), each)[0] for each in one)
    assert (broken.tokens, broken.finish) == (even.tokens, "length")


def test_the_end_of_the_context_is_the_same(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    one = generation((ids * 40)[: engine.context - 5], bits=8, max_tokens=100)
    got = run(serve(), one)[0]
    assert (got.tokens, got.finish) == (alone(engine, one), "length")
    assert len(got.tokens) == 6


def test_only_verified_tokens_are_kept_for_later_prompts(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    for speculate in ("off", 7):
        batcher = serve(speculate=speculate)
        tokens = run(batcher, generation(ids, bits=8))[0].tokens
        more = generation(ids + tokens + ids[:3], bits=8, max_tokens=6)
        got = run(batcher, more)[0]
        assert (got.cached, got.tokens) == (len(ids) + len(tokens) - 1, alone(engine, more))


# ---------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def clients(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TestClient]]:
    """A server without speculation, and one with it."""
    engine = make_engine(llama, tmp_path_factory.mktemp("http"))
    batchers = [start(engine, costs=COSTS, policy=False, speculate=speculate) for speculate in ("off", 7)]
    yield [TestClient(make_app(make_service(engine, batcher=batcher), HttpLimits())) for batcher in batchers]
    for batcher in batchers:
        batcher.stop(0)


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "max_tokens": 30, "ignore_eos": True},
        {"temperature": 1, "seed": 3, "n": 3, "max_tokens": 20, "logprobs": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 12, "temperature": 0},
        {"structured_outputs": {"json": POINT}, "max_tokens": 30, "temperature": 1, "seed": 4, "n": 2},
    ],
    ids=["greedy", "n", "echo", "schema"],
)
def test_answers_are_those_without_drafts(clients: list[TestClient], fields: dict[str, Any]) -> None:
    off, on = (complete(client, **fields).json() for client in clients)
    assert on["choices"] == off["choices"]
    details = [answer["usage"].pop("completion_tokens_details") for answer in (off, on)]
    assert on["usage"] == off["usage"]
    assert on["matquant"] == off["matquant"]
    assert details[0] == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert sum(details[1].values()) > 0
    streamed = [events(complete(client, **fields, stream=True)) for client in clients]
    texts = [
        {
            index: "".join(c["text"] for event in found for c in event["choices"] if c["index"] == index)
            for index in (0, 1)
        }
        for found in streamed
    ]
    assert texts[0] == texts[1]


def test_stop_texts_end_inside_a_draft(clients: list[TestClient]) -> None:
    fields = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    text = complete(clients[0], **fields).json()["choices"][0]["text"]
    for place in range(3, 30, 5):
        stop = text[place : place + 3]
        off, on = (complete(client, **fields, stop=[stop]).json() for client in clients)
        assert on["choices"] == off["choices"]
        assert on["usage"]["completion_tokens"] == off["usage"]["completion_tokens"]
        assert on["choices"][0]["stop_reason"] == stop


def test_metrics_and_usage_count_drafts(clients: list[TestClient]) -> None:
    before = clients[1].get("/metrics").text
    details = chat(clients[1], max_tokens=30, temperature=0, ignore_eos=True).json()["usage"][
        "completion_tokens_details"
    ]
    after = clients[1].get("/metrics").text

    def grown(name: str) -> float:
        line = f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="tiny"}} '
        first, second = (float(text.split(line)[1].split()[0]) for text in (before, after))
        return second - first

    assert grown("accepted_tokens") == details["accepted_prediction_tokens"] > 0
    assert grown("draft_tokens") == sum(details.values()) >= grown("drafts") > 0


# --------------------------------------------------------------------------------------------------------------- speed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that native steps move, by the table of costs."""
    now = [0.0]
    compute = stepping.Stepper.run

    def spend(self: stepping.Stepper, group: Group) -> np.ndarray:
        logits = compute(self, group)
        now[0] += COSTS.step_s(group.width.bits, pacing.PANEL_OF[min(len(group.tokens), 8)])
        return logits

    monkeypatch.setattr(stepping.Stepper, "run", spend)
    return now


@pytest.fixture
def timed(engine: matquant.Engine, now: list[float]) -> Callable[..., float]:
    """Seconds that requests take from the 64th token on."""

    def measure(speculate: str, count: int, prompt: list[int]) -> float:
        batcher = Batching(engine, Limits(policy=False, speculate=speculate), costs=COSTS, clock=lambda: now[0])
        began: dict[int, float] = {}

        class Timed(Receiver):
            def __call__(self, found: Any) -> None:
                super().__call__(found)
                if len(self.tokens) >= 64:
                    began.setdefault(id(self), now[0])

        receivers = [Timed() for _ in range(count)]
        for number, receiver in enumerate(receivers):
            batcher.submit(generation([*prompt, number], bits=8, max_tokens=192), receiver)
        for receiver in receivers:
            receiver.wait()
        batcher.stop(0)
        return now[0] - min(began.values())

    return measure


@pytest.mark.parametrize("count", [1, 3])
def test_a_drafter_that_always_lies_costs_at_most_a_twentieth_after_64_tokens(
    timed: Callable[..., float], ids: list[int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = timed("off", count, ids)
    monkeypatch.setattr(Lookup, "find", lambda self: "lookup8" if self.ids else "")
    monkeypatch.setattr(Lookup, "propose", lambda self, number: [1] * number)
    monkeypatch.setattr("matquant.engine.speculation.pick", lambda logits, sampling, number: 1)
    assert plain < timed("auto", count, ids) <= 1.05 * plain


def wish(times: Times, found: str = "", room: int = 7) -> Wish:
    return Wish(pace=Pace(times=times), found=found, room=room)


def table(source: str, rows: int) -> float:
    """Seconds of the server's table, at int8 or the width that drafts."""
    return COSTS.step_s({"": 8, "int2": 2}[source], rows)


def test_sequences_choose_what_yields_most_together() -> None:
    """Four rows take 0.044 s and eight 0.060: a single sure draft among four sequences does not pay, four do."""
    times = Times({"int2": 0.25}, table=table)
    assert choose_together([wish(times, "lookup8", 1)] + [wish(times, "", 1)] * 3) == [("", 0)] * 4
    assert choose_together([wish(times, "lookup8", 1)] * 4) == [("lookup8", 1)] * 4
    assert choose_together([wish(times, "lookup8")]) == [("lookup8", 7)]
    assert choose_together([wish(times)]) == [("int2", 7)]  # as far as Pace.goes_on says
    assert choose_together([wish(times, "lookup8", 0), wish(times, "", 0)]) == [("", 0)] * 2


def test_a_sequence_does_not_draft_by_steps_while_many_others_wait_for_it() -> None:
    times = Times({"int2": 0.25}, table=table)
    assert choose_together([wish(times, room=1)]) == [("int2", 1)]
    assert choose_together([wish(times, room=1)], beside=(3, 0.044)) == [("", 0)]


@pytest.mark.parametrize("speculate", ["off", 3])
def test_the_policy_keeps_a_width_that_meets_its_target_with_drafts(
    engine: matquant.Engine, ids: list[int], now: list[float], speculate: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step at int8 takes 40 ms, or 44 with three drafts, and the target is 30."""
    one = generation(ids, max_tokens=40)
    text = [*ids, *alone(engine, replace(one, plan=Plan(default=8)))]
    monkeypatch.setattr(Lookup, "find", lambda self: "lookup8")
    monkeypatch.setattr(Lookup, "propose", lambda self, count: text[len(self.ids) :][:count])
    limits = Limits(latency_s=0.030, widths=(8, 4), speculate=speculate)
    batcher = Batching(engine, limits, costs=COSTS, clock=lambda: now[0])
    bits = run(batcher, one)[0].bits
    batcher.stop(0)
    assert set(bits) == ({"8"} if speculate == 3 else {"8", "4"})
