"""Round to nearest compares both 8-bit grids where nobody chose one, and says so where it leaves the usual one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import matquant
from matquant.methods.parts import symmetry
from matquant.methods.parts.fake import Grid


@pytest.fixture(scope="module")
def one_sided(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama with weights of which most groups lie on one side of 0."""
    directory = tmp_path_factory.mktemp("one_sided") / "model"
    shutil.copytree(llama, directory)
    file = directory / "model.safetensors"
    state = load_file(file)
    shifted = {
        name: tensor + 2 * tensor.std() if name.endswith("proj.weight") else tensor for name, tensor in state.items()
    }
    save_file(shifted, file, metadata={"format": "pt"})
    return directory


def made(model: Path, out: Path, **options: Any) -> tuple[matquant.Spec, list[str]]:
    """The spec of what rtn made, and the notices."""
    notices: list[str | None] = []
    conftest.quantize(
        model, out, method="rtn", scope="linears", report=lambda r: notices.append(r.get("notice")), **options
    )
    return matquant.open_checkpoint(out).spec, sorted({notice for notice in notices if notice is not None})


def int4_error(model: Path, out: Path) -> float:
    state, checkpoint = load_file(model / "model.safetensors"), matquant.open_checkpoint(out)
    return sum(
        float(np.square(checkpoint.nested(path).read(4) - state[f"{path}.weight"].float().numpy()).sum())
        for path in checkpoint.shapes
    )


def test_rtn_takes_the_grid_with_the_smaller_int4_error(one_sided: Path, llama: Path, tmp_path: Path) -> None:
    spec, (notice,) = made(one_sided, tmp_path / "out")
    assert not spec.symmetric
    assert notice.startswith("asymmetric grid chosen: its squared error at int4 is 0.")
    assert notice.endswith(" of the symmetric grid's; --symmetric overrides")
    made_symmetric = tmp_path / "symmetric"
    conftest.quantize(one_sided, made_symmetric, method="rtn", scope="linears", symmetric=True)
    assert matquant.open_checkpoint(made_symmetric).spec.symmetric
    assert int4_error(one_sided, tmp_path / "out") < symmetry.CLEARLY * int4_error(one_sided, made_symmetric)
    spec, notices = made(llama, tmp_path / "other")  # normally distributed: 0.8 or so
    assert (spec.symmetric, notices) == (True, [])


def test_rtn_keeps_the_symmetric_grid_where_only_that_is_possible(one_sided: Path, tmp_path: Path) -> None:
    spec, notices = made(one_sided, tmp_path / "out", zero_point="midrange")
    assert (spec.symmetric, notices) == (True, [])
    weight = torch.nn.Linear(4, 4)
    views: Any = {"model.layers.0.mlp.experts.0.up_proj": None}
    assert symmetry.choose_symmetry(weight, views, Grid(rule="prefix"))[0]


def test_weights_that_are_0_keep_the_symmetric_grid(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    spec, _ = made(tmp_path / "model", tmp_path / "out")
    assert spec.symmetric
