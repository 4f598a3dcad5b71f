"""From logits to tokens: bias, penalties, ends, constraints and log-probabilities, against numpy written out."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import matquant
from matquant.engine.sampling import Sampling
from matquant.serve.batching import Batching, start
from matquant.serve.logits import log_probabilities, score
from matquant.serve.work import Generation
from matquant.system.errors import InputError
from serving import COSTS, alone, generation, reference_engine, run

TEXT = "Once upon a time, there was a little dog. The little dog was a little"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return reference_engine(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def batcher(engine: matquant.Engine) -> Iterator[Batching]:
    started = start(engine, costs=COSTS, policy=False)
    yield started
    started.stop(0)


@pytest.fixture(scope="module")
def ids(engine: matquant.Engine) -> list[int]:
    return engine.prompt_ids(TEXT)


class Even:
    """Only even tokens, at most ``most``."""

    def __init__(self, most: int = 10**6) -> None:
        self.most = most
        self.taken: list[int] = []

    def mask(self, logits: np.ndarray) -> None:
        logits[1::2] = -np.inf

    def accept(self, token: int) -> None:
        self.taken.append(token)

    @property
    def ended(self) -> bool:
        return len(self.taken) >= self.most


# ------------------------------------------------------------------------------------------------------------- oracle


def oracle(engine: matquant.Engine, one: Generation, bits: int) -> tuple[list[int], list[float], str]:
    """Greedy tokens and their log-probabilities, token by token and value by value; float32 where it decides."""
    session, widths = engine.session(len(one.ids) + one.max_tokens), engine.widths(bits)
    logits = session.extend(list(one.ids), widths)
    answer: list[int] = []
    logprobs: list[float] = []
    while True:
        values = [np.float32(value) for value in logits]
        for token, bias in one.logit_bias.items():
            values[token] += np.float32(bias)
        for token in set(one.ids) | set(answer):
            penalty = np.float32(one.repetition_penalty)
            values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
        for token in set(answer):
            values[token] -= np.float32(one.frequency_penalty) * np.float32(answer.count(token))
            values[token] -= np.float32(one.presence_penalty)
        for token in range(len(values)):
            is_early_end = token in one.ends and len(answer) < one.min_tokens
            if is_early_end or (one.constraint is not None and token % 2):
                values[token] = np.float32(-math.inf)
        token = values.index(max(values))
        exact = [float(value) for value in values]
        largest = max(exact)
        logprobs.append(exact[token] - largest - math.log(math.fsum(math.exp(value - largest) for value in exact)))
        answer.append(token)
        if token in one.ends:
            return answer, logprobs, "stop"
        if len(answer) == one.max_tokens:
            return answer, logprobs, "length"
        logits = session.extend([token], widths)


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 2.0, "frequency_penalty": 0.9},
        {"frequency_penalty": -2.0},
        {"logit_bias": {40: 9.5, 41: -100.0}},
        {"constraint": Even()},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
            "logit_bias": {7: 8.0, 300: 7.5},
        },
    ],
    ids=["plain", "repetition", "presence-frequency", "negative", "bias", "constraint", "all"],
)
def test_tokens_are_those_of_the_oracle(
    batcher: Batching, engine: matquant.Engine, ids: list[int], options: dict[str, Any], bits: int
) -> None:
    one = generation(ids, bits=bits, logprobs=2, max_tokens=32, **options)
    tokens, logprobs, finish = oracle(engine, one, bits)
    got = run(batcher, one)[0]
    assert (got.tokens, got.finish) == (tokens, finish)
    assert [event.token.logprob for event in got.events if event.token] == pytest.approx(logprobs, abs=2e-5)
    if not options:
        assert tokens == alone(engine, one)
    else:
        assert tokens != alone(engine, one)  # the options matter


def test_ends_and_their_least_tokens(batcher: Batching, engine: matquant.Engine, ids: list[int]) -> None:
    plain = alone(engine, generation(ids, bits=8, max_tokens=16))
    end = plain[4]
    first = plain.index(end)
    for least in (0, first + 1, first + 4, 12):
        one = generation(ids, bits=8, max_tokens=16, ends=frozenset({end}), min_tokens=least, logprobs=1)
        tokens, _, finish = oracle(engine, one, 8)
        got = run(batcher, one)[0]
        assert (got.tokens, got.finish) == (tokens, finish)
        assert end not in tokens[:least]
    got = run(batcher, generation(ids, bits=8, max_tokens=16, ends=frozenset({end})))[0]
    assert (got.tokens, got.finish) == (plain[: first + 1], "stop")  # the end itself is the last event's token


def test_a_constraint_that_has_ended_stops_the_answer(batcher: Batching, ids: list[int]) -> None:
    constraint = Even(5)
    got = run(batcher, generation(ids, bits=8, constraint=constraint))[0]
    assert (len(got.tokens), got.finish) == (5, "stop")
    assert constraint.taken == got.tokens


def test_a_request_that_excludes_every_token_ends_with_the_reason(batcher: Batching, ids: list[int]) -> None:
    class Nothing(Even):
        def mask(self, logits: np.ndarray) -> None:
            logits[:] = -np.inf

    got = run(batcher, generation(ids, bits=8, constraint=Nothing()))[0]
    assert got.finish == "error"
    assert "no token may come next: constraint, min_tokens and bias exclude all" in got.events[-1].reason


def test_the_same_seed_gives_the_same_text(batcher: Batching, ids: list[int]) -> None:
    def texts(*seeds: int) -> list[list[int]]:
        requests = [generation(ids, bits=4, sampling=Sampling(temperature=1.5, seed=seed)) for seed in seeds]
        return [got.tokens for got in run(batcher, *requests)]

    first, second, third = texts(7, 8, 7)
    assert first == third != second
    assert texts(7) == [first]


# -------------------------------------------------------------------------------------------------- log-probabilities


@given(
    logits=arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32)),
    top=st.integers(0, 45),
    place=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_the_most_probable_tokens_come_in_order(logits: np.ndarray, top: int, place: int) -> None:
    token = place % len(logits)
    scored = score(logits, token, top, choosable=len(logits))
    order = sorted(range(len(logits)), key=lambda index: (-log_probabilities(logits)[index], index))
    assert [index for index, _ in scored.top] == order[: max(1, min(top, len(logits)))]
    exact = logits.astype(np.float64)
    total = np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    np.testing.assert_allclose([p for _, p in scored.top], [exact[i] - total for i, _ in scored.top], atol=1e-4)
    assert (scored.logprob == scored.top[0][1]) == (log_probabilities(logits)[token] == log_probabilities(logits).max())


def test_tokens_of_probability_zero_are_not_among_the_most_probable() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 0.0], dtype=np.float32)
    assert [token for token, _ in score(logits, 1, 4, choosable=4).top] == [1, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_probabilities(value: float) -> None:
    with pytest.raises(InputError, match=f"the model gives logits of {value}"):
        score(np.array([0.0, value], dtype=np.float32), 0, 1, choosable=2)


@pytest.mark.parametrize("chunk", [5, 32])
def test_prompts_are_scored_as_the_engine_scores_them(engine: matquant.Engine, ids: list[int], chunk: int) -> None:
    batcher = start(engine, costs=COSTS, policy=False, max_batched_tokens=32, chunk=chunk)
    try:
        one = generation(ids, bits=4, prompt_logprobs=True, logprobs=1, max_tokens=2)
        others = [generation(ids[number:], bits=4) for number in range(3)]
        got = run(batcher, *others[:2], one, others[2])[2]
        prompt = got.events[0].prompt
        assert [scored.token for scored in prompt] == ids
        assert (prompt[0].logprob, prompt[0].top) == (None, ())
        expected = engine.score(ids, bits=4)
        assert [scored.logprob for scored in prompt[1:]] == pytest.approx(expected.tolist(), abs=1e-5)
        greedy = [scored.token == scored.top[0][0] for scored in prompt[1:]]
        assert greedy == [scored.logprob == max(p for _, p in scored.top) for scored in prompt[1:]]
        assert any(greedy)
        assert not all(greedy)
        assert got.tokens == alone(engine, generation(ids, bits=4, max_tokens=2))
        assert got.cached == 0  # every position's logits are computed
        assert [event.cached_tokens for event in got.events[1:]] == [None, None]
    finally:
        batcher.stop(0)


def test_a_prompt_is_scored_without_an_answer(batcher: Batching, engine: matquant.Engine, ids: list[int]) -> None:
    for prompt in (ids, ids[:1]):
        got = run(batcher, generation(prompt, bits=8, prompt_logprobs=True, max_tokens=0))[0]
        assert [len(event.prompt) for event in got.events] == [len(prompt), 0]
        assert (got.tokens, got.finish) == ([], "length")
