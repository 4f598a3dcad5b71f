"""Zeros in the centre of the codes: what is not stored reads as if it were, in every method, on disk and in exports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import conftest
import matquant
from exports import sliced
from matquant.export import export
from matquant.format.layout import SLICES
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight, size_bytes
from matquant.format.verify import verify_checkpoint
from matquant.system.errors import InputError
from test_checkpoint import edit_record

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", "samples": 8, "seq_len": 16},
    "gptq tuned": {"method": "gptq", "samples": 8, "seq_len": 16, "tune": 2},
    "omniquant": {"method": "omniquant", "samples": 4, "seq_len": 16, "steps": 2},
    "omniquant gptq": {"method": "omniquant", "samples": 8, "seq_len": 16, "steps": 2, "codes": "gptq"},
    "qat": {"method": "qat", "steps": 2, "batch_size": 2, "seq_len": 16},
    "qat each": {"method": "qat", "steps": 2, "batch_size": 2, "seq_len": 16, "masters": "each"},
    "baseline": {"method": "qat", "steps": 2, "batch_size": 2, "seq_len": 16, "baseline_bits": 2},
}


def make(model: Path, out: Path, text: Path, **options: Any) -> Path:
    return conftest.quantize(
        model, out, text=[] if options["method"] == "rtn" else [text], zero_point="midrange", **options
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stores_scales_alone(name: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = make(llama, tmp_path / "out", text_file, **METHODS[name])
    checkpoint = verify_checkpoint(out)
    assert (checkpoint.spec.format, checkpoint.spec.zeros) == (3, "centre")
    with safe_open(out / SLICES, "np") as file:
        stored = set(file.keys())
    widths = (2,) if name == "baseline" else (2, 3, 4, 5)
    assert stored == {f"{path}.{bits}.scale" for path in checkpoint.shapes for bits in widths}
    for path in checkpoint.shapes:
        tensor = checkpoint.nested(path)
        for bits in widths:
            scale, zero = tensor.slices[bits]
            assert zero.shape == scale.shape
            assert (zero == (2**bits - 1) / 2).all()
            np.testing.assert_allclose(tensor.read(bits), sliced(checkpoint, path, bits), rtol=1e-6)


def test_they_cost_half_the_bytes_of_scales_and_zeros(llama: Path, tmp_path: Path) -> None:
    for group_size in (None, 16):
        own, centre = (
            open_checkpoint(
                conftest.quantize(
                    llama,
                    tmp_path / f"{zero_point}{group_size}",
                    method="rtn",
                    zero_point=zero_point,
                    group_size=group_size,
                    symmetric=True,
                )
            )
            for zero_point in ("stored", "midrange")
        )
        for path, (rows, columns) in own.shapes.items():
            groups = 1 if group_size is None else columns // group_size
            for bits in (2, 3, 4, 5):
                assert size_bytes(own, path, bits) - size_bytes(centre, path, bits) == 2 * rows * groups
            for bits in (6, 8):
                assert size_bytes(own, path, bits) == size_bytes(centre, path, bits)
        real = (own.directory / SLICES).stat().st_size - (centre.directory / SLICES).stat().st_size
        counted = sum(size_bytes(own, p, b) - size_bytes(centre, p, b) for p in own.shapes for b in (2, 3, 4, 5))
        assert counted < real < 1.5 * counted + 4096  # and the names of the tensors


def test_own_zeros_are_still_format_1_and_have_no_key(llama: Path, tmp_path: Path) -> None:
    record = open_checkpoint(conftest.quantize(llama, tmp_path / "out", method="rtn")).spec.to_json()
    assert record["format"] == 1
    assert "zeros" not in record


@pytest.mark.parametrize(("change", "message"), [
    ({"format": 1}, "has the key 'stored_bits', which format 1 does not"),
    ({"format": 2}, "has the key 'zeros', which format 2 does not"),
    ({"zeros": "middle"}, "has zeros='middle', which must be own or centre"),
    ({"zeros": None}, "has zeros=None, which must be own or centre"),
])  # fmt: skip
def test_a_record_that_does_not_fit_the_files_is_damage(
    change: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", zero_point="midrange")
    edit_record(out, lambda record: record.update(change))
    with pytest.raises(InputError, match=message):
        open_checkpoint(out)


def test_zeros_that_are_said_to_be_stored_are_missed(llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", zero_point="midrange")

    def change(record: dict[str, Any]) -> None:
        record["format"] = 1
        del record["zeros"], record["stored_bits"]

    edit_record(out, change)
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.0\.mlp\.down_proj\.2\.zero"):
        open_checkpoint(out)


def test_training_goes_on_with_the_zeros_it_started_with(llama: Path, text_file: Path, tmp_path: Path) -> None:
    first = make(llama, tmp_path / "first", text_file, **METHODS["gptq"])
    second = make(llama, tmp_path / "second", text_file, **METHODS["qat each"], start=first)
    assert verify_checkpoint(second).spec.zeros == "centre"
    with pytest.raises(InputError, match="has zeros='centre', this run needs 'own'; quantise it again with 'own'"):
        conftest.quantize(llama, tmp_path / "third", text=[text_file], start=first, **METHODS["qat each"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_bit_more_holds_a_slice_exactly_without_moving_its_zeros(bits: int, llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", zero_point="midrange")
    made = export(out, tmp_path / "small", to="compressed-tensors", bits=bits)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (bits + 1, True)
    checkpoint = open_checkpoint(out)
    assert made["bits_per_weight"] == pytest.approx(
        bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, bits)) + 1, abs=0.35
    )
    own = conftest.quantize(llama, tmp_path / "own", method="rtn")
    with pytest.raises(InputError):
        export(own, tmp_path / "refused", to="compressed-tensors", bits=bits)


def test_the_runtime_serves_them(llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", zero_point="midrange")
    engine = matquant.Engine(out, activations="float")
    dense = matquant.load(out, 2, kernels="none")
    tokens = [5, 6, 7, 8, 9, 10]
    without_text = list(range(engine.choosable, engine.model.architecture.vocab))
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": without_text}
    expected = dense.generate(torch.tensor([tokens]), **options)[0].tolist()
    reply = engine.stream(tokens, bits=2, max_tokens=8)
    assert len(list(reply)) > 0
    assert reply.ids == expected[: len(reply.ids)]
    assert len(reply.ids) > len(tokens)
