"""Speculation: whatever drafts, the ids are those of one step per token, and the session ends in the same state."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conftest
import matquant
from matquant.engine import pace as pacing
from matquant.engine.chat import Conversation
from matquant.engine.decoder import StepByStep
from matquant.engine.lookup import Lookup
from matquant.engine.pace import Pace
from matquant.engine.sampling import Sampling
from matquant.engine.speculation import Draft, Numbers, Speculative
from matquant.system.errors import InputError, InUseError

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
PROMPT = "Once upon a time, there was a cat. Once upon a time, there"
VOCAB = 50
TARGET, NARROW = np.array([8], dtype=np.uint8), np.array([2], dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(REFERENCE, tmp_path_factory.mktemp("speculation") / "model", method="rtn", scope="all")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> matquant.Engine:
    return matquant.Engine(checkpoint, threads=1)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" drafts for models of any size, and whether it pays or not."""
    monkeypatch.setattr(pacing, "SHORTEST_S", 0.0)
    monkeypatch.setattr(pacing, "GAIN", 0.0)


def assert_same(engine: matquant.Engine, *, speculate: str | int, **options: Any) -> matquant.engine.engine.Completion:
    """Compare text, ids, reason and the session's tokens with and without speculation; return the latter's reply."""
    found = []
    for how in ("off", speculate):
        session = engine.session(options.get("capacity", 200))
        rest = {name: value for name, value in options.items() if name != "capacity"}
        reply = engine.stream(PROMPT, session=session, speculate=how, **rest)
        text = "".join(reply)
        found.append((text, reply.ids, reply.tokens, reply.reason, session.ids))
    assert found[1] == found[0]
    return reply


# --------------------------------------------------------------------------------------------------- a scripted session


class Scripted:
    """A session whose next id is a fixed function of the ids so far; a narrow step is wrong as often as ``lies``."""

    def __init__(self, capacity: int, lies: float = 0.0) -> None:
        self.capacity = capacity
        self.lies = lies
        self.ids: list[int] = []
        self.cache: list[tuple[int, str]] = []  # of each place: id, and the width that computed it
        self.wide = self.narrow = 0
        self._generator = np.random.default_rng(0)

    def begin(self, ids: Sequence[int], widths: np.ndarray) -> tuple[int, np.ndarray]:
        self.ids = list(ids)
        self.cache = [(token, "wide") for token in ids]
        return 7, self._logits(self.ids)

    def advance(self, token: int, widths: np.ndarray, *, turn: int) -> np.ndarray:
        assert len(self.ids) < self.capacity, "no room"
        self.ids.append(token)
        self.wide += 1
        return self._logits(self.ids)

    def attempt(self, ids: Sequence[int], widths: np.ndarray, *, ahead: int, turn: int) -> np.ndarray:
        at, width = len(self.ids) + ahead, "wide" if widths is TARGET else "narrow"
        assert turn == 7
        assert at <= len(self.cache), "a gap in the cache"
        assert at + len(ids) <= self.capacity, "no room"
        assert all(kept == (token, "wide") for kept, token in zip(self.cache, self.ids, strict=False))
        assert ahead == 0 or width == "narrow"
        self.wide, self.narrow = self.wide + (width == "wide"), self.narrow + (width == "narrow")
        self.cache[at:] = [(token, width) for token in ids]
        into = np.empty((len(ids), VOCAB), dtype=np.float32)
        for row in range(len(ids)):
            known = [token for token, _ in self.cache[: at + row + 1]]
            into[row] = self._logits(known)
            if width == "narrow" and self._generator.random() < self.lies:
                into[row] = np.roll(into[row], 1)
        return into

    def keep(self, token: int, *, turn: int) -> None:
        assert self.cache[len(self.ids)] == (token, "wide"), "not what the step at the requested width computed"
        self.ids.append(token)

    def _logits(self, ids: Sequence[int]) -> np.ndarray:
        seed = 31 * ids[-1] + 7 * ids[-2] + len(ids) % 3
        return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 4


class Nothing:
    """Prompt lookup that finds nothing."""

    def extend(self, ids: Sequence[int]) -> None: ...

    def find(self) -> str:
        return ""

    def propose(self, count: int) -> list[int]:
        raise AssertionError


def speculative(
    session: Scripted, pace: Pace, *, lookup: Any = None, most: int = 10**6, **sampling: Any
) -> Iterator[int]:
    drafts = {"int2": NARROW}
    decoder = Speculative(
        session,
        [3, 4],
        widths=TARGET,
        sampling=Sampling(**sampling),
        drafts=drafts,
        pace=pace,
        most=most,
        lookup=lookup,
    )
    decoder.start()
    return iter(decoder)


def plain(capacity: int, **sampling: Any) -> list[int]:
    decoder = StepByStep(Scripted(capacity), [3, 4], widths=TARGET, sampling=Sampling(**sampling))
    decoder.start()
    return list(decoder)


@pytest.mark.parametrize("lies", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_are_those_of_one_step_per_token(lies: float, length: int, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5}
    for capacity in (2, 3, 5, 9, 60):
        session = Scripted(capacity, lies)
        found = list(speculative(session, Pace({"int2": 0.3}, length=length), **options))
        assert found == plain(capacity, **options)
        assert session.ids == [3, 4, *found[:-1]], "the last id takes no room"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_right_drafter_saves_steps_and_a_lying_one_none(temperature: float) -> None:
    """When sampling, a right drafter is accepted only if it takes the number that its position will use."""
    wide = []
    for lies in (0.0, 1.0):
        session = Scripted(82, lies)
        pace = Pace({"int2": 0.3}, length=3)
        list(speculative(session, pace, lookup=Nothing(), temperature=temperature, seed=4))
        wide.append(session.wide)
    assert wide[0] <= 3 + 20
    assert wide[1] >= 75


@pytest.mark.parametrize("taken", [1, 2, 6, 9])
def test_a_session_stopped_inside_a_draft_holds_what_it_would_hold_without(taken: int) -> None:
    session = Scripted(60)
    found = list(itertools.islice(speculative(session, Pace({"int2": 0.3}, length=7)), taken))
    assert session.ids == [3, 4, *found[:-1]]


def test_nothing_is_drafted_beyond_the_tokens_that_will_be_taken() -> None:
    session = Scripted(60)
    list(itertools.islice(speculative(session, Pace({"int2": 0.3}, length=7), lookup=Nothing(), most=8), 8))
    assert session.narrow <= 8


def test_logits_that_are_not_finite_end_a_draft_and_nothing_else() -> None:
    class Broken(Scripted):
        def attempt(self, ids: Sequence[int], widths: np.ndarray, **rest: Any) -> np.ndarray:
            logits = super().attempt(ids, widths, **rest)
            if widths is NARROW:
                logits[:] = np.nan
            return logits

    assert list(speculative(Broken(30), Pace({"int2": 0.3}, length=3))) == plain(30)


def test_numbers_looked_at_come_again_in_order() -> None:
    expected = np.random.default_rng(3).random(9).tolist()
    numbers = Numbers(3)
    assert [numbers.peek(2), numbers.peek(0), numbers.random(), numbers.peek(0)] == [
        expected[2],
        expected[0],
        expected[0],
        expected[1],
    ]
    assert [numbers.random() for _ in range(8)] == expected[1:]


# ---------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_equal_at_every_width(bits: int, temperature: float, engine: matquant.Engine, always: None) -> None:
    for speculate in ("auto", 1, 3, 7):
        reply = assert_same(engine, bits=bits, speculate=speculate, temperature=temperature, seed=2, max_tokens=24)
        assert 0 <= reply.accepted <= reply.drafted
        if speculate == 3 and bits > 2:  # at int2 only prompt lookup drafts
            assert reply.drafted > 0
            assert reply.steps + reply.accepted == reply.tokens - 1


def test_text_is_equal_with_a_plan_and_with_float_activations(checkpoint: Path, engine: matquant.Engine) -> None:
    plan = matquant.Plan(default=6, bits={"model.layers.0.mlp.down_proj": 3, "model.layers.1.mlp.up_proj": 2})
    exact = matquant.Engine(checkpoint, threads=1, activations="float")
    for served in (engine, exact):
        assert assert_same(served, plan=plan, speculate=3, max_tokens=24, top_k=20, temperature=1.0).drafted > 0
        assert assert_same(served, bits=8, speculate=3, max_tokens=16, temperature=0.0).accepted > 0


def test_ends_are_the_same_inside_a_draft(engine: matquant.Engine) -> None:
    text = engine.generate(PROMPT, max_tokens=40)
    for start in range(3, 25, 3):
        assert assert_same(engine, speculate=7, max_tokens=40, stop=[text[start : start + 4]]).reason == "stop"
    for count in (1, 2, 5, 11):
        assert assert_same(engine, speculate=7, max_tokens=count).reason == "length"
    full = len(engine.prompt_ids(PROMPT))
    for more in (0, 1, 4, 10):
        assert assert_same(engine, speculate=7, max_tokens=40, capacity=full + more).tokens == more + 1
    ids = engine.stream(PROMPT, max_tokens=12)
    list(ids)
    ended = matquant.Engine(engine.path, threads=1)
    ended.__dict__["ends"] = frozenset([ids.ids[-5]])
    assert assert_same(ended, speculate=7, max_tokens=40).reason == "stop"


def test_a_session_goes_on_after_an_abandoned_draft_as_if_there_had_been_none(engine: matquant.Engine) -> None:
    logits = []
    for how in ("off", 7):
        session = engine.session(200)
        list(itertools.islice(engine.stream(PROMPT, session=session, speculate=how, max_tokens=40), 3))
        assert session.match([*session.ids, 1]) == len(session.ids)
        logits.append(session.extend([5, 6, 7], engine.widths(8), all_logits=True))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_another_use_of_the_session_ends_a_completion(engine: matquant.Engine) -> None:
    session = engine.session(200)
    reply = iter(engine.stream(PROMPT, session=session, speculate=7, max_tokens=60))
    next(reply)
    session.rewind(2)
    with pytest.raises(InUseError, match="one session per completion"):
        list(reply)


def test_a_conversation_is_the_same(engine: matquant.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "_render", lambda self, messages: "\n".join(m["content"] for m in messages))
    said = []
    for how in ("off", 3):
        talk = Conversation(engine, context=200, speculate=how, max_tokens=20)
        for question, bits in (("Once there was a dog.", 8), ("The dog was", 4), ("It had", 8)):
            talk.bits = bits
            said.append("".join(reply := talk.ask(question)))
            talk.answered(said[-1])
    assert reply.drafted > 0
    assert said[:3] == said[3:]


def test_a_model_with_short_steps_drafts_nothing_by_itself(
    engine: matquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SHORTEST_S", 10.0)
    assert assert_same(engine, speculate="auto", max_tokens=30).drafted == 0


@pytest.mark.parametrize("value", ["", "on", "3", 0, 8, -1])
def test_other_values_of_speculate_are_rejected(value: str | int, engine: matquant.Engine) -> None:
    with pytest.raises(InputError) as caught:
        engine.stream(PROMPT, speculate=value)
    assert str(caught.value) == (
        f"speculate={value!r} is not known; use 'auto', 'off' or a number of tokens to draft from 1 to 7"
    )


# ------------------------------------------------------------------------------------------------------ lookup and pace


def test_lookup_copies_what_followed_last_time() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 8, 2, 3])
    assert (lookup.find(), lookup.propose(3)) == ("lookup2", [4, 5, 8])
    lookup.extend([4])
    assert (lookup.find(), lookup.propose(2)) == ("lookup3", [5, 8])
    lookup.extend([7])
    assert lookup.find() == ""


def test_lookup_goes_on_with_a_repetition() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3] * 4)
    assert (lookup.find(), lookup.propose(7)) == ("lookup8", [1, 2, 3, 1, 2, 3, 1])


COST = {1: 0.010, 2: 0.0102, 4: 0.0105, 8: 0.012, "int2": 0.0025, "int4": 0.005, "lookup3": 0.0}  # seconds


class Machine:
    """A clock that steps move on, and drafters of known acceptance: the tokens per second of ``Pace``."""

    def __init__(self, acceptance: dict[str, float]) -> None:
        self.now = 0.0
        self.acceptance = acceptance
        self.generator = np.random.default_rng(0)
        self.lengths: list[int] = []
        self.sources: list[str] = []
        self.load = 1.0

    def spend(self, pace: Pace, rows: int, source: str = "") -> None:
        seconds = COST[source or pacing.PANEL_OF[rows]] * self.load
        self.now += seconds
        pace.times.spent(seconds, rows=rows, source=source)

    def run(self, pace: Pace, tokens: int, found: str = "") -> float:
        began, made = self.now, 0
        while made < tokens:
            source, length = pace.choose(found, 100)
            drafted, chance = 0, 1.0
            while drafted < length and (source == found or not drafted or pace.goes_on(source, chance, drafted)):
                if source != found:
                    self.spend(pace, 1, source)
                chance *= pace.chance(source, 0.8)
                drafted += 1
            right = [self.generator.random() < self.acceptance[source] for _ in range(drafted)]
            accepted = len(list(itertools.takewhile(bool, right)))
            self.spend(pace, drafted + 1)
            pace.judged(source, [0.8] * drafted, accepted=accepted)
            self.lengths.append(drafted)
            self.sources.append(source)
            made += accepted + 1
        return made / (self.now - began)


def test_a_drafter_that_always_lies_costs_little_after_64_tokens() -> None:
    machine = Machine(dict.fromkeys(("int2", "int4", "lookup3"), 0.0))
    pace = Pace({"int2": 0.25, "int4": 0.5})
    machine.run(pace, 64, found="lookup3")
    assert machine.run(pace, 1000, found="lookup3") > 95


def test_drafts_that_do_not_pay_are_hardly_made_and_weighed_only_after_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs make steps up to twice as long: a plain step then takes longer than eight rows did before."""
    weighed, weigh = [], pacing._weigh
    monkeypatch.setattr(pacing, "_weigh", lambda *given: (weighed.append(given), weigh(*given))[1])
    machine = Machine(dict.fromkeys(("int2", "int4", "lookup3"), 0.0))
    pace = Pace({"int2": 0.25, "int4": 0.5})
    machine.run(pace, 300, found="lookup3")
    machine.lengths.clear()
    weighed.clear()
    for number in range(80):
        machine.load = 2 - abs(number % 40 - 20) / 20
        machine.run(pace, 10, found="lookup3")
    drafts = sum(length > 0 for length in machine.lengths)
    assert 10 < drafts < 26, "a probe every 64 tokens, and few others"
    assert len(weighed) <= drafts * len(pacing.LENGTHS) * 3, "each length, with each source and without"


def test_tokens_that_are_found_but_not_drafted_count_for_acceptance() -> None:
    """A text begins to repeat itself after 300 tokens of which none was as found."""
    machine = Machine({"lookup3": 0.0})
    pace = Pace()
    machine.run(pace, 300, found="lookup3")
    found = []
    for _ in range(20):
        source, count = pace.choose("lookup3", 7)
        found.append(source)
        if source:
            break
        machine.spend(pace, 1)
        Draft(pace, [5], source, count, found="lookup3").judge(0, 5)
    assert found[0] == ""
    assert found[-1] == "lookup3"
    for _ in range(20):
        Draft(pace, [5], "", 0, found="lookup3").judge(0, 6)
    assert pace.choose("lookup3", 7) == ("", 0)


@pytest.mark.parametrize("acceptance", [0.95, 0.8, 0.6, 0.3])
def test_the_speed_is_that_of_the_cost_model(acceptance: float) -> None:
    machine = Machine({"": 0.0, "int2": acceptance, "int4": acceptance})
    best = max(
        sum(acceptance**place for place in range(length + 1))
        / (length * COST["int2"] + COST[{0: 1, 1: 2, 3: 4, 7: 8}[length]])
        for length in (0, 1, 3, 7)
    )
    assert 0.9 * best < machine.run(Pace({"int2": 0.25, "int4": 0.5}), 3000) < 1.05 * best


def test_the_width_that_pays_is_found_and_a_change_is_noticed() -> None:
    machine = Machine({"int2": 0.1, "int4": 0.95})
    pace = Pace({"int2": 0.25, "int4": 0.5})
    machine.run(pace, 600)
    assert machine.sources[-100:].count("int4") > 80
    machine.acceptance.update(int2=0.98, int4=0.0)
    machine.run(pace, 2500)
    assert machine.sources[-100:].count("int2") > 80
