"""OmniQuant over nested widths: its numbers are those of the checkpoint, its gradients those of the surrogate."""

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
import oracle
from cases import each
from conftest import FAMILIES
from matquant.core.nest import CENTRE, slice_codes
from matquant.hf_torch.layers import decoder_layers, select_linears
from matquant.hf_torch.layerwise import embed
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.views import write_weights
from matquant.methods import omniquant
from matquant.methods.parts import clip, fake
from matquant.methods.parts.blocks import Block, Solved
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.layer import Layer
from matquant.methods.parts.share import deal
from matquant.options.declare import check_values
from matquant.options.objective import FLOAT, parse_objective
from matquant.system.errors import InputError

RUN: dict[str, Any] = {"samples": 8, "batch_size": 2, "seq_len": 16, "steps": 15, "lr": 6e-3}
GRIDS = [
    Grid(rule=rule, group_size=group_size, symmetric=symmetric, affine=affine, sliced=(2, 3, 4))
    for rule in ("prefix", "round", "extra")
    for group_size in (None, 16)
    for symmetric in (True, False)
    for affine in ("none", "refit", "learned")
] + [
    Grid(rule="prefix", group_size=group_size, affine=affine, zeros=CENTRE, sliced=(2, 3, 4))
    for group_size in (None, 16)
    for affine in ("refit", "learned")
]
BASELINES = [
    Grid(rule="prefix", bits=bits, symmetric=symmetric, affine="none")
    for bits in (2, 3, 4)
    for symmetric in (True, False)
]


def name_of(grid: Grid) -> str:
    symmetry = "symmetric" if grid.symmetric else "asymmetric"
    parts = (grid.rule, grid.bits, grid.group_size, symmetry, grid.affine, grid.zeros)
    return "-".join(map(str, parts))


def clipped(weight: torch.Tensor, grid: Grid, trained: tuple[int, ...] = (8, 4, 2)) -> clip.Clip:
    """Learned tensors that have moved."""
    begun = clip.start(weight, grid, trained=trained, clip=True)
    for tensor in (begun.gamma, begun.beta):
        if tensor is not None:
            tensor.copy_(0.5 + 0.5 * torch.rand_like(tensor))
    for stretch, offset in begun.nudges.values():
        stretch.normal_(0, 0.1)
        if offset is not None:
            offset.normal_(0, 0.1)
    for tensor in begun.tensors():
        tensor.requires_grad_()
    return begun


# ------------------------------------------------------------------------------------------------------- the quantiser


@each("grid", GRIDS + BASELINES)
def test_a_simulated_read_has_the_bits_of_the_stored_one_and_the_oracles_numbers(grid: Grid) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    weight[1] = 0.0
    weight[2] = 0.7
    learned = clipped(weight, grid)
    simulated = clip.simulate(weight, grid, learned)
    nested = clip.nest(weight, grid, learned)
    for bits in (8, 6, 4, 3, 2) if grid.bits == 8 else (grid.bits,):
        assert torch.equal(clip.read(simulated, bits, grid, learned), nested.read(bits))
    gamma = 1.0 if learned.gamma is None else learned.gamma.detach().numpy()
    beta = gamma if learned.beta is None else learned.beta.detach().numpy()
    scale, zero = oracle.fit_grid(
        weight.numpy(),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        gamma=gamma,
        beta=beta,
    )
    if grid.symmetric and grid.bits < 8:
        zero = zero - 0.5
    own_scale, own_zero = clip.own_grid(nested, grid)
    np.testing.assert_array_equal(own_scale.numpy(), scale)
    np.testing.assert_array_equal(own_zero.numpy(), zero)
    codes = oracle.encode(weight.numpy(), scale, zero, bits=grid.bits)
    np.testing.assert_array_equal(slice_codes(nested.codes, grid.bits).numpy(), codes)
    for bits in (8, 6) if grid.bits == 8 else (grid.bits,):  # widths without an affine of their own
        table = oracle.slice_value_table(bits, grid.rule) if grid.bits == 8 else range(256)
        expected = oracle.decode(np.array(table)[codes], scale, zero)
        np.testing.assert_allclose(nested.read(bits).numpy(), expected, rtol=1e-5, atol=1e-6)


@each("grid", GRIDS + BASELINES)
def test_untrained_it_is_round_to_nearest_bit_for_bit(grid: Grid) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    found = clip.nest(weight, grid, clip.start(weight, grid, trained=(8, 4, 2), clip=True))
    expected = fake.nest(weight, grid)
    assert torch.equal(found.codes, expected.codes)
    for bits in (8, 4, 2):
        assert torch.equal(found.read(bits), expected.read(bits))


def surrogate(grid: Grid, bits: int, leaves: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor]) -> torch.Tensor:
    """Oracle, float64: the read whose roundings are offsets frozen at the point of interest."""
    top, step = 2**grid.bits - 1, 2 ** (grid.bits - bits)
    weight = leaves["weight"].view(*frozen["scale"].shape, -1)
    if grid.symmetric:
        scale, zero = leaves["gamma"] * weight.abs().amax(-1) * 2 / top, frozen["zero"]
    else:
        low, high = leaves["beta"] * weight.amin(-1), leaves["gamma"] * weight.amax(-1)
        scale = (high - low) / top
        zero = -low / (scale + frozen["scale off"])
        zero = zero + frozen["zero off"]
    scale = scale + frozen["scale off"]
    position = (weight / scale[..., None] + zero[..., None]).clamp(0, top)
    code = position / step + frozen["code off"]
    scale_r, zero_r = frozen["ratio"] * scale, zero / step + frozen["zero_r off"]
    if "stretch" in leaves:
        scale_r, zero_r = scale_r * torch.exp(leaves["stretch"]), zero_r + leaves.get("offset", 0.0)
    return scale_r[..., None] * (code - zero_r[..., None])


def freeze(grid: Grid, bits: int, leaves: dict[str, torch.Tensor], nested: Any) -> dict[str, torch.Tensor]:
    """The offsets at which ``surrogate`` has the stored numbers."""
    scale, zero = (tensor.double() for tensor in clip.own_grid(nested, grid))
    top, step = 2**grid.bits - 1, 2 ** (grid.bits - bits)
    weight = leaves["weight"].view(*scale.shape, -1)
    if grid.symmetric:
        raw, raw_zero = leaves["gamma"] * weight.abs().amax(-1) * 2 / top, zero
    else:
        low = leaves["beta"] * weight.amin(-1)
        raw, raw_zero = (leaves["gamma"] * weight.amax(-1) - low) / top, -low / scale
    position = (weight / scale[..., None] + zero[..., None]).clamp(0, top)
    code = slice_codes(nested.codes, bits, rule=nested.rule).double().view_as(position)
    scale_r, zero_r = (tensor.double() for tensor in nested.affine(bits))
    own = "stretch" in leaves
    return {
        "scale": scale,
        "zero": zero,
        "scale off": scale - raw,
        "zero off": zero - raw_zero,
        "code off": code - position / step,
        "ratio": scale_r / scale / (torch.exp(leaves["stretch"]) if own else 1.0),
        "zero_r off": zero_r - zero / step - leaves.get("offset", 0.0),
    }


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_gradients_are_finite_differences_of_the_surrogate(grid: Grid, bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 32, requires_grad=True)
    learned = clipped(weight.detach(), grid)
    gradient = torch.randn(3, 32)
    simulated = clip.simulate(weight, grid, learned)
    clip.read(simulated, bits, grid, learned).backward(gradient)
    tensors = {"weight": weight, "gamma": learned.gamma, "beta": learned.beta}
    if bits in learned.nudges:
        tensors["stretch"], tensors["offset"] = learned.nudges[bits]
    leaves = {name: tensor.detach().double() for name, tensor in tensors.items() if tensor is not None}
    frozen = freeze(grid, bits, leaves, simulated.tensor)
    value = surrogate(grid, bits, leaves, frozen)
    torch.testing.assert_close(value.float().view(3, 32), simulated.tensor.read(bits), rtol=1e-5, atol=1e-5)
    for name, leaf in leaves.items():
        expected = torch.zeros_like(leaf)
        for place in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                moved = leaf.clone()
                moved.view(-1)[place] += sign * 1e-6
                read = surrogate(grid, bits, {**leaves, name: moved}, frozen)
                ends.append((read.view(3, 32) * gradient).sum())
            expected.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        found = tensors[name].grad
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------------ one block


def setting(
    directory: Path, objective: str = "8,4,2", *, grid: Grid | None = None, scope: str = "ffn", **options: Any
) -> tuple[Any, Block]:
    """A job and the first block of a model, whose input is the same at all widths."""
    model = load_float(directory, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    views = select_linears(model, scope)
    job = types.SimpleNamespace(
        objective=parse_objective(objective),
        grid=grid or Grid(rule="prefix", affine="learned", sliced=(2, 3, 4)),
        options={**RUN, **options},
        dtypes=dict.fromkeys(dict(model.named_parameters()), torch.float32),
    )
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(8, 16)))
    hidden, calls = embed(model, tokens.split(2))
    name, module = decoder_layers(model)[0]
    block = Block(
        index=0,
        count=2,
        name=name,
        module=module,
        views={path: view for path, view in views.items() if view.parameter.startswith(f"{name}.")},
        inputs={stream: list(hidden) for stream in omniquant.streams(job)},
        share=deal(8, 2, steps=True, ordered=False),
        call=calls[0],
        config=model.config,
    )
    return job, block


def outputs(block: Block, solved: Solved | None, bits: int) -> list[torch.Tensor]:
    """What the block puts out as it would be served, or in float."""
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    if solved is not None:
        local = {name.removeprefix(f"{block.name}."): tensor for name, tensor in solved.plain.items()}
        block.module.load_state_dict({**before, **local})
        views = {
            path: dataclasses.replace(view, parameter=view.parameter.removeprefix(f"{block.name}."))
            for path, view in block.views.items()
        }
        write_weights(block.module, views, ((path, tensor.read(bits)) for path, tensor in solved.nested.items()))
    with torch.no_grad():
        result = [block.call(block.module, states) for states in block.inputs[bits if solved else FLOAT]]
    block.module.load_state_dict(before)
    return result


def relative_loss(block: Block, solved: Solved, bits: int) -> float:
    pairs = list(zip(outputs(block, solved, bits), outputs(block, None, FLOAT), strict=True))
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))


# By default one scope of each family, and both of the one whose experts are not transformed.
SERVED = [
    pytest.param(family, scope, marks=pytest.mark.slow if scope == "ffn" and family != "qwen3_moe" else [])
    for family in FAMILIES
    for scope in ("ffn", "all")
]


@pytest.mark.parametrize(("family", "scope"), SERVED)
def test_every_family_is_served_with_the_loss_that_training_reports(
    family: str, scope: str, family_model: Callable[[str], Path]
) -> None:
    job, block = setting(family_model(family), scope=scope, steps=4)
    solved = omniquant.solve(job, block)
    assert set(solved.nested) == set(block.views)
    for bits in (8, 4, 2):
        assert solved.record["loss"][str(bits)] == pytest.approx(relative_loss(block, solved, bits), rel=1e-3, abs=1e-8)
    assert solved.record["loss"]["2"] < solved.record["loss_before"]["2"]
    assert "notice" not in solved.record
    assert bool(solved.plain) == (family != "qwen3_moe" or scope == "all")


def variants() -> Iterator[Any]:
    for rule in ("prefix", "round", "extra"):
        yield pytest.param("8,4,2", Grid(rule=rule, affine="none"), id=f"{rule}-none")
        yield pytest.param("8,4,2", Grid(rule=rule, sliced=(2, 3, 4)), id=f"{rule}-refit")
    grid = Grid(rule="prefix", affine="learned", sliced=(2, 3, 4))
    yield pytest.param("8,4,2", Grid(rule="prefix", affine="learned", zeros=CENTRE, sliced=(2, 3, 4)), id="centre")
    yield pytest.param("8,4,2", dataclasses.replace(grid, group_size=16), id="groups")
    yield pytest.param("8,4,2", dataclasses.replace(grid, symmetric=False), id="asymmetric")
    yield pytest.param("8,4,2", dataclasses.replace(grid, storable=False), id="float32-scales")
    for objective in ("2", "8", "8,4,8->2", "8,4,2,8->4;2", "8,4,2,fp->2", "fp->8;4;2"):
        yield pytest.param(objective, grid, id=objective)
    for bits in (2, 3, 4):
        yield pytest.param(str(bits), Grid(rule="prefix", bits=bits, affine="none"), id=f"baseline-{bits}")
    yield pytest.param(
        "2", Grid(rule="prefix", bits=2, symmetric=False, affine="refit", sliced=(2,)), id="baseline-refit"
    )


@pytest.mark.parametrize(("objective", "grid"), list(variants()))
def test_the_narrowest_width_gets_better_than_round_to_nearest(objective: str, grid: Grid, llama: Path) -> None:
    job, block = setting(llama, objective, grid=grid)
    solved = omniquant.solve(job, block)
    untrained = Solved(
        nested={path: fake.nest(w, grid) for path, w in Layer(block, {}).weights({})}, plain={}, record={}
    )
    bits = job.objective[-1].bits
    ours, theirs = relative_loss(block, solved, bits), relative_loss(block, untrained, bits)
    assert theirs == pytest.approx(solved.record["loss_before"][str(bits)], rel=1e-3)
    assert ours < (0.97 if bits < 8 else 1.0) * theirs


def prepared(job: Any, block: Block) -> tuple[omniquant.Settings, Any, Any, list[torch.Tensor]]:
    settings = omniquant.Settings(**job.options)
    layer = Layer(block, job.dtypes)
    targets = layer.targets(autocast=False)
    learned, _ = omniquant._start(job, settings, layer)
    torch.manual_seed(0)
    for factors in learned.clips.values():
        for tensor in factors.tensors():
            tensor.sub_(0.1 * torch.rand_like(tensor))
    for transform in learned.transforms:
        transform.log_scale.normal_(0, 0.1)
    return settings, layer, learned, targets


def leaves_of(learned: Any) -> list[torch.Tensor]:
    transforms = [t for transform in learned.transforms for t in (transform.log_scale, transform.shift)]
    factors = [t for factors in learned.clips.values() for t in factors.tensors()]
    return [tensor for tensor in (*transforms, *factors) if tensor is not None]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3_moe"])
@pytest.mark.parametrize("objective", ["8,4,2", "8,4,8->2", "8,4,2,8->4;2", "8,4,2,fp->2", "2"])
def test_a_step_has_the_losses_and_gradients_of_one_graph_over_all_widths(
    objective: str, family: str, family_model: Callable[[str], Path]
) -> None:
    job, block = setting(family_model(family), objective, scope="all")
    settings, layer, learned, targets = prepared(job, block)
    omniquant._optimizer(learned, settings)
    losses = omniquant._step(job, settings, layer, learned, targets, 1)
    found = [leaf.grad for leaf in leaves_of(learned)]
    needed = dataclasses.replace(job.grid, sliced=tuple(w.bits for w in job.objective if w.bits in job.grid.sliced))
    changed = learned.fold(layer)
    simulated = {p: clip.simulate(w, needed, learned.clips[p]) for p, w in layer.weights(changed)}
    power = torch.stack([target.square().mean() for target in targets]).mean()
    seen, total = {FLOAT: targets[1]}, torch.zeros(())
    for width in job.objective:
        reads = {p: clip.read(s, width.bits, needed, learned.clips[p]) for p, s in simulated.items()}
        seen[width.bits] = layer.run(block.inputs[width.bits][1], {**changed, **layer.assemble(reads)}, autocast=False)
        against = [FLOAT] * width.truth + list(width.teachers)
        terms = [(seen[width.bits] - seen[source].detach()).square().mean() for source in against]
        loss = sum(terms) / len(terms) / power
        assert losses[width.bits] == pytest.approx(loss.item(), rel=1e-4)
        total = total + width.weight * loss
    expected = torch.autograd.grad(total, leaves_of(learned), allow_unused=True)
    assert sum(gradient is not None for gradient in found) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-9


def test_a_teachers_output_is_the_target(llama: Path) -> None:
    """Distilled from 8 bits alone, int2 ends nearer to that output than to where the truth leads it."""
    width = parse_objective("8,8->2")[1]
    output, truth, teacher = torch.randn(3, 2, 4, 8)
    loss = omniquant._loss(output, {FLOAT: truth, 8: teacher}, width)
    torch.testing.assert_close(loss, ((output - teacher) ** 2).mean())
    both = omniquant._loss(output, {FLOAT: truth, 8: teacher}, parse_objective("8,2,8->2")[1])
    torch.testing.assert_close(both, (((output - teacher) ** 2).mean() + ((output - truth) ** 2).mean()) / 2)


def test_widths_run_on_their_own_stream_and_the_truth_on_the_float_one(llama: Path) -> None:
    job, block = setting(llama, steps=1, lr=1e-12)
    calm = omniquant.solve(job, block).record["loss"]
    moved = dataclasses.replace(block, inputs={**block.inputs, 4: [states + 1.0 for states in block.inputs[4]]})
    found = omniquant.solve(job, moved).record["loss"]
    assert (found["8"], found["2"]) == (calm["8"], calm["2"])
    assert found["4"] > 2 * calm["4"]


def test_the_same_seed_gives_the_same_codes_and_another_does_not(llama: Path) -> None:
    codes = []
    for seed in (3, 3, 4):
        job, block = setting(llama, steps=5, seed=seed)
        solved = omniquant.solve(job, block)
        codes.append(torch.cat([tensor.codes.flatten() for tensor in solved.nested.values()]))
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_with_nothing_to_learn_it_is_round_to_nearest(llama: Path) -> None:
    grid = Grid(rule="prefix", sliced=(2, 4))
    job, block = setting(llama, grid=grid, transform=False, learn_clip=False)
    solved = omniquant.solve(job, block)
    assert not solved.plain
    for path, view in block.views.items():
        weight = block.module.get_parameter(view.parameter.removeprefix(f"{block.name}."))
        assert torch.equal(solved.nested[path].codes, fake.nest(weight, grid).codes)


def test_the_transformation_helps_and_is_in_what_is_returned(llama: Path) -> None:
    losses = {}
    for transform in (False, True):
        job, block = setting(llama, transform=transform, steps=60, lr=3e-3)
        with torch.no_grad():
            block.module.post_attention_layernorm.weight[::8] *= 10.0  # channels that matter more than others
        solved = omniquant.solve(job, block)
        losses[transform] = solved.record["loss"]["2"]
        norm = f"{block.name}.post_attention_layernorm.weight"
        assert set(solved.plain) == ({norm} if transform else set())
    assert losses[True] < losses[False]


def test_the_block_is_left_as_it_was(llama: Path) -> None:
    job, block = setting(llama, steps=2)
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    omniquant.solve(job, block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in block.module.parameters())


def test_bf16_reads_the_weights_of_each_width(llama: Path) -> None:
    exact, rounded = (
        omniquant.solve(*setting(llama, steps=1, lr=1e-12, autocast=autocast)).record["loss"]
        for autocast in (False, True)
    )
    assert rounded["2"] == pytest.approx(exact["2"], rel=0.1)
    assert rounded["4"] == pytest.approx(exact["4"], rel=0.3)
    assert rounded["8"] < 0.1 * exact["4"]


def test_a_diverging_run_names_the_layer_and_the_width(llama: Path) -> None:
    job, block = setting(llama, lr=1e3)
    with pytest.raises(
        InputError,
        match=r"^training of model\.layers\.0 diverged: its loss at \d bits is \S+ at .*15( steps)?; "
        r"use a smaller --lr and --resume \(finished layers are kept\)$",
    ):
        omniquant.solve(job, block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0; give a number above 0"),
        ({"clip_lr": -1.0}, "clip_lr=-1.0; give a number above 0"),
        ({"seed": -1}, "seed=-1; give a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan; give a number of at least 0"),
    ],
)
def test_options_that_cannot_be_trained_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_values(omniquant.Settings, options, owner="method 'omniquant'")
    assert str(caught.value) == message


def test_codes_by_gptq_lower_the_loss_and_leave_the_layer_alone(llama: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 16, "seq_len": 32, "steps": 3, "objective": "8,4,2", "text": [text_file]}
    losses = {}
    for codes in ("round", "gptq"):
        records: list[dict[str, Any]] = []
        conftest.quantize(
            llama, tmp_path / codes, method="omniquant", codes=codes, report=records.append, scope="all", **options
        )
        losses[codes] = sum(records[0]["loss"].values())
    assert losses["gptq"] < losses["round"]
    with pytest.raises(InputError, match="codes='nearest' is not known; use one of round, gptq"):
        conftest.quantize(llama, tmp_path / "out", method="omniquant", codes="nearest", **options)
