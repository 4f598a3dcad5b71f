"""The native tests under sanitizers, and for Arm in an emulator: make targets, run here with the slow tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

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
