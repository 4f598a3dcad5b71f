"""The shape of the code: imports point one way, and the base package never needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "matquant"
# A package may import from floors below its own, or from itself.
LAYERS = [
    {"system"},
    {"core"},
    {"format"},
    {"hf", "backends"},
    {"options", "engine", "hf_torch", "report", "export"},
    {"methods", "integrations"},
    {"measure"},
    {"planning"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
WITHOUT_TORCH = ("system", "core", "format", "hf", "options", "engine", "export")  # every file of them
HEAVY = {  # package -> who imports it: files, or a folder whose files may; the quantizer is what transformers calls
    "transformers": ["hf_torch", "integrations/quantizer.py"],
    "accelerate": ["hf_torch/shards.py"],
    "matplotlib": ["report/tables.py"],
    "lm_eval": ["integrations/lm_eval.py"],
    "vllm": ["integrations/vllm.py"],
    "huggingface_hub": ["hf/hub.py"],
}
FILES = sorted(SOURCE.rglob("*.py"))
WHOLE = [f"{p}.{file.stem}" for p in WITHOUT_TORCH for file in (SOURCE / p).glob("[!_]*.py")]
PLAN = ("budget", "request", "strategies", "search", "speed", "run")  # losses are measured with torch, all else is not


def imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_one_way(file: Path) -> None:
    own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(file):
        if name.startswith("matquant."):
            other = name.split(".")[1]
            assert other == own or layer(other) < layer(own), f"{own} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_our_own_package_is_never_imported_inside_a_function(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                assert not (isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("matquant"))


def test_heavy_packages_are_imported_in_these_places_only() -> None:
    for package, places in HEAVY.items():
        users = [f.relative_to(SOURCE) for f in FILES if any(name.split(".")[0] == package for name in imports(f))]
        found = [str(f.parent) if str(f.parent) in places else str(f) for f in users]
        assert sorted(set(found)) == places


def test_the_base_package_never_imports_torch() -> None:
    names = [*WHOLE, "measure.request", "cli", *(f"planning.{name}" for name in PLAN)]
    modules = ", ".join(["matquant", *(f"matquant.{name}" for name in sorted(names))])
    code = f"import sys, numpy; import {modules}; matquant.slice_codes(numpy.zeros(3, 'uint8'), 2)"
    code += "; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
