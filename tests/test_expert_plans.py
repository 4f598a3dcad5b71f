"""``matquant plan --experts``: estimates of each expert against the model's own forward pass, and the plans of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import matquant
from matquant.cli.plan import plan as command
from matquant.core.experts import expert_name
from matquant.core.spec import Plan
from matquant.format.read import open_checkpoint
from matquant.planning.budget import by_width
from matquant.planning.experts import routing
from matquant.planning.gradients import estimate
from matquant.planning.run import check_experts, read_budget, run
from matquant.planning.sensitivity import Losses
from matquant.system.errors import InputError

TOKENS = np.random.default_rng(0).integers(0, 256, size=(3, 21))
COLD = "model.layers.0.mlp.experts.1"


@pytest.fixture(scope="module")
def checkpoints(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one family for each way in which experts get their tokens; gpt-oss never chooses an expert of its layer 0."""
    root, made = tmp_path_factory.mktemp("plans"), {}
    for family in ("gpt_oss", "llama4"):
        source = root / f"{family}-float"
        source.mkdir()
        for file in family_model(family).iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        state = load_file(source / "model.safetensors")
        if family == "gpt_oss":
            state["model.layers.0.mlp.router.bias"][1] = -1e4
        save_file(state, source / "model.safetensors", {"format": "pt"})
        made[family] = conftest.quantize(source, root / family, method="rtn", scope="linears")
    return made


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("llama4", marks=pytest.mark.slow)])
def test_an_experts_estimate_is_the_mean_square_of_each_tokens_score(family: str, checkpoints: dict[str, Path]) -> None:
    """The oracle takes the gradient by a factor of the change of the layer's experts, which they compute themselves."""
    checkpoint, widths = open_checkpoint(checkpoints[family]), (2, 4, 8)
    model = matquant.load(checkpoints[family], dtype=torch.float32, kernels="none")
    ids = torch.from_numpy(TOKENS[:, :-1])
    of = estimate(checkpoint, model, TOKENS, widths, paths=(), experts=True, seed=5)
    name = next(
        name
        for name, _ in model.named_modules()
        if name.endswith("1.mlp.experts" if family == "gpt_oss" else "1.feed_forward.experts")
    )
    shares = routing(model, [ids])
    expert = max((key for key in shares if key.startswith(name)), key=lambda key: shares[key])
    group = [path for path in checkpoint.shapes if expert_name(path) == expert]
    found = of(group)
    assert found is not None
    assert of(group[:2]) is None
    squares = []
    for bits in widths:
        factor = torch.zeros(ids.shape, requires_grad=True)

        def change(module: Any, args: Any, output: torch.Tensor, bits: int = bits, factor: Any = factor) -> Any:
            module._forward_hooks.clear()  # it runs again below
            with torch.no_grad():
                model.set_bits(8, plan=dict.fromkeys(group, bits))
                delta = module(*args)
                model.set_bits(8)
                delta -= module(*args)
            return output + factor.flatten().repeat(len(delta) // factor.numel())[:, None] * delta

        model.get_submodule(name).register_forward_hook(change)
        logits = model(input_ids=ids, use_cache=False).logits
        drawn = torch.multinomial(
            logits.detach().softmax(-1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(5)
        )
        (score,) = torch.autograd.grad(logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum(), factor)
        squares.append(float(score.double().square().mean() / 2))
    np.testing.assert_allclose(found, squares, rtol=1e-3, atol=1e-12)
    assert found[0] > found[1] > found[2] == 0


def test_routing_is_the_share_of_tokens_that_chooses_an_expert(checkpoints: dict[str, Path]) -> None:
    for family, chosen in (("gpt_oss", 2), ("llama4", 1)):
        model = matquant.load(checkpoints[family], dtype=torch.float32, kernels="none")
        shares = routing(model, torch.from_numpy(TOKENS).split(2))
        layer = [share for name, share in shares.items() if ".layers.0." in name]
        assert (len(shares), len(layer), sum(layer)) == (8, 4, pytest.approx(chosen))
        if family == "gpt_oss":
            assert shares[COLD] == 0
            logits: list[torch.Tensor] = []
            router = model.model.layers[0].mlp.router
            router.register_forward_hook(lambda module, args, output, logits=logits: logits.append(output[0]))
            with torch.no_grad():
                model(torch.from_numpy(TOKENS))
            best = logits[0].topk(2).indices
            assert shares["model.layers.0.mlp.experts.2"] == pytest.approx(float((best == 2).any(-1).float().mean()))


def test_each_expert_gets_a_width_and_one_that_is_never_chosen_the_least(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(checkpoints["gpt_oss"])
    widths = (2, 4, 8)
    shown: list[Any] = []
    with Losses(checkpoint, TOKENS) as losses:
        facts = run(
            checkpoint.directory,
            tmp_path / "plan.json",
            losses=losses,
            widths=widths,
            experts=True,
            evaluations=3,
            show=shown.append,
            bits_per_weight=6.5,
        )
    plan = Plan.read(tmp_path / "plan.json").bits
    assert facts["bits_per_weight"] <= 6.5
    assert " experts at int2, chosen " in shown[-1]
    by_expert: dict[str, set[int]] = {}
    for path, bits in plan.items():
        if (name := expert_name(path)) is not None:
            by_expert.setdefault(name, set()).add(bits)
    assert len(by_expert) == 8
    assert all(len(found) == 1 for found in by_expert.values()), "projections of an expert share a width"
    assert by_expert[COLD] == {2}
    assert max(map(max, by_expert.values())) > 2
    assert sum(found["experts"] for found in facts["experts"].values()) == 8
    assert sum(found["routed"] for found in facts["experts"].values()) == pytest.approx(1, abs=1e-3)
    fused = by_width(checkpoint.shapes, fused=True)
    assert len(fused) < len(by_width(checkpoint.shapes, fused=True, experts=True))


def test_a_plan_of_experts_that_cannot_be_made_says_why(
    checkpoints: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(checkpoints["gpt_oss"])
    with pytest.raises(InputError) as caught:
        check_experts(checkpoint, "pyramid")
    assert str(caught.value) == "--experts measures losses, which --strategy pyramid does not; use --strategy search"
    out = conftest.quantize(llama, tmp_path / "out", method="rtn")
    with pytest.raises(InputError) as caught:
        check_experts(open_checkpoint(out), "search")
    assert str(caught.value) == f"--experts needs quantised experts, and {out} has none; leave it out"
    with pytest.raises(InputError, match="--experts measures losses, which --strategy pyramid does not"):
        command(checkpoint.directory, tmp_path / "plan.json", experts=True, size="1MB", strategy="pyramid")
    with pytest.raises(InputError, match=r"1 bits per weight is below the smallest plan of the widths 2,4, which has"):
        read_budget(checkpoint, widths=(2, 4), bits_per_weight=1.0).table(
            by_width(checkpoint.shapes, fused=True, experts=True), (2, 4)
        )
