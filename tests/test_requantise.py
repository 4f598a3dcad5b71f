"""Companded slices fitted again to evenly spaced codes, against least squares written out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import conftest
from cases import each
from matquant.core.grid import fit_grid
from matquant.core.nest import COMPANDED
from matquant.core.tensor import NestedTensor
from matquant.export import export
from matquant.export.card import RECORD
from matquant.export.requantise import fit_scale, requantise
from matquant.format.read import open_checkpoint
from matquant.system.errors import InputError

GROUP = 16
UP = "model.layers.0.mlp.up_proj"


def companded(seed: int = 0) -> NestedTensor:
    """Random codes in two groups a row; the first row is all one label."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (6, 2 * GROUP)).astype(np.uint8)
    codes[0] = 128
    scale, zero = fit_grid(random.normal(size=codes.shape).astype(np.float32), group_size=GROUP)
    return NestedTensor(codes=codes, scale=scale, zero=zero, rule="prefix", grid=COMPANDED)


@each("centred", [True, False])
@each("bits", [2, 3, 4, 5, 6])
def test_codes_are_the_nearest_ones_and_scales_beat_the_range_of_the_group(bits: int, centred: bool) -> None:
    tensor = companded()
    zero = (2**bits - 1) / 2 if centred else 2 ** (bits - 1)
    scale = fit_scale(tensor, bits, zero=zero)
    fitted = requantise(tensor, bits, scale, centred=centred)
    weight, read = (found.read(bits).astype(np.float64) for found in (tensor, fitted))
    for row, group in np.ndindex(scale.shape):
        part = slice(group * GROUP, (group + 1) * GROUP)
        levels = float(scale[row, group]) * (np.arange(2**bits) - zero)
        nearest = levels[np.abs(weight[row, part, None] - levels).argmin(-1)]
        np.testing.assert_allclose(read[row, part], nearest, rtol=1e-5, atol=1e-6)
        reach = np.abs(weight[row, part]).max() / max(zero, 2**bits - 1 - zero)
        plain = reach * (np.arange(2**bits) - zero)
        distance = np.abs(weight[row, part, None] - plain).min(-1)
        assert np.square(read[row, part] - weight[row, part]).sum() <= np.square(distance).sum() * (1 + 1e-4) + 1e-12
    assert np.isfinite(read).all()


@pytest.fixture(scope="module")
def nested(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("requantise") / "nested"
    return conftest.quantize(llama, out, method="rtn", group_size=GROUP, grid=COMPANDED, zero_point="midrange")


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_an_export_takes_no_more_bits_than_the_slice_and_reports_its_loss(
    to: str, nested: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    made = export(nested, tmp_path / "out", to=to, bits=4, requantise=True, notice=told.append)
    assert [re.findall(r"\d+", name)[:1] for name in made["containers"]] == [["4"]], made["containers"]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert 0 < record["requantised"] < 0.02
    loss = f"relative squared error {record['requantised']:.2e} against the slice"
    assert told == [f"requantised: {loss}s of the checkpoint"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert loss in card
    assert made["bits_per_weight"] < 7  # groups of 16 and the stored shape


def test_the_loss_is_that_of_the_weights(nested: Path, tmp_path: Path) -> None:
    export(nested, tmp_path / "out", to="dense", bits=3, dtype="float32", requantise=True)
    loss = json.loads((tmp_path / "out" / RECORD).read_text())["requantised"]
    source, fitted = open_checkpoint(nested), tmp_path / "out" / "model.safetensors"
    found = load_file(fitted)
    parts = [(source.nested(path).read(3).astype(np.float64), found[f"{path}.weight"]) for path in source.shapes]
    distance = sum(np.square(ours - theirs).sum() for ours, theirs in parts)
    assert loss == pytest.approx(distance / sum(np.square(ours).sum() for ours, _ in parts), rel=1e-4)


def test_eight_bits_stay_exact(nested: Path, tmp_path: Path) -> None:
    for name, more in (("plain", {}), ("fitted", {"requantise": True})):
        export(nested, tmp_path / name, to="dense", bits=8, dtype="float32", **more)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fitted")]
    assert files[0] == files[1]


def test_without_it_the_wider_type_is_named(nested: Path, tmp_path: Path) -> None:
    told: list[str] = []
    export(nested, tmp_path / "out", to="compressed-tensors", bits=4, notice=told.append)
    assert told == [
        "companded slices take wider types to be exact, 4 bits int7; "
        "--requantise fits them to 4-bit types at a loss, or quantise with --portable"
    ]


def test_the_uniform_grid_needs_none(llama: Path, tmp_path: Path) -> None:
    uniform = conftest.quantize(llama, tmp_path / "uniform", method="rtn")
    message = "--requantise is for the companded and float grids, found grid 'uniform'; drop --requantise"
    with pytest.raises(InputError, match=message):
        export(uniform, tmp_path / "out", to="gptq", bits=4, requantise=True)
    assert not (tmp_path / "out").exists()


def test_a_nested_export_keeps_its_codes(nested: Path, tmp_path: Path) -> None:
    message = "--requantise fits slices to other formats, and --to matquant keeps the codes; drop --requantise"
    with pytest.raises(InputError, match=message):
        export(nested, tmp_path / "out", to="matquant", bits=4, requantise=True)
    assert not (tmp_path / "out").exists()
