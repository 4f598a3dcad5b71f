"""The width by load: the cost table and the policy, with a scripted clock and load."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import conftest
import matquant
from cases import each
from matquant.core.spec import Plan
from matquant.serve.cost import Costs, drafting, measure
from matquant.serve.offers import offer
from matquant.serve.policy import GAIN, HOLD_S, LONGEST_HOLD_S, PATIENCE, Change, Load, Policy
from serving import COSTS

WIDTHS = (8, 4, 2)
TICK_S = 0.0625  # sums of it are exact
MEMORY_BOUND = Costs(seconds={bits: ((1, 0.01 * bits), (16, 0.01 * bits)) for bits in (8, 6, 4, 2)})
COMPUTE_BOUND = Costs(seconds={bits: ((1, 0.1), (16, 0.084 + 0.002 * bits)) for bits in (8, 6, 4, 2)})


def policy(costs: Costs = MEMORY_BOUND, widths: Sequence[int] = WIDTHS, *, latency_s: float = 0.05) -> Policy:
    return Policy(costs, widths, latency_s=latency_s, wait_s=2.0)


def play(
    one: Policy, load: Load, *, start_s: float, stop_s: float, every_s: float = TICK_S
) -> list[tuple[float, Change]]:
    """Show the same load again and again; return the changes and when they came."""
    changes, now_s = [], start_s
    while now_s < stop_s:
        change = one.observe(replace(load, now_s=now_s))
        if change is not None:
            changes.append((now_s, change))
        now_s += every_s
    return changes


# --------------------------------------------------------------------------------------------------------- cost table


@each(
    ("bits", "rows", "seconds"),
    [
        (8, 0, 0.0), (8, 1, 0.040), (8, 2.5, 0.042), (8, 16, 0.100), (8, 80, 0.390), (8, 256, 1.2), (4, 32, 0.180),
        (6, 4, 0.044), (3, 4, 0.024), (1, 4, 0.016),
    ],
)  # fmt: skip
def test_costs_between_and_beyond_measured_points(bits: int, rows: float, seconds: float) -> None:
    assert COSTS.step_s(bits, rows) == pytest.approx(seconds)


def test_a_width_above_all_costs_like_the_widest() -> None:
    assert Costs(seconds={4: ((1, 0.5),)}).step_s(8, 1) == 0.5


@pytest.fixture(scope="module")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return matquant.Engine(conftest.quantize(llama, tmp_path_factory.mktemp("costs") / "out", method="rtn"), threads=1)


def test_measured_costs_rise_with_rows_and_keep_to_the_budget(engine: matquant.Engine) -> None:
    ticks = iter(range(10**6))
    costs = measure(engine, (8, 4), most_rows=32, budget_s=50, clock=lambda: float(next(ticks)))
    assert {bits: [rows for rows, _ in points] for bits, points in costs.seconds.items()} == {
        8: [1, 2, 4, 8, 16, 32],
        4: [1, 2, 4, 8, 16],
    }
    assert next(ticks) < 2 * (2 + 11 * 2) + 10  # two rounds at most: a third would not have ended in time
    rising = [seconds for _, seconds in costs.seconds[8]]
    assert rising == sorted(rising)
    assert costs.to_json()["8"]["16"] == costs.step_s(8, 16)


def test_the_speeds_listed_are_those_of_the_table(engine: matquant.Engine) -> None:
    plans = {"mixed": Plan(default=3)}
    ticks = iter(range(10**6))
    costs = measure(engine, (8, 4), most_rows=1, plans=plans, clock=lambda: float(next(ticks)))
    assert costs == Costs(seconds={8: ((1, 1.0),), 4: ((1, 1.0),)}, plans={"mixed": 1.0})
    costs = Costs(seconds={8: ((1, 0.5),), 4: ((1, 0.25),)}, plans={"mixed": 0.2})
    models = offer(engine, name="tiny", widths=[4], plans=plans, context=9, costs=costs)
    assert models.tokens_per_s == {"8": 2.0, "4": 4.0, "mixed": 5.0}
    assert list(models.bits_per_weight) == [*"12345678", "mixed"]  # any of 1 to 8 can be asked for


def test_a_server_that_speculates_measures_the_widths_that_draft(engine: matquant.Engine) -> None:
    assert drafting((8, 6), engine) == (8, 6, 4, 3, 2)


# --------------------------------------------------------------------------------------------------------------- down


def test_the_width_goes_down_after_three_steps_over_the_target() -> None:
    one = policy()
    load = Load(now_s=0, auto=(1,))
    assert [one.observe(load) for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    change = one.observe(load)
    assert change == Change(
        before=8, after=4, cause="latency", reason="int8 to int4: 80 ms between tokens at int8, target 50"
    )
    assert (one.bits, change.direction) == (4, "down")
    assert play(one, load, start_s=1, stop_s=20) == []  # 40 ms: under the target, but int8 would not be


def test_steps_over_the_target_must_follow_each_other() -> None:
    one = policy(COSTS)
    slow, fast = Load(now_s=0, auto=(1,) * 8), Load(now_s=0, auto=(1,))
    for _ in range(20):
        assert [one.observe(load) for load in (slow, slow, fast)] == [None] * 3


def test_a_request_that_waits_too_long_lowers_the_width() -> None:
    one = policy(latency_s=1.0)
    changes = play(one, Load(now_s=0, auto=(1,), oldest_wait_s=2.5), start_s=0, stop_s=3 * TICK_S)
    assert [change.reason for _, change in changes] == ["int8 to int4: a request has waited 2.5 s, target 2.0"]


def test_a_gain_under_the_limit_is_not_taken() -> None:
    one = policy(COMPUTE_BOUND, (8, 6, 4, 2))
    assert play(one, Load(now_s=0, auto=(1,) * 16), start_s=0, stop_s=10) == []
    assert (one.bits, one.rejected) == (8, 1)  # 0.1 s against 0.088 s at int2
    just = Costs(seconds={8: ((1, GAIN),), 4: ((1, 1.0),)})
    assert policy(just, (8, 4)).predict_s(Load(now_s=0, auto=(1,)), 8) == GAIN
    assert len(play(policy(just, (8, 4)), Load(now_s=0, auto=(1,)), start_s=0, stop_s=1)) == 1


def test_the_widest_width_that_gains_enough_is_taken() -> None:
    costs = Costs(seconds={8: ((1, 1.0),), 6: ((1, 0.95),), 4: ((1, 0.8),), 2: ((1, 0.2),)})
    changes = play(policy(costs, (8, 6, 4, 2)), Load(now_s=0, auto=(1,)), start_s=0, stop_s=3 * TICK_S)
    assert [(change.before, change.after) for _, change in changes] == [(8, 4)]


def test_a_load_of_fixed_widths_or_prompts_does_not_lower_the_width() -> None:
    for load in (Load(now_s=0, fixed={8: 4}), Load(now_s=0, prompt_rows=128), Load(now_s=0, fixed={8: 9}, auto=(8,))):
        one = policy()
        assert play(one, load, start_s=0, stop_s=5) == []
        assert one.rejected == (1 if load.decoding else 0)  # where nothing decodes, nobody waits for a token


def test_prompts_give_way_before_widths_do() -> None:
    one, load = policy(COSTS, latency_s=0.25), Load(now_s=0, auto=(1,) * 8)
    assert one.prompt_rows(load, 32) == 32  # 40 rows of int8: 0.225 s
    assert one.prompt_rows(load, 5) == 5
    one.latency_s = 0.15
    assert one.prompt_rows(load, 32) == 16  # 24 rows: 0.14 s
    one.latency_s = 0.01
    assert one.prompt_rows(load, 32) == 8  # never less
    assert one.prompt_rows(replace(load, auto=()), 128) == 128  # no one waits for the step


def test_a_group_more_may_cost_more_than_it_gains() -> None:
    one = policy(COSTS, latency_s=0.01)
    together, apart = (one.predict_s(Load(now_s=0, auto=(1, 1), fixed={8: 1}), level) for level in (8, 4))
    assert together < apart  # int4 rows beside an int8 row are a second step


def test_the_least_bits_of_a_request_hold() -> None:
    one = policy(widths=(8, 6, 4, 2))
    one.bits = 2
    assert [one.bits_for(least) for least in (1, 2, 3, 4, 5, 6, 7, 8)] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert policy(widths=(4, 2)).bits_for(8) == 8  # no candidate, so the width itself


# ----------------------------------------------------------------------------------------------------------------- up


def lowered(costs: Costs = COSTS) -> Policy:
    one = policy(costs)
    play(one, Load(now_s=0, auto=(1,) * 8), start_s=0, stop_s=3 * TICK_S)
    assert one.bits < 8
    return one


def test_the_width_goes_up_when_the_load_has_been_low_for_two_seconds() -> None:
    one = lowered()
    before = one.bits
    changes = play(replace_latency(one, 0.06), Load(now_s=0, auto=(1,)), start_s=1.0, stop_s=5)
    assert changes == [
        (
            1.0 + HOLD_S,
            Change(before=before, after=8, cause="recovered", reason=f"int{before} to int8: the load has fallen"),
        )
    ]


def replace_latency(one: Policy, latency_s: float) -> Policy:
    one.latency_s = latency_s
    return one


def test_a_prediction_near_the_target_or_a_queue_keeps_the_width_down() -> None:
    near = replace_latency(lowered(), 0.049)  # int8 takes 40 ms, more than 0.8 of the target
    assert [change.after for _, change in play(near, Load(now_s=0, auto=(1,)), start_s=1, stop_s=20)] in ([], [4])
    queued = replace_latency(lowered(), 0.06)
    assert play(queued, Load(now_s=0, auto=(1,), oldest_wait_s=1.9), start_s=1, stop_s=20) == []


def test_an_idle_server_returns_to_the_widest_width() -> None:
    one = lowered()
    one.hold_s = LONGEST_HOLD_S
    changes = play(one, Load(now_s=0), start_s=1.0, stop_s=6, every_s=0.5)
    assert [(at, change.after) for at, change in changes] == [(1.0 + HOLD_S, 8)]


def test_one_interruption_starts_the_wait_again() -> None:
    one = replace_latency(lowered(), 0.06)
    low, high = Load(now_s=0, auto=(1,)), Load(now_s=0, auto=(1,) * 8)
    assert play(one, low, start_s=1, stop_s=2.875) == []
    one.observe(replace(high, now_s=2.875))
    changes = play(one, low, start_s=2.9375, stop_s=8)
    assert [at for at, _ in changes] == [2.9375 + HOLD_S]


# ------------------------------------------------------------------------------------------------------------- chatter


@each("period_s", [0.5, 1.0, 3.0, 5.0, 9.0])
def test_a_load_that_swings_does_not_make_the_width_chatter(period_s: float) -> None:
    """Two minutes of a load that is heavy for one half of a period, light for the other."""
    one = policy(COSTS, latency_s=0.055)
    changes = []
    for step in range(1920):
        now_s = step * TICK_S
        rows = 8 if now_s % period_s < period_s / 2 else 1
        change = one.observe(Load(now_s=now_s, auto=(1,) * rows))
        if change is not None:
            changes.append((now_s, change))
    assert len(changes) <= (1 if period_s / 2 < HOLD_S else 14)  # it would be two per period, up to 52
    rises = [now_s for now_s, change in changes if change.direction == "up"]
    gaps = [second - first for first, second in pairwise(rises)]
    assert gaps == sorted(gaps)  # each rise that was too early makes the next one wait longer


def test_a_steady_load_changes_the_width_once() -> None:
    for rows in range(1, 17):
        one = policy(COSTS, latency_s=0.05)
        changes = play(one, Load(now_s=0, auto=(1,) * rows), start_s=0, stop_s=60)
        assert len(changes) <= 2
        assert all(change.direction == "down" for _, change in changes)


def test_a_table_that_is_wrong_does_not_make_the_width_chatter() -> None:
    """int8 takes three times as long as the table says, int4 half as long; the policy learns from what it runs."""
    one = policy(COSTS, latency_s=0.05)
    factor = {8: 3.0, 4: 0.5, 2: 0.5}
    now_s, changes = 0.0, 0
    while now_s < 120:
        load = Load(now_s=now_s, auto=(1,) * 4)
        changes += one.observe(load) is not None
        native_s = factor[one.bits] * one.costs.step_s(one.bits, 4)
        one.learn(load, native_s=native_s, choosing_s=0.001)
        now_s += native_s
    assert changes <= 14


def test_predictions_learn_from_steps() -> None:
    one = policy()
    load = Load(now_s=0, auto=(1,))
    assert one.predict_s(load, 8) == 0.08
    for _ in range(100):
        one.learn(load, native_s=0.16, choosing_s=0.01)
    assert one.predict_s(load, 8) == pytest.approx(0.17, rel=1e-3)
    assert one.predict_s(load, 4) == pytest.approx(0.09, rel=1e-3)
    assert one.predict_s(Load(now_s=0), 8) == 0


def draft(one: Policy, load: Load, *, step_s: float, tokens: int, steps: int) -> Change | None:
    """Steps of which each takes ``step_s`` and yields ``tokens``, up to the first change of the width."""
    for _ in range(steps):
        change = one.observe(load)
        if change is not None:
            return change
        one.learn_drafts(load, step_s=step_s, tokens=tokens)
        load = replace(load, now_s=load.now_s + step_s)
    return None


@pytest.mark.parametrize(("tokens", "stays"), [(2, True), (1, False)])
def test_accepted_drafts_count_when_they_meet_the_target(tokens: int, stays: bool) -> None:
    """A step of int8 takes 44 ms with drafts, target 30: two tokens of it meet the target, one does not."""
    one, load = policy(COSTS, latency_s=0.030), Load(now_s=0, auto=(1,), drafts=True)
    change = draft(one, load, step_s=0.044, tokens=tokens, steps=40)
    assert (change is None) == stays
    if stays:
        assert one.predict_s(load, 8) == pytest.approx(0.022)
        assert one.predict_s(replace(load, drafts=False), 8) == pytest.approx(0.040)  # as for more sequences


def test_drafts_that_are_no_longer_accepted_lower_the_width() -> None:
    one, load = policy(COSTS, latency_s=0.030), Load(now_s=0, auto=(1, 1), drafts=True)
    assert draft(one, load, step_s=0.048, tokens=4, steps=40) is None
    change = draft(one, replace(load, now_s=9), step_s=0.048, tokens=2, steps=40)
    assert change is not None
    assert (change.after, change.cause) == (4, "latency")


def test_a_width_at_which_nothing_was_drafted_is_predicted_without_drafts() -> None:
    """int4 takes 20 ms plain, which is no gain of 1.15 over the 22 ms of int8 with drafts."""
    one, load = policy(COSTS, latency_s=0.021), Load(now_s=0, auto=(1,), drafts=True)
    one.learn_drafts(load, step_s=0.044, tokens=2)
    assert one.predict_s(load, 4) == 0.020
    change = draft(one, load, step_s=0.044, tokens=2, steps=9)
    assert change is not None
    assert change.after == 2
