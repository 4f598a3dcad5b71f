"""The one writer of safetensors files: byte for byte what the safetensors package writes."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import matquant
from matquant.format.shards import held, shard_names, write_safetensors
from matquant.format.tensor_file import DTYPES

SOURCE = Path(matquant.__file__).parent


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None, {"a": 'ü"'}])
def test_a_file_is_that_of_the_package(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        f"{name}.{rows}": generator.integers(0, 2, (rows, 3)).astype(DTYPES[name]) for name in DTYPES for rows in (2, 1)
    }
    arrays |= {"ü": np.ones(1, np.float32), "none": np.ones((0, 3), np.float32), "scalar": np.array(1.5, np.float32)}
    save_file(arrays, tmp_path / "theirs", metadata=metadata)
    write_safetensors(tmp_path / "ours", held(arrays), metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert {name: array.tobytes() for name, array in found.items()} == {name: a.tobytes() for name, a in arrays.items()}


def test_shards_have_transformers_names() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_no_module_writes_with_another_writer() -> None:
    assert [file.name for file in SOURCE.rglob("*.py") if re.search(r"\bsave_file\b", file.read_text())] == []
