"""llama.cpp's tests of its server against ours: those of suite_passes.txt must pass.

The tests are in the sdist of llama-cpp-python, which also has the templates that they use. The model is the one that they
download, stories260K, rounded here; like llama.cpp, the server gives it contexts beyond those it was trained with.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import matquant
from clients.conftest import CACHE, HERE, run_command, with_template
from environments import make_environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]
SDIST = "llama-cpp-python==0.3.36"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 8192


def listed() -> list[str]:
    lines = (HERE / "suite_passes.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def unpacked(folder: Path) -> Path:
    """llama.cpp's sources, downloaded once: the tests and templates."""
    parts = ("tools/server/tests", "models/templates")
    if not all((folder / part).is_dir() for part in parts):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", SDIST]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as sources:
            sources.extractall(folder / "all", filter="data")
        for part in parts:
            (root,) = (folder / "all").glob("*/vendor/llama.cpp")
            shutil.copytree(root / part, folder / part)
        shutil.rmtree(folder / "all")
        archive.unlink()
    return folder


def test_the_listed_tests_pass(data: Path, tmp_path: Path) -> None:
    model = with_template(data / "models" / "stories260K", tmp_path / "model", CHATML)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    checkpoint = matquant.quantize(model, tmp_path / "stories", method="rtn", scope="linears")
    python = make_environment(CACHE / "suite", (HERE / "suite.txt").read_text().split())
    sources = unpacked(CACHE / "suite")
    where = {
        "MATQUANT": str(Path(sys.executable).with_name("matquant")),
        "MATQUANT_MODEL": str(checkpoint),
        "MATQUANT_TEMPLATES": str(sources / "models" / "templates"),
        "PYTHONPATH": str(HERE),
    }
    names = listed()
    command = [python, "-m", "pytest", "-p", "suite_plugin", "-p", "no:cacheprovider", "-q", "-rfE", *names]
    found = run_command(command, folder=sources / "tools" / "server" / "tests", variables=where)
    assert f"{len(names)} passed" in found, found[-3000:]
