"""The seam between choosing ids and everything around it: a decoder asked for nothing computes nothing."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from matquant.engine.decoder import StepByStep
from matquant.engine.sampling import Sampling, choose

WIDTHS = np.array([4], dtype=np.uint8)


class Counting:
    """A session whose next token is always the last one plus one; it records what it is asked."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[int] = []
        self.calls: list[str] = []

    def begin(self, ids: Sequence[int], widths: np.ndarray) -> tuple[int, np.ndarray]:
        assert widths is WIDTHS
        self.ids = list(ids)
        self.calls.append("begin")
        return 7, self._logits()

    def advance(self, token: int, widths: np.ndarray, *, turn: int) -> np.ndarray:
        assert widths is WIDTHS
        assert turn == 7
        assert len(self.ids) < self.capacity, "no room"
        self.ids.append(token)
        self.calls.append("advance")
        return self._logits()

    def _logits(self) -> np.ndarray:
        return np.eye(50, dtype=np.float32)[(self.ids[-1] + 1) % 50]


def start(session: Counting, **options: float) -> StepByStep:
    decoder = StepByStep(session, [3, 4], widths=WIDTHS, sampling=Sampling(**options))  # type: ignore[arg-type]
    assert session.calls == []
    decoder.start()
    return decoder


def test_ids_come_until_the_session_is_full_and_the_last_one_needs_no_room() -> None:
    session = Counting(6)
    assert list(start(session)) == [5, 6, 7, 8, 9]
    assert session.ids == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_step_is_computed_only_when_its_id_is_asked_for(taken: int) -> None:
    session = Counting(20)
    assert list(itertools.islice(start(session), taken)) == [5, 6, 7][:taken]
    assert session.calls == ["begin"] + ["advance"] * (taken - 1)


def test_a_full_session_still_gives_the_one_id_that_its_logits_say() -> None:
    session = Counting(2)
    assert list(start(session)) == [5]
    assert session.calls == ["begin"]


def test_the_seed_decides_and_one_number_is_drawn_for_each_id() -> None:
    def draw(seed: int) -> list[int]:
        return list(start(Counting(12), temperature=1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    generator, sampling = np.random.default_rng(1), Sampling(temperature=1.0, seed=1)
    ids = [3, 4]
    for _ in range(11):
        ids.append(choose(np.eye(50, dtype=np.float32)[(ids[-1] + 1) % 50], sampling, generator))
    assert draw(1) == ids[2:]


def test_starting_comes_first() -> None:
    with pytest.raises(AssertionError, match="start first"):
        next(iter(StepByStep(Counting(4), [1], widths=WIDTHS, sampling=Sampling())))
