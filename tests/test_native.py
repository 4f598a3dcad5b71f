"""The native tests under sanitizers, and for Arm in an emulator: make targets, run here with the slow tests.

And the order in which a native model is built.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from matquant import _native

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "needs"), [
    ("test-sanitize", ("cmake", "make")),
    ("test-neon", ("cmake", "make", "aarch64-linux-gnu-g++", "qemu-aarch64")),
])  # fmt: skip
def test_native_tests_pass(target: str, needs: tuple[str, ...]) -> None:
    missing = [tool for tool in needs if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    done = subprocess.run(["make", "-C", str(ROOT), target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def empty_model() -> _native.Model:
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 20}
    factors = {"norm_eps": 1e-5, "attention_scale": 1.0, "embedding_scale": 1.0, "attention_cap": 0.0, "logit_cap": 0.0}
    return _native.Model(**sizes, **factors, gelu=False)


def test_a_cache_needs_a_model_with_layers() -> None:
    with pytest.raises(ValueError, match=r"^the model has no layers; add them before its caches$"):
        _native.Cache(empty_model(), 16, False)


def test_the_head_is_set_once() -> None:
    model, norm = empty_model(), np.ones(32, np.float32)
    matrix = _native.dense_matrix(np.zeros((20, 32), np.float32), "float32", None, False)
    model.set_ends(matrix, matrix, norm)
    with pytest.raises(ValueError, match=r"^the model has its embedding and head already$"):
        model.set_ends(matrix, matrix, norm)
