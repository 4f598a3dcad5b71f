"""Ctrl-C while modules are imported; files that are truncated while they are in use."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import conftest
import matquant
from matquant.format import tensor_file
from matquant.format.read import open_checkpoint
from matquant.system import startup
from matquant.system.errors import InputError

# numpy is where the base package spends its import; the interrupt comes from inside it, as a signal.
INTERRUPTED = """
import importlib.abc, os, signal, sys
class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from matquant.__main__ import main
sys.argv = ["matquant", *{arguments!r}]
main()
"""


@pytest.mark.parametrize(
    ("name", "arguments"), [("numpy", ["inspect", "x"]), ("matquant.cli", ["verify", "x"]), ("torch", ["demo"])]
)
def test_ctrl_c_while_modules_are_imported_ends_with_130_and_no_traceback(name: str, arguments: list[str]) -> None:
    code = INTERRUPTED.format(name=name, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, matquant, matquant.__main__; print({'numpy', 'typer', 'torch', 'safetensors'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(matquant, name) is not None for name in matquant.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        matquant.nothing  # noqa: B018


def test_the_handler_of_ctrl_c_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with startup.leave_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is startup._leave
    assert signal.getsignal(signal.SIGINT) is before

    def fails() -> None:
        with startup.leave_on_interrupt():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert signal.getsignal(signal.SIGINT) is before


# Truncated files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    return conftest.quantize(llama, tmp_path / "out", method="rtn", symmetric=False)


def test_without_mmap_a_file_truncated_after_loading_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "whole")
    expected = matquant.Engine(tmp_path / "whole", threads=1).generate("The cat", bits=4, max_tokens=12)
    engine = matquant.Engine(checkpoint, threads=1, mmap=False)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(checkpoint) not in maps.read_text()
    for file in checkpoint.glob("*.safetensors"):
        os.truncate(file, 100)
    assert engine.generate("The cat", bits=4, max_tokens=12) == expected


def test_without_mmap_every_tensor_is_what_the_file_holds(checkpoint: Path) -> None:
    mapped, read = (open_checkpoint(checkpoint, mmap=mmap) for mmap in (True, False))
    assert set(mapped.files) == set(read.files)
    for name in mapped.files:
        one, other = mapped.array(name), read.array(name)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    for path in mapped.shapes:
        assert (mapped.nested(path).read(4) == read.nested(path, mapped=True).read(4)).all()


def test_a_file_that_ends_while_it_is_read_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(10))
    assert tensor_file.read_tensor(file, "<u2", start=2, shape=(2, 2)).shape == (2, 2)
    with pytest.raises(InputError) as caught:
        tensor_file.read_tensor(file, "<u4", start=2, shape=(3,))
    assert str(caught.value) == f"{file} ended 4 bytes too early while it was read; copy it again"
