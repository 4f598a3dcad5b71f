"""Experts in a budget of memory: what a step reads is what is in memory, exchanges are bounded, and can be replayed."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import conftest
import matquant
from conftest import HEADS, SMALL
from matquant.core.planes import add_planes
from matquant.core.spec import Plan
from matquant.engine.resident import SWAP_BYTES, levels_up_to
from matquant.engine.worth import Sizes, exchange, wanted
from serving import alone, generation, run, starting
from test_runtime import make

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
COUNT, LAYERS, ACTIVE = 6, 2, 2
PROMPTS = [[token] * 8 for token in (3, 90, 201)]  # each leads to few experts
WHOLE = "1GB"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with scales for int2 to int4."""
    root = tmp_path_factory.mktemp("resident")
    source = make(transformers.Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS), root / "float")
    return conftest.quantize(source, root / "out", method="rtn", scope="linears", affine="refit")


@pytest.fixture(scope="module")
def plain(directory: Path) -> matquant.Engine:
    return matquant.Engine(directory, threads=1)


def held_bytes(engine: matquant.Engine) -> int:
    """The bytes of all weights, by what the native planes say."""
    return sum(weight.planes.bytes for weight in engine.model.weights.values())


@pytest.fixture(scope="module")
def budgets(directory: Path) -> tuple[int, int]:
    """The least budget, and the one that holds everything."""
    residency = matquant.Engine(directory, threads=1, resident=WHOLE).residency
    return residency.least_bytes, residency.resident_bytes


def between(budgets: tuple[int, int], share: float) -> int:
    return budgets[0] + int(share * (budgets[1] - budgets[0]))


def plan_of(engine: matquant.Engine, bits: int = 8) -> Plan:
    """The widths that a step at ``bits`` bits reads by the records of what is in memory."""
    held = {path: weight.max_bits for path, weight in engine.model.weights.items()}
    return Plan(default=bits, bits={path: min(bits, width) for path, width in held.items() if ".experts." in path})


def tokens_by_width(engine: matquant.Engine) -> dict[int, int]:
    counts = engine.residency.stats()
    return {int(key.split("/")[1]): count for key, count in counts.items() if "/" in key}


def use(engine: matquant.Engine, prompt: list[int], times: int) -> None:
    """Run steps, with a little time for planes to be read meanwhile."""
    for _ in range(times):
        engine.score(prompt)
        time.sleep(0.0005)


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("bits", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_with_the_least_budget_all_experts_are_read_at_int2(
    bits: int, directory: Path, plain: matquant.Engine, budgets: tuple[int, int]
) -> None:
    engine = matquant.Engine(directory, threads=1, resident=budgets[0])
    experts = {path: 2 for path in engine.model.weights if ".experts." in path}
    for prompt in PROMPTS:
        expected = plain.score(prompt, plan=Plan(default=bits, bits=experts))
        np.testing.assert_array_equal(engine.score(prompt, bits=bits), expected)
        assert not np.array_equal(expected, plain.score(prompt, bits=bits))
    assert engine.residency.resident_bytes == budgets[0]
    tokens = sum(len(prompt) - 1 for prompt in PROMPTS)
    assert tokens_by_width(engine) == {2: tokens * ACTIVE * LAYERS}


@pytest.mark.parametrize("activations", ["int8", pytest.param("float", marks=pytest.mark.slow)])
def test_a_budget_for_everything_changes_nothing(directory: Path, budgets: tuple[int, int], activations: str) -> None:
    engine = matquant.Engine(directory, threads=2, activations=activations, resident=budgets[1])
    other = matquant.Engine(directory, threads=2, activations=activations)
    for bits in range(1, 9):
        np.testing.assert_array_equal(engine.score(PROMPTS[0], bits=bits), other.score(PROMPTS[0], bits=bits))
    use(engine, PROMPTS[0], 40)
    assert engine.residency.swaps == []
    assert held_bytes(engine) == held_bytes(other)
    count = (len(PROMPTS[0]) - 1) * ACTIVE * LAYERS
    expected = {bits: count * (41 if bits == 8 else 1) for bits in range(1, 9)}
    assert tokens_by_width(engine) == expected


def test_every_step_reads_what_is_in_memory_while_planes_come_and_go(
    directory: Path, plain: matquant.Engine, budgets: tuple[int, int]
) -> None:
    budget = between(budgets, 0.3)
    engine = matquant.Engine(directory, threads=1, resident=budget)
    fixed = budgets[1] - held_bytes(plain)
    for turn in range(6):
        prompt = PROMPTS[turn % 2]
        use(engine, prompt, 40)
        for bits in (8, 4):
            expected = plain.score(prompt, plan=plan_of(engine, bits))
            np.testing.assert_array_equal(engine.score(prompt, bits=bits), expected)
        assert held_bytes(engine) + fixed <= engine.residency.resident_bytes <= budget
    seen: dict[tuple[int, int], int] = {}
    rises = falls = 0
    for _, layer, expert, bits in engine.residency.swaps:
        before = seen.get((layer, expert))
        rises, falls = rises + (before is not None and bits > before), falls + (before is not None and bits < before)
        seen[layer, expert] = bits
    assert rises > 0
    assert falls > 0
    assert len(tokens_by_width(engine)) > 1


@pytest.mark.slow
def test_sessions_of_several_threads_go_on(directory: Path, plain: matquant.Engine, budgets: tuple[int, int]) -> None:
    engine = matquant.Engine(directory, threads=1, resident=between(budgets, 0.3))
    wrong: list[str] = []

    def score(prompt: list[int]) -> None:
        try:
            use(engine, prompt, 60)
            if not np.array_equal(engine.score(prompt, bits=2), plain.score(prompt, bits=2)):
                wrong.append("int2")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=score, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.residency.step == 61 * len(PROMPTS)


def test_a_server_counts_the_widths_that_experts_were_read_at(
    directory: Path, plain: matquant.Engine, budgets: tuple[int, int]
) -> None:
    engine = matquant.Engine(directory, threads=1, resident=budgets[0])
    with starting(engine) as get:
        batcher = get()
        [receiver] = run(batcher, generation(PROMPTS[0], bits=8, max_tokens=6))
        counts = batcher.stats()
    new = len(receiver.tokens)  # each from a row with logits; the last layer's experts read no others
    assert counts["expert_tokens/2"] == ((len(PROMPTS[0]) + new - 1) * (LAYERS - 1) + new) * ACTIVE
    assert counts["resident_bytes"] == budgets[0]
    assert receiver.tokens == alone(plain, generation(PROMPTS[0], plan=plan_of(engine), max_tokens=6))


# ------------------------------------------------------------------------------------------------------------- replayed


def test_replayed_swaps_give_the_same_text_and_scores(directory: Path, budgets: tuple[int, int]) -> None:
    budget = between(budgets, 0.3)

    def answers(engine: matquant.Engine) -> list[Any]:
        use(engine, PROMPTS[0], 40)
        texts = [engine.generate(prompt, max_tokens=24) for prompt in PROMPTS]
        return [*texts, engine.score(PROMPTS[0]).tolist(), engine.score(PROMPTS[1]).tolist()]

    first = matquant.Engine(directory, threads=1, resident=budget)
    expected = answers(first)
    swaps = json.loads(json.dumps(first.residency.swaps))
    assert swaps
    again = matquant.Engine(directory, threads=2, resident=budget, swaps=swaps)
    assert answers(again) == expected
    assert again.residency.swaps == first.residency.swaps
    counts = [engine.residency.stats() | {"resident_bytes": 0} for engine in (first, again)]  # one may be reading
    assert counts[0] == counts[1]
    assert answers(matquant.Engine(directory, threads=1, resident=budget, swaps=[])) != expected


# -------------------------------------------------------------------------------------------------------------- policy


def sizes(*planes: tuple[int, float]) -> Sizes:
    return Sizes(bytes_P=np.array([size for size, _ in planes]), gains_P=np.array([gain for _, gain in planes]))


THREE = sizes((10, 4.0), (10, 1.0), (20, 0.1))


def test_the_most_valuable_planes_that_fit_are_wanted() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        used, room = 1 + random.integers(0, 30, 5).astype(float), int(random.integers(0, 250))
        expected, left = [0] * 5, room
        while True:  # one plane after the other
            worths = [used[e] * THREE.gains_P[level] if level < 3 else -1.0 for e, level in enumerate(expected)]
            best = int(np.argmax(worths))
            if worths[best] < 0 or THREE.bytes_P[expected[best]] > left:
                break
            left -= THREE.bytes_P[expected[best]]
            expected[best] += 1
        found = wanted(used, np.zeros(5, np.int64), THREE, room=room)
        worth = (used[:, None] * THREE.gains_P).ravel()
        if len(set(worth)) == len(worth):  # of equal ones any may come first
            assert found.tolist() == expected


def test_an_exchange_is_bounded_and_fits_at_every_moment() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        used, held = 1 + random.exponential(20, 8), random.integers(0, 4, 8)
        room = THREE.total(held) + int(random.integers(0, 30))
        most = int(random.integers(0, 80))
        down, up, gained = exchange(used, held, THREE, room=room, most=most)
        after = held.copy()
        for expert, level in down.items():
            assert level < held[expert]
            after[expert] = level
        freed = THREE.total(held) - THREE.total(after)
        for expert, level in up.items():
            assert expert not in down
            assert level > held[expert]
            after[expert] = level
        assert gained == THREE.total(after) - THREE.total(held) + freed <= most
        assert THREE.total(after) <= room
        assert freed == 0 or freed - 20 < gained - (room - THREE.total(held)), "no more is freed than is needed"


def test_a_plane_is_exchanged_only_for_one_that_is_worth_half_as_much_again() -> None:
    one, held = sizes((10, 1.0)), np.array([1, 0])
    for used, swaps in ((10.0, False), (14.0, False), (16.0, True)):
        down, up, _ = exchange(np.array([10.0, used]), held, one, room=10, most=100)
        assert (down, up) == (({0: 0}, {1: 1}) if swaps else ({}, {}))


def test_levels_are_where_the_planes_change() -> None:
    assert levels_up_to(8, rule="prefix") == (2, 3, 4, 6, 8)
    assert levels_up_to(8, rule="round") == (2, 3, 5, 8)
    assert levels_up_to(4, rule="prefix") == (2, 3, 4)
    assert levels_up_to(1, rule="prefix") == (1,)
    assert SWAP_BYTES > 0


# --------------------------------------------------------------------------------------------------------------- errors


def test_planes_that_cannot_be_read_leave_the_experts_as_they_are(
    directory: Path, plain: matquant.Engine, budgets: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = matquant.Engine(directory, threads=1, resident=between(budgets, 0.3))
    held = held_bytes(engine)

    def fail(*args: Any, **options: Any) -> Any:
        add_planes(*args, **options)
        raise OSError("no such device")

    monkeypatch.setattr("matquant.engine.resident.add_planes", fail)
    use(engine, PROMPTS[0], 80)
    assert engine.residency.failure == "OSError: no such device"
    assert held_bytes(engine) <= held
    np.testing.assert_array_equal(engine.score(PROMPTS[0]), plain.score(PROMPTS[0], plan=plan_of(engine)))


def test_errors_name_the_budget_and_what_would_do(directory: Path, budgets: tuple[int, int]) -> None:
    least = budgets[0]
    with pytest.raises(matquant.InputError, match="below the int2 floor"):
        matquant.Engine(directory, resident=1)  # before anything is loaded
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(directory, resident=least - 1)
    assert str(caught.value) == (
        f"resident={least - 1} bytes is below the int2 floor: {directory} needs at least {least} bytes "
        "with its experts at int2; give more, or a smaller max_bits"
    )
    engine = matquant.Engine(directory, threads=1, resident=least)
    for call, message in (
        (lambda: matquant.Engine(directory, resident="much"), "resident 'much' is not a size"),
        (lambda: matquant.Engine(directory, resident=2.5e9), "give a text or an integer"),
        (lambda: matquant.Engine(directory, swaps=[]), "give resident as well"),
        (lambda: matquant.Engine(directory, resident=WHOLE, swaps=[[1, 0, 6, 8]]), "replay swaps of this checkpoint"),
        (lambda: matquant.Engine(directory, resident=WHOLE, swaps=[[1, 0, 0, 5]]), "replay swaps of this checkpoint"),
        (lambda: matquant.Engine(directory, resident=WHOLE, swaps=[[1, 0]]), "[1, 0] is not a swap"),
        (lambda: matquant.Engine(directory, resident=least, swaps=[[1, 0, 0, 8]]), "use the budget that it was"),
        (engine.add_planes, "open an engine without it"),
        (lambda: engine.evict(2), "open an engine without it"),
    ):
        with pytest.raises(matquant.InputError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_model_without_quantised_experts_has_nothing_to_divide(directory: Path, llama: Path, tmp_path: Path) -> None:
    dense = conftest.quantize(llama, tmp_path / "dense", method="rtn")
    source = directory.parent / "float"
    partly = conftest.quantize(source, tmp_path / "partly", method="rtn", scope="linears", exclude=["0.mlp.experts"])
    for out, message in (
        (dense, f"resident needs a model with quantised experts, and {dense} has none; use a smaller max_bits"),
        (
            partly,
            "resident needs a model with all experts quantised, and model.layers.0.mlp.experts.0.gate_proj of "
            f"{partly} is not; leave it out",
        ),
    ):
        with pytest.raises(matquant.InputError) as caught:
            matquant.Engine(out, resident="1GB")
        assert str(caught.value) == message


@pytest.mark.slow
def test_max_bits_limits_what_experts_get(directory: Path, plain: matquant.Engine, budgets: tuple[int, int]) -> None:
    for most in (1, 2, 4):
        engine = matquant.Engine(directory, threads=1, max_bits=most, resident=budgets[1])
        use(engine, PROMPTS[0], 40)
        for bits in range(1, most + 1):
            np.testing.assert_array_equal(engine.score(PROMPTS[0], bits=bits), plain.score(PROMPTS[0], bits=bits))
        assert engine.residency.swaps == []
