"""NaN and infinity: every command that measures names the width and the layer, and no JSON ever holds them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import matquant
from matquant.engine.sampling import Sampling, choose
from matquant.format.manifest import write_manifest
from matquant.format.read import open_checkpoint
from matquant.format.verify import check_plain
from matquant.hf_torch.finite import checked_logits, describe
from matquant.hf_torch.loading import load_float
from matquant.measure.likelihood import log_perplexity
from matquant.measure.run import evaluate_checkpoint
from matquant.methods.parts.blocks import check_losses
from matquant.planning.pareto import read_baselines
from matquant.planning.sensitivity import SIDECAR, open_losses
from matquant.report.page import read_record
from matquant.system.errors import InputError
from matquant.system.files import json_bytes, json_text

DOWN = "model.layers.1.mlp.down_proj"
WINDOW = {"seq_len": 16, "max_tokens": 64}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("finite") / "made", method="rtn", scope="all")


def changed(made: Path, to: Path, name: str, change: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of a checkpoint with another tensor, that somebody meant."""
    shutil.copytree(made, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    spec = open_checkpoint(made).spec
    (to / "matquant_manifest.json").unlink()
    write_manifest(to, spec)
    return to


def poison(tensor: torch.Tensor) -> None:
    tensor.view(-1)[0] = math.nan


@pytest.fixture(scope="module")
def overflowing(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finite tensors, infinite activations in one layer."""
    to = tmp_path_factory.mktemp("finite") / "overflowing"
    return changed(made, to, f"{DOWN}.weight_scale", lambda tensor: tensor.fill_(3e38))


def test_eval_names_the_width_and_the_layer_where_infinity_begins(overflowing: Path, text_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        evaluate_checkpoint(overflowing, bits=(8,), text=[text_file], **WINDOW)
    assert f"int8 of {overflowing} has log-perplexity nan: " in str(caught.value)
    assert DOWN in str(caught.value)


def test_eval_names_a_tensor_that_holds_nan_and_verify_rejects_it(made: Path, text_file: Path, tmp_path: Path) -> None:
    broken = changed(made, tmp_path / "broken", "model.norm.weight", poison)
    with pytest.raises(InputError, match=r"int8 of .* has log-perplexity nan: model\.norm\.weight holds NaN"):
        evaluate_checkpoint(broken, bits=(8,), text=[text_file], **WINDOW)
    with pytest.raises(InputError, match=r"model\.norm\.weight of .* holds NaN or infinity; repair the float model"):
        check_plain(open_checkpoint(broken))


def test_plan_names_the_width_and_the_layer(overflowing: Path, text_file: Path) -> None:
    with (
        pytest.raises(InputError, match=rf"int8 of .*{DOWN}"),
        open_losses(overflowing, [text_file], seq_len=16, samples=1) as losses,
    ):
        losses.loss(dict.fromkeys(losses.paths, 4))
    assert not (overflowing / SIDECAR).exists()


def test_a_float_reference_that_is_nan_is_named(
    made: Path, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = shutil.copytree(llama, tmp_path / "reference")
    tensors = load_file(reference / "model.safetensors")
    poison(tensors["model.layers.0.input_layernorm.weight"])
    save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})
    message = rf"the float model {reference} has .* nan: model\.layers\.0\.input_layernorm\.weight holds NaN"
    with pytest.raises(InputError, match=message):
        evaluate_checkpoint(made, bits=(8,), text=[text_file], reference=reference, **WINDOW)
    with (
        pytest.raises(InputError, match=message),
        open_losses(made, [text_file], seq_len=16, samples=1, reference=reference) as losses,
    ):
        losses.loss(dict.fromkeys(losses.paths, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_that_overflow_in_a_narrow_dtype_are_named_with_its_range(dtype: torch.dtype, llama: Path) -> None:
    model = load_float(llama, dtype=dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float(torch.finfo(dtype).max) / 2)
    with pytest.raises(InputError) as caught:
        log_perplexity(model, np.arange(33, dtype=np.int64), context=16)
    name = str(dtype).removeprefix("torch.")
    assert "the output of model.layers.0.mlp.up_proj is the first that is not finite" in str(caught.value)
    assert f"in {name} up to {torch.finfo(dtype).max:.3g}; convert the float model to float32" in str(caught.value)


def test_a_task_stops_at_logits_that_are_not_finite(overflowing: Path) -> None:
    model = matquant.load(overflowing, 8, kernels="none")
    ids = torch.arange(8)[None]
    with (
        pytest.raises(InputError, match=r"^int8 of .* gives logits that are not finite: .*layers\.1"),
        checked_logits(model),
    ):
        model(input_ids=ids)
    model(input_ids=ids)  # the hook is gone


def test_a_plan_of_several_widths_is_described_by_them(made: Path) -> None:
    model = matquant.load(made, 8, plan={DOWN: 2}, kernels="none")
    assert describe(model) == f"a plan of int2, int8 of {made}"


def test_gptq_names_the_layer_whose_outputs_overflow(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = load_float(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / "large")
    with pytest.raises(InputError, match=r"model\.layers\.0.*(int\d|the float model|\d bits)"):
        conftest.quantize(
            tmp_path / "large", tmp_path / "out", method="gptq", text=[text_file], samples=4, seq_len=16, scope="ffn"
        )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_an_error_of_its_block_and_width() -> None:
    check_losses({8: 0.1, 2: 3.0}, "model.layers.3")
    with pytest.raises(InputError, match=r"^the loss of model\.layers\.3 at 2 bits is inf: "):
        check_losses({8: 0.1, 2: math.inf}, "model.layers.3")


def test_no_token_is_chosen_from_logits_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(InputError, match="no token can be chosen"):
                choose(np.array([0, bad], np.float32), Sampling(temperature=temperature), np.random.default_rng(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_never_holds_nan_and_the_error_names_the_key(bad: float) -> None:
    for write in (json_text, json_bytes):
        with pytest.raises(InputError, match=rf"^a\.1\.int2 is {bad}, which JSON cannot hold"):
            write({"a": [0.5, {"int2": bad}]})
    assert json.loads(json_text({"b": 1.5, "a": None})) == {"b": 1.5, "a": None}


def test_losses_that_are_no_numbers_are_not_taken_from_the_cache(made: Path, text_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    with open_losses(copy, [text_file], seq_len=16, samples=1) as losses:
        losses.loss(dict.fromkeys(losses.paths, 8))
    cache = json.loads((copy / SIDECAR).read_text())
    (measured,) = [known["measured"] for known in cache["losses"]]
    measured.update({key: [math.nan, 1.0] for key in measured})
    (copy / SIDECAR).write_text(json.dumps(cache))
    with pytest.raises(InputError, match="holds no losses of plans"):
        open_losses(copy, [text_file], seq_len=16, samples=1)


def test_a_record_with_nan_is_rejected_by_the_name_of_its_width(tmp_path: Path) -> None:
    (file := tmp_path / "record.json").write_text('{"log_perplexity": {"8": 3.5, "2": NaN}}')
    with pytest.raises(
        InputError, match=rf"^--eval {file} has log_perplexity\.2 = nan, not a finite number; measure it"
    ):
        read_record(file)
    file.write_text('{"dedicated": [[4.5, 1e999]]}')
    with pytest.raises(InputError, match=rf"^--baselines {file} has dedicated\.0\.1 = inf, not a finite number"):
        read_baselines(file)
