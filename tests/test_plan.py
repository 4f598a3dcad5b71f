"""Plans: strategies and the knapsack against enumeration, losses against the whole forward pass, budgets kept."""

import errno
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import conftest
import matquant
from cases import each
from matquant import cli
from matquant.core.spec import Plan
from matquant.engine.bench import median, timed
from matquant.engine.engine import Engine
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight, plain_bytes, size_bytes
from matquant.planning import sensitivity
from matquant.planning.budget import Budget, Groups, bits_budget, by_layer, by_width, size_budget
from matquant.planning.gradients import estimable, estimate
from matquant.planning.run import SEARCHED_WIDTHS, make_plan
from matquant.planning.search import choose, refine, search, sensitivities, strategy_plan
from matquant.planning.sensitivity import SIDECAR, Forward, Losses, open_losses
from matquant.planning.speed import CONTEXT, ROUNDS, TOKENS, speed_budget
from matquant.planning.strategies import STRATEGIES, mixes, widest_mix
from matquant.system.arguments import read_size
from matquant.system.errors import InputError

# Strategies -----------------------------------------------------------------------------------------------------------


def has_form(strategy: str, mix: Sequence[int]) -> bool:
    """The definitions by words, not by orders: the layer that is i-th from the outside is never wider than the next."""
    if strategy in ("decreasing", "reverse-pyramid"):
        mix = [-bits for bits in mix]
    outside_in = [mix[i // 2] if i % 2 == 0 else mix[-1 - i // 2] for i in range(len(mix))]
    return sorted(mix) == list(mix) if strategy.endswith("creasing") else sorted(outside_in) == outside_in


@each("strategy", STRATEGIES)
@each("widths", [(2, 4, 8), (3,), (1, 2, 5, 8)])
def test_mixes_are_all_assignments_of_the_form(strategy: str, widths: tuple[int, ...]) -> None:
    for layers in range(1, 6):
        found = [tuple(row) for row in mixes(strategy, widths, layers=layers).tolist()]
        expected = [mix for mix in itertools.product(widths, repeat=layers) if has_form(strategy, mix)]
        assert sorted(found) == sorted(expected)
        assert len(found) == math.comb(layers + len(widths) - 1, len(widths) - 1)


def test_the_forms_are_the_papers() -> None:
    def form(strategy: str) -> list[int]:
        costs = [[2, 4, 8]] * 7
        return list(widest_mix(strategy, (2, 4, 8), costs=costs, limit=30))

    assert form("pyramid") == [2, 4, 4, 8, 4, 4, 4]
    assert form("reverse-pyramid") == [8, 4, 4, 2, 4, 4, 4]
    assert form("increasing") == [2, 4, 4, 4, 4, 4, 8]
    assert form("decreasing") == [8, 4, 4, 4, 4, 4, 2]


def test_of_equal_mixes_of_a_form_the_one_with_the_fewest_narrow_layers_is_taken_and_no_single_width() -> None:
    costs = [[2, 4, 8]] * 5
    assert widest_mix("increasing", (2, 4, 8), costs=costs, limit=24) == (4, 4, 4, 4, 8)  # not 2 2 4 8 8
    assert widest_mix("increasing", (2, 4, 8), costs=costs, limit=20) == (2, 2, 4, 4, 8)  # not 4 4 4 4 4


@each("strategy", STRATEGIES)
def test_a_strategy_is_the_widest_assignment_within_the_budget(strategy: str) -> None:
    rng = np.random.default_rng(0)
    for widths in ((2, 4, 8), (2, 3, 4, 8)):
        for layers in (1, 2, 4, 5):
            sizes = rng.integers(1, 50, size=layers)  # layers of different sizes
            costs = [[int(size) * bits + 7 for bits in widths] for size in sizes]
            every = [mix for mix in itertools.product(range(len(widths)), repeat=layers) if has_form(strategy, mix)]
            totals = [sum(costs[layer][index] for layer, index in enumerate(mix)) for mix in every]
            for limit in rng.integers(min(totals), max(totals) + 2, size=8).tolist():
                mix = widest_mix(strategy, widths, costs=costs, limit=limit)
                assert has_form(strategy, mix)
                cost = sum(costs[layer][widths.index(bits)] for layer, bits in enumerate(mix))
                assert cost == max(total for total in totals if total <= limit)
            with pytest.raises(InputError, match="the smallest"):
                widest_mix(strategy, widths, costs=costs, limit=min(totals) - 1)


# Search ---------------------------------------------------------------------------------------------------------------

problems = st.integers(1, 5).flatmap(
    lambda groups: st.integers(1, 4).flatmap(
        lambda widths: st.tuples(
            *[
                st.lists(st.lists(numbers, min_size=widths, max_size=widths), min_size=groups, max_size=groups)
                for numbers in (st.integers(-20, 100), st.integers(0, 30))
            ],
            st.integers(0, 150),
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(problem=problems)
def test_the_knapsack_is_exact(problem: tuple[list[list[int]], list[list[int]], int]) -> None:
    loss, cost, slack = np.array(problem[0], dtype=float), np.array(problem[1]), problem[2]
    limit = int(cost.min(1).sum()) + slack
    rows = np.arange(len(loss))
    best = min(
        loss[rows, choice].sum()
        for choice in itertools.product(range(loss.shape[1]), repeat=len(loss))
        if cost[rows, choice].sum() <= limit
    )
    choice = choose(loss, cost, limit=limit)
    assert cost[rows, choice].sum() <= limit
    assert loss[rows, choice].sum() == best


class Made:
    """Losses that are made up: a sum over paths and what neighbours do to each other."""

    def __init__(self, layers: int, seed: int) -> None:
        names = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
        self.paths = tuple(f"model.layers.{layer}.{name}" for layer in range(layers) for name in names)
        rng = np.random.default_rng(seed)
        self.weight, self.pair = rng.uniform(0.1, 1, len(self.paths)), rng.uniform(-0.5, 1, len(self.paths))
        self.memo: dict[tuple[int, ...], float] = {}

    def loss(self, bits: Mapping[str, int]) -> float:
        key = tuple(bits[path] for path in self.paths)
        error = self.weight * 2.0 ** (-np.array(key)) - 2.0**-8
        self.memo[key] = float(error.sum() + (self.pair * error * np.roll(error, 1)).sum() * 4)
        return self.memo[key]

    def known(self) -> list[tuple[float, dict[str, int]]]:
        return [(loss, dict(zip(self.paths, key, strict=True))) for key, loss in self.memo.items()]

    def estimates(self, groups: Groups, widths: Sequence[int]) -> np.ndarray:
        return np.full((len(groups), len(widths)), np.nan)

    def budget(self, bits: float) -> Budget:
        costs = {(path, width): 10 * width + 3 for path in self.paths for width in range(1, 9)}
        limit = int((10 * bits + 3) * len(self.paths))
        return Budget(limit=limit, costs=costs, asked=f"{bits}", least=str)


@each("fused", [True, False])
@each("seed", range(3))
def test_more_budget_is_never_worse_and_never_exceeded(seed: int, fused: bool) -> None:
    made = Made(4, seed)
    found = []
    for bits in (2, 2.2, 2.5, 3, 3.7, 4, 5, 8):
        budget = made.budget(bits)
        plan = search(made, budget, widths=SEARCHED_WIDTHS, fused=fused, evaluations=40)
        assert budget.cost(plan) <= budget.limit
        assert set(plan) == set(made.paths)
        if fused:
            assert all(plan[path] == plan[path.replace("gate", "up")] for path in plan if "gate" in path)
        for strategy in STRATEGIES:
            assert made.loss(plan) <= made.loss(strategy_plan(strategy, made.paths, budget, widths=(2, 4, 8)))
        found.append(made.loss(plan))
    assert found == sorted(found, reverse=True)
    again = Made(4, seed)
    twice = [search(again, again.budget(3), widths=SEARCHED_WIDTHS, fused=fused) for _ in range(2)]
    fresh = Made(4, seed)
    assert search(fresh, fresh.budget(3), widths=SEARCHED_WIDTHS, fused=fused) == twice[0]
    assert again.loss(twice[1]) <= again.loss(twice[0])


def test_a_searched_plan_has_a_width_for_each_matrix_unless_told() -> None:
    made = Made(2, 0)
    found = search(made, made.budget(4), widths=SEARCHED_WIDTHS)
    assert any(found[path] != found[path.replace("gate", "up")] for path in found if "gate" in path)
    assert found == search(made, made.budget(4), widths=SEARCHED_WIDTHS, fused=False)
    fused = search(Made(2, 0), made.budget(4), widths=SEARCHED_WIDTHS, fused=True)
    assert made.loss(found) < made.loss(fused)


def test_the_search_starts_from_two_neighbouring_widths_cut_inside_a_layer() -> None:
    """Neither sensitivities nor swaps lead to a plan whose linears are fitted to each other."""
    fitted = (2, 2, 2, 2, 3, 3)  # gate and up of the last layer

    class Fitted(Made):
        def loss(self, bits: Mapping[str, int]) -> float:
            found, key = super().loss(bits), tuple(bits[path] for path in self.paths)
            self.memo[key] = 0.0 if key == fitted else found
            return self.memo[key]

    made = Fitted(2, 0)
    plan = search(made, made.budget(2.4), widths=SEARCHED_WIDTHS, evaluations=0)
    assert tuple(plan[path] for path in made.paths) == fitted


def test_refinement_finds_what_the_sum_of_losses_hides() -> None:
    truth = {(0, 0): 9.0, (1, 0): 2.0, (0, 1): 5.0, (1, 1): 0.0}
    cost = np.array([[0, 5], [0, 5]])
    estimate = np.array([[4.0, 3.0], [4.0, 0.0]])  # says: raise the second
    start = choose(estimate, cost, limit=5)
    assert start == (0, 1)
    options: dict[str, Any] = {"loss_GW": estimate, "cost_GW": cost, "limit": 5}
    assert refine(truth.__getitem__, start, evaluations=3, **options) == (1, 0)
    assert refine(truth.__getitem__, start, evaluations=0, **options) == start


# Budgets --------------------------------------------------------------------------------------------------------------


def test_sizes_are_parsed() -> None:
    sizes = {"1.1GB": 1_100_000_000, "900 MiB": 900 * 2**20, "12B": 12, ".5KB": 500, "2.KiB": 2048, "3MB": 3_000_000}
    assert {text: read_size(text, "--size") for text in (*sizes, "1GiB")} == {**sizes, "1GiB": 2**30}
    for wrong in ("", "1", "GB", "1 gb", "-1GB", "1e3MB", "1.1.1GB", "nan GB", "1XB"):
        with pytest.raises(InputError, match="is not a size; give a number and one of B, KB, MB, GB, KiB, MiB, GiB"):
            read_size(wrong, "--size")


def test_paths_that_other_engines_fuse_share_a_width() -> None:
    layer = "model.layers.{}."
    attention = [layer + f"self_attn.{name}_proj" for name in "qkvo"]
    experts = [layer + f"mlp.experts.{n}.{name}_proj" for n in range(2) for name in ("gate", "up", "down")]
    paths = [path.format(number) for number in (10, 2) for path in (*attention, *experts)]
    groups = by_width(paths, fused=True)
    assert sorted(path for group in groups for path in group) == sorted(paths)
    assert [len(group) for group in groups] == [3, 1, 4, 2] * 2
    assert groups[0] == tuple(path.format(2) for path in attention[:3])  # layer 2 before layer 10
    assert [len(group) for group in by_width(paths, fused=False)] == [1, 1, 1, 1, 4, 2] * 2  # experts stay together
    assert [len(found) for found in by_layer(paths)] == [10, 10]


# A checkpoint ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def master(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("plan") / "checkpoint", method="rtn", scope="linears")


@pytest.fixture
def checkpoint(master: Path, tmp_path: Path) -> Path:
    """A copy of its own: nothing is measured yet."""
    return shutil.copytree(master, tmp_path / "checkpoint")


Open = Callable[..., Losses]


@pytest.fixture
def losses(checkpoint: Path, text_file: Path) -> Open:
    return lambda **options: open_losses(checkpoint, [text_file], samples=4, seq_len=32, **options)


def whole_forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "falcon", "qwen3_moe"])
def test_from_a_changed_layer_on_is_the_whole_forward_bit_for_bit(
    family: str, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = conftest.quantize(family_model(family), tmp_path / "out", method="rtn", scope="linears")
    model, other = (matquant.load(directory, dtype=torch.float32, kernels="none") for _ in range(2))
    tokens = np.random.default_rng(0).integers(0, 256, size=(3, 17))
    ids = torch.from_numpy(tokens)
    forward = Forward(model, tokens, teacher=None)
    other.set_bits(8)
    p = whole_forward(other, ids[:, :-1]).double().log_softmax(-1)
    paths = list(model.bits_by_path)
    rng = np.random.default_rng(1)
    plans = [dict.fromkeys(paths, 8), *({path: int(rng.choice([2, 3, 8])) for path in paths} for _ in range(3))]
    plans.append({**plans[1], paths[-1]: 4})  # a long unchanged prefix
    for plan in [*plans, plans[1]]:
        other.set_bits(8, plan=plan)
        expected = whole_forward(other, ids[:, :-1])
        model.set_bits(8, plan=plan)
        with torch.inference_mode():
            outputs = forward._outputs(plan)
        assert torch.equal(matquant.planning.sensitivity.finish(model, *outputs[0]), expected)
        q = expected.double().log_softmax(-1)
        kl, log_perplexity = forward.measure(plan)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-5)
        assert log_perplexity == pytest.approx(float(-q.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)


def test_only_layers_from_the_changed_one_on_are_run(checkpoint: Path) -> None:
    model = matquant.load(checkpoint, dtype=torch.float32, kernels="none")
    forward = Forward(model, np.random.default_rng(0).integers(0, 256, size=(2, 9)), teacher=None)
    ran: list[str] = []
    for name, layer in forward._layers:
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    base = dict.fromkeys(model.bits_by_path, 8)
    last = next(path for path in base if path.startswith("model.layers.1."))
    forward.measure({**base, last: 2})
    forward.measure({**base, last: 3})
    # The logits of each plan pass through the place of every layer too, equally often.
    assert ran.count("model.layers.1") == ran.count("model.layers.0") + 2


def test_what_is_measured_is_kept_and_another_text_measured_again(
    losses: Open, checkpoint: Path, text_file: Path, llama: Path
) -> None:
    with losses() as first:
        plan = {path: 2 + number % 3 for number, path in enumerate(first.paths)}
        found = first.measure(plan)
        assert (first.evaluations, first.measure(plan)) == (1, found)
    matquant.verify_checkpoint(checkpoint)  # the file beside it does no harm
    with losses() as again:
        assert (again.measure(plan), again.evaluations) == (found, 0)
        assert again.known() == [(found[0], plan)]
    with losses(seed=1) as other:
        assert other.known() == []
    with losses(reference=llama) as against_float:
        assert against_float.known() == []
        assert against_float.measure(plan)[1] == found[1]
        assert against_float.loss(plan) != found[0]
    record = json.loads((checkpoint / SIDECAR).read_text())
    assert [len(known["measured"]) for known in record["losses"]] == [1, 1]
    file = checkpoint / "matquant_manifest.json"
    file.write_text(file.read_text() + "\n")
    with losses() as changed:
        assert changed.known() == []


def test_an_interrupted_measurement_keeps_what_it_has(losses: Open) -> None:
    def stop(evaluations: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), losses(report=stop) as stopped:
        stopped.measure(dict.fromkeys(stopped.paths, 3))
    assert len(losses().known()) == 1


@pytest.mark.parametrize("kind", ["read-only", "full", "not ours", "a directory"])
def test_a_plan_is_written_where_the_losses_cannot_be_kept(
    kind: str, checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = {"read-only": errno.EROFS, "full": errno.ENOSPC, "not ours": errno.EACCES}.get(kind)
    touch, text = Path.touch, os.strerror(number or errno.EISDIR)

    def fail(file: Path, **options: Any) -> None:
        if file.parent == checkpoint:
            raise OSError(number, text, str(file))
        touch(file, **options)

    if number is None:
        (checkpoint / SIDECAR).mkdir()
    else:
        monkeypatch.setattr(Path, "touch", fail)
        (checkpoint / SIDECAR).unlink(missing_ok=True)
    monkeypatch.setattr(sensitivity, "SAVE_EVERY_S", 0.0)
    out = tmp_path / "plan.json"
    arguments = ("plan", checkpoint, "-o", out, "--text", text_file, "--samples", 1, "--seq-len", 8)
    more = ("--bits-per-weight", 6, "--evaluations", 1, "--widths", "4,8")
    monkeypatch.setattr(sys, "argv", ["matquant", *map(str, arguments + more)])
    before = sorted(checkpoint.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert json.loads(printed.splitlines()[-1])["strategy"] == "search"
    assert json.loads(out.read_text())["bits"]
    assert err.count("note: ") == 1
    assert f"{checkpoint / SIDECAR} cannot be written, so another search will measure again (" in err
    assert ("no space left" if kind == "full" else text) in err
    assert sorted(checkpoint.iterdir()) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "losses": [{}]}', "\xff"])
def test_a_damaged_file_of_losses_is_refused(content: str, losses: Open, checkpoint: Path) -> None:
    (checkpoint / SIDECAR).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"matquant_plans\.json holds no losses of plans .*; delete it"):
        losses()
    (checkpoint / SIDECAR).write_text('{"format": 2}')
    with pytest.raises(InputError, match="is in format 2, this matquant reads 1; delete it"):
        losses()


def test_estimates_are_the_mean_square_of_each_tokens_score_along_the_change(losses: Open, checkpoint: Path) -> None:
    """The oracle runs the whole model once and takes the gradient by a factor of the change at every token."""
    opened, measured, widths = open_checkpoint(checkpoint), losses(), (2, 4, 8)
    model, tokens = measured.model, measured.tokens
    paths = estimable(model, measured.paths)
    assert set(paths) == {path for path in measured.paths if ".layers." in path}
    group = tuple(path for path in paths if ".0.self_attn." in path and path[-6] in "qkv")
    found = estimate(opened, model, tokens, widths, paths=paths, seed=5)(group)

    ids = torch.from_numpy(tokens[:, :-1])
    whole = {path: opened.nested(path).read(8) for path in group}
    squares = []
    for bits in widths:
        factor = torch.zeros(ids.shape, requires_grad=True)  # of the change, at every token

        def add(path: str, bits: int = bits, factor: torch.Tensor = factor) -> Callable[..., torch.Tensor]:
            change = torch.from_numpy(opened.nested(path).read(bits) - whole[path])
            return lambda module, args, output: output + factor[..., None] * (args[0] @ change.T)

        hooks = [model.get_submodule(path).register_forward_hook(add(path)) for path in group]
        logits = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        generator = torch.Generator().manual_seed(5)
        drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
        (score,) = torch.autograd.grad(logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum(), factor)
        squares.append(float(score.double().square().mean() / 2))
    np.testing.assert_allclose(found, squares, rtol=1e-4, atol=1e-12)
    assert found[0] > found[1] > found[2] == 0


def test_estimates_are_scaled_to_what_all_groups_lose_together_and_others_are_measured() -> None:
    class Estimated(Made):
        def estimates(self, groups: Groups, widths: Sequence[int]) -> np.ndarray:
            table = np.outer(np.arange(1.0, len(groups) + 1), 2.0 ** -np.array(widths))
            table[:, widths.index(8)] = 0
            table[0] = np.nan
            return table

    made, widths = Estimated(2, 0), (2, 4, 8)
    groups = by_width(made.paths, fused=True)
    found = sensitivities(made, groups, widths)
    everything = dict.fromkeys(made.paths, 8)
    for column, bits in enumerate(widths):
        first = {**everything, **dict.fromkeys(groups[0], bits)}
        rest = {**everything, **dict.fromkeys((path for group in groups[1:] for path in group), bits)}
        zero = made.loss(everything)
        assert found[0, column] == pytest.approx(made.loss(first) - zero)
        assert found[1:, column].sum() == pytest.approx(made.loss(rest) - zero)
    np.testing.assert_allclose(found[2, :2] / found[1, :2], 1.5)


def test_a_searched_plan_keeps_its_budget_and_beats_what_is_simple(losses: Open, checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    weights = sum(rows * columns for rows, columns in opened.shapes.values())
    with losses() as measured:
        before = math.inf
        for bits in (3.1, 3.8, 5.2):
            budget = bits_budget(opened, bits, widths=SEARCHED_WIDTHS)
            plan, facts = make_plan(opened, budget, widths=SEARCHED_WIDTHS, losses=measured, evaluations=6)
            assert 8 * sum(size_bytes(opened, path, width) for path, width in plan.items()) / weights <= bits
            assert facts["bits_per_weight"] == bits_per_weight(opened, plan) <= bits
            assert measured.loss(plan) == facts["loss"] <= before
            before = facts["loss"]
            for strategy in STRATEGIES:
                simple = make_plan(opened, budget, strategy=strategy, widths=(2, 4, 8))[0]
                assert facts["loss"] <= measured.loss(simple)


def test_a_size_counts_the_whole_model(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    whole = plain_bytes(opened) + math.ceil(sum(size_bytes(opened, path, 4) for path in opened.shapes))
    budget = size_budget(opened, f"{whole}B", widths=(2, 4, 8))
    plan, facts = make_plan(opened, budget, strategy="increasing", widths=(2, 4, 8))
    assert facts["bytes"] <= whole
    assert budget.cost(plan) == sum(round(8 * size_bytes(opened, path, bits)) for path, bits in plan.items())
    with pytest.raises(InputError) as caught:
        size_budget(opened, "1KB", widths=(2, 4)).table(by_layer(opened.shapes), (2, 4))
    least = plain_bytes(opened) + math.ceil(sum(size_bytes(opened, path, 2) for path in opened.shapes))
    assert str(caught.value) == (
        f"1KB is below the smallest plan of the widths 2,4, which has {least} bytes ({plain_bytes(opened)} of them not "
        "quantised); use a larger budget, or other --widths"
    )


def tokens_per_second(engine: Engine, plan: Mapping[str, int]) -> float:
    """Decoded tokens per second at a plan, the median of ROUNDS."""
    tokens = min(TOKENS, engine.context - CONTEXT)
    session, widths = engine.session(CONTEXT + tokens), engine.widths(plan=plan)
    prompt = list(range(1, CONTEXT + 1))
    session.extend(prompt, widths)

    def decode() -> None:
        session.rewind(CONTEXT)
        for _ in range(tokens):
            session.extend(prompt[:1], widths)

    decode()
    return median([timed(decode, tokens, engine.threads) for _ in range(ROUNDS)])


@pytest.mark.slow
def test_a_plan_for_a_speed_reaches_it(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
    directory = conftest.quantize(source, tmp_path / "out", method="rtn", scope="linears")
    checkpoint, engine = open_checkpoint(directory), Engine(directory)
    slow, fast = (tokens_per_second(engine, dict.fromkeys(checkpoint.shapes, bits)) for bits in (8, 2))
    wanted = 0.7 * slow + 0.3 * fast
    budget = speed_budget(directory, wanted, widths=(2, 4, 8))
    plan = make_plan(checkpoint, budget, strategy="increasing", widths=(2, 4, 8))[0]
    assert len(set(plan.values())) > 1
    assert tokens_per_second(engine, plan) >= 0.9 * wanted


# Serving a plan -------------------------------------------------------------------------------------------------------


def test_a_plan_file_is_served_alike_by_load_and_engine(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    made = {path: (2, 3, 4, 6, 8)[number % 5] for number, path in enumerate(opened.shapes)}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(Plan(default=None, bits=made, about={"strategy": "search", "loss": 0.5}).to_json()))
    plan = Plan.read(file)
    ids = np.random.default_rng(0).integers(0, 256, size=24).tolist()
    model = matquant.load(checkpoint, plan=plan, dtype=torch.float32, kernels="none")
    logp = whole_forward(model, torch.tensor([ids]))[0].double().log_softmax(-1)
    expected = logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    engine = Engine(checkpoint, activations="float")
    np.testing.assert_allclose(engine.score(ids, plan=plan), expected, atol=2e-4)
    assert np.abs(engine.score(ids, bits=4) - expected).max() > 0.01
    assert model.bits_by_path == made == dict(plan.bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.mlp.up_proj": 2}, "the plan names 'model.layers.9.mlp.up_proj', which the model does not"),
        ({"model.layers.1.mlp.up_proj": None}, "the plan has no default and misses 'model.layers.1.mlp.up_proj' (1 of"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_load_and_engine(
    change: dict[str, int | None], message: str, checkpoint: Path
) -> None:
    bits = {**dict.fromkeys(open_checkpoint(checkpoint).shapes, 4), **change}
    plan = Plan(default=None, bits={path: width for path, width in bits.items() if width is not None})
    for serve in (
        lambda: matquant.load(checkpoint, plan=plan),
        lambda: matquant.load(checkpoint, plan=plan, kernels="none"),
        lambda: Engine(checkpoint).score([1, 2], plan=plan),
    ):
        with pytest.raises(InputError) as caught:
            serve()
        assert str(caught.value).startswith(message)
        assert ";" in str(caught.value)


def test_a_plan_wider_than_the_engine_is_refused(checkpoint: Path) -> None:
    plan = Plan(default=4, bits={"model.layers.1.mlp.up_proj": 6})
    with pytest.raises(InputError) as caught:
        Engine(checkpoint, max_bits=4).score([1, 2], plan=plan)
    assert str(caught.value) == (
        "bits=6 for model.layers.1.mlp.up_proj exceeds max_bits=4 of this engine; use fewer bits or a larger max_bits"
    )


@pytest.mark.parametrize(
    ("about", "what"),
    [(4, "about=4, which is not an object"), ({"los": 1}, "los=1 in"), ({"loss": None}, "loss=None in")],
)
def test_facts_of_a_plan_are_read_strictly(about: Any, what: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"default": 4, "about": about}))
    with pytest.raises(InputError) as caught:
        Plan.read(file)
    assert f"--plan {file} has {what}" in str(caught.value)
    assert '"about" may hold strategy, budget,' in str(caught.value)
