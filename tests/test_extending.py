"""The worked examples of docs/extending.md run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from matquant.backends import BACKENDS
from matquant.export import FORMATS
from matquant.format.read import open_checkpoint
from matquant.hf.families import ARCHITECTURES
from matquant.options import METHODS

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text()
TABLES = {"METHODS": METHODS, "FORMATS": FORMATS, "BACKENDS": BACKENDS, "ARCHITECTURES": ARCHITECTURES}
UP = "model.layers.0.mlp.up_proj"


def test_the_examples_run_and_do_what_they_say(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "MODEL")
    before = {name: dict(table) for name, table in TABLES.items()}
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/extending.md", "exec"), names)
        added = {name: set(table) - set(before[name]) for name, table in TABLES.items()}  # type: ignore[call-overload]
    finally:
        for name, table in TABLES.items():
            table.clear()
            table.update(before[name])  # type: ignore[attr-defined]
    assert added == {
        "METHODS": {"clipped"},
        "FORMATS": {"bytes"},
        "BACKENDS": {"double"},
        "ARCHITECTURES": {"seed_oss"},
    }
    assert open_checkpoint(tmp_path / "OUT").spec.method == "clipped"
    tensors = load_file(tmp_path / "BYTES" / "model.safetensors")
    weight = tensors[f"{UP}.codes"] * tensors[f"{UP}.scale"] + tensors[f"{UP}.least"]
    tensor = open_checkpoint(tmp_path / "OUT").nested(UP)
    np.testing.assert_allclose(weight, tensor.read(3), rtol=0, atol=1e-6)
    assert not np.allclose(weight, tensor.read(4), rtol=0, atol=1e-6)


def test_the_page_names_every_table_and_its_contract_test() -> None:
    root = Path(__file__).resolve().parents[1]
    assert len(TEXT.splitlines()) <= 150
    for name in TABLES:
        assert f"`{name}` in `" in TEXT
    files = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", TEXT)
    assert len(files) > 8
    for file in files:
        assert (root / file if file.startswith("tests/") else root / "src" / "matquant" / file).is_file(), file
