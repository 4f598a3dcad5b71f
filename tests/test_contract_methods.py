"""The contract of a method: what every row of METHODS must do, in one loop over the table."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import matquant
from matquant.core.nest import RULES
from matquant.format.read import Checkpoint
from matquant.format.verify import verify_checkpoint
from matquant.options import METHODS, distill, gptq
from matquant.options.common import SCOPES, Common
from matquant.options.declare import options_of
from matquant.options.recipes import RECIPES
from matquant.system.errors import InputError

SMALLEST = {"samples": 4, "seq_len": 16, "batch_size": 2, "steps": 2, "tune": 1, "save_every": 1}
OPTIONAL = {("gptq", "tune")}  # what a method does more by itself only if asked

ALL, ENDS = 14, 2  # linear layers of the tiny model; its embedding and head
Make = Callable[..., Checkpoint]


def smallest(method: str) -> dict[str, Any]:
    """Those of SMALLEST that a method has."""
    known = options_of(METHODS[method].settings)
    return {name: value for name, value in SMALLEST.items() if name in known and (method, name) not in OPTIONAL}


# Methods of several stages are runs of other rows, each of which is here; they take seconds in every test.
ROWS = [pytest.param(name, marks=pytest.mark.slow if METHODS[name].stages else []) for name in METHODS]


@pytest.fixture(params=ROWS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(method: str, llama: Path, text_file: Path, tmp_path: Path) -> Make:
    """make(**options): the checkpoint that the method makes of the tiny model."""

    def run(*, model: Path = llama, out: str = "out", **options: Any) -> Checkpoint:
        given = {"overwrite": True, **smallest(method), **options}
        if METHODS[method].settings is not None:
            given["text"] = [text_file]
        return verify_checkpoint(matquant.quantize(model, tmp_path / out, method=method, **given))

    return run


def weights(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path: checkpoint.nested(path).codes.tobytes() for path in checkpoint.shapes}


def test_every_rule_is_served_or_rejected_by_name(method: str, make: Make) -> None:
    for rule in RULES:
        if METHODS[method].stages is not None and rule != "prefix":
            with pytest.raises(InputError, match=f"rule='{rule}' does not work with method {method!r}"):
                make(rule=rule)
        else:
            spec = make(rule=rule, group_size=None).spec
            assert (spec.rule, spec.group_size) == (rule, None)


def test_every_scope_takes_its_layers(method: str, make: Make) -> None:
    found = {scope: set(make(scope=scope).shapes) for scope in SCOPES if scope != "all"}  # all of them: below
    assert not found["ffn"] & found["attention"]
    assert len(found["ffn"]) + len(found["attention"]) == ALL
    assert all("self_attn" in path for path in found["attention"])
    assert found["linears"] == found["ffn"] | found["attention"]


def test_group_sizes_divide_every_layer_or_are_rejected_with_the_layer(make: Make) -> None:
    made = make()
    assert (made.spec.group_size, len(made.shapes)) == (16, ALL + ENDS)  # auto: rows are 32 and 48 long
    assert make(group_size=8).spec.group_size == 8
    with pytest.raises(InputError, match=r"group_size=5 does not divide in_features=32 of model\.layers\.\d"):
        make(group_size=5)


def test_options_of_others_and_unknown_ones_are_rejected(method: str, make: Make) -> None:
    own = set(options_of(METHODS[method].settings))
    others = {name for row in METHODS.values() for name in options_of(row.settings)} - own
    for name in (*sorted(others), "nonsense"):
        with pytest.raises(InputError, match=f"method '{method}' has no option '{name}'; "):
            make(**{name: 1})


def test_a_stopped_run_resumes_to_the_same_bits(method: str, make: Make, tmp_path: Path) -> None:
    whole = weights(make(out="whole"))

    def stop(record: dict[str, Any]) -> None:
        if record.get("step", 0) >= 1 and record.get("stage", "1/").startswith("1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(overwrite=False, report=stop)
    assert not (tmp_path / "out").exists()
    resume = (tmp_path / ".out.work").is_dir()
    assert resume or METHODS[method].settings is None  # what takes seconds starts again
    assert weights(make(overwrite=False, resume=resume)) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_degenerate_weights_are_quantised_and_what_is_not_finite_is_named(
    make: Make, llama: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    first = model.model.layers[0].mlp
    with torch.no_grad():
        first.up_proj.weight.zero_()
        first.gate_proj.weight.fill_(0.25)
        first.down_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "model")
    for file in llama.glob("token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    made = make(model=tmp_path / "model")
    for bits in (8, 4, 2):
        assert np.isfinite(made.nested("model.layers.0.mlp.gate_proj").read(bits)).all()
    assert np.abs(made.nested("model.layers.0.mlp.up_proj").read(8)).max() < 1e-2  # trained ones may move a little
    with torch.no_grad():
        first.down_proj.weight[2, 5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj"):
        make(model=tmp_path / "model")


def test_every_option_is_declared_with_a_help_of_one_sentence() -> None:
    for row in METHODS.values():
        for option in options_of(row.settings).values():
            assert option.declared.help[0].isupper(), option.name
            assert option.declared.help.endswith("."), option.name


def test_every_recipe_names_options_that_its_method_has() -> None:
    for name, recipe in RECIPES.items():
        row = METHODS[recipe.method]
        common = {field.name for field in dataclasses.fields(Common)}
        assert set(recipe.options) <= common | set(options_of(row.settings)), name


def test_balanced_is_the_first_stage_of_best() -> None:
    """Its codes, that is: the batch size does not change them."""
    best, common = RECIPES["best"].options, {field.name for field in dataclasses.fields(Common)}
    first, *_ = distill.stages({name: value for name, value in best.items() if name not in common}, default_lr=1.0)
    first |= {name: value for name, value in best.items() if name in common}

    def read(options: Mapping[str, Any]) -> tuple[Common, gptq.Settings]:
        own = {name: value for name, value in options.items() if name not in {*common, "method", "batch_size"}}
        return Common(**{name: value for name, value in options.items() if name in common}), gptq.Settings(**own)

    assert first["method"] == RECIPES["balanced"].method
    assert read(first) == read(RECIPES["balanced"].options)
