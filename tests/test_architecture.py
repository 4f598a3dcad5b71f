"""The shape of the code: imports point one way, and the base package never needs torch."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

from cases import each

SOURCE = Path(__file__).resolve().parents[1] / "src" / "matquant"
# A package may import from floors below its own, or from itself.
LAYERS = [
    {"system"},
    {"core"},
    {"format"},
    {"hf", "backends"},
    {"calibration", "distributed"},
    {"options", "engine", "hf_torch", "report", "export"},
    {"serve", "hub"},
    {"methods", "integrations"},
    {"measure"},
    {"planning"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
WITHOUT_TORCH = (
    "system",
    "core",
    "format",
    "hf",
    "calibration",
    "options",
    "engine",
    "export",
    "serve",
    "hub",
)  # every file of them
HEAVY = {  # package -> who imports it: files, or a folder whose files may; the quantizer is what transformers calls
    "transformers": ["hf_torch", "integrations/quantizer.py"],
    "accelerate": ["hf_torch/shards.py"],
    "matplotlib": ["report/plots.py"],
    "lm_eval": ["integrations/harness.py", "integrations/lm_eval.py"],
    "vllm": ["integrations/vllm.py", "integrations/vllm_experts.py"],
    "triton": ["backends/gpu_kernels.py", "backends/gpu_operands.py"],
    "huggingface_hub": ["hf/hub.py"],
    "llguidance": ["serve/structured.py"],
    "prometheus_client": ["serve/metrics.py"],
    "uvicorn": ["serve/run.py"],
}
FILES = sorted(SOURCE.rglob("*.py"))
WHOLE = [f"{p}.{file.stem}" for p in WITHOUT_TORCH for file in (SOURCE / p).glob("[!_]*.py")]
EVALUATION = ("request", "run", "tasks", "windows", "metrics", "kept", "with_engine")  # the native engine's part
PLAN = ("budget", "request", "strategies", "search", "speed", "run")  # losses are measured with torch, all else is not


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def imports(file: Path) -> list[str]:
    found = []
    for node in tree(file).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


@each("file", FILES)
def test_imports_point_one_way(file: Path) -> None:
    own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(file):
        if name.startswith("matquant."):
            other = name.split(".")[1]
            assert other == own or layer(other) < layer(own), f"{own} imports {name}"


@each("file", FILES)
def test_our_own_package_is_never_imported_inside_a_function(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                assert not (isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("matquant"))


def test_heavy_packages_are_imported_in_these_places_only() -> None:
    for package, places in HEAVY.items():
        users = [f.relative_to(SOURCE) for f in FILES if any(name.split(".")[0] == package for name in imports(f))]
        found = [str(f.parent) if str(f.parent) in places else str(f) for f in users]
        assert sorted(set(found)) == places


def test_the_base_package_never_imports_torch() -> None:
    names = [
        *WHOLE,
        *(f"measure.{name}" for name in EVALUATION),
        "report.tables",
        "cli",
        *(f"planning.{name}" for name in PLAN),
    ]
    modules = ", ".join(["matquant", *(f"matquant.{name}" for name in sorted(names))])
    code = f"import sys, numpy; import {modules}; matquant.slice_codes(numpy.zeros(3, 'uint8'), 2)"
    code += "; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_checkpoint_is_read_without_the_native_module() -> None:
    """vLLM and transformers read it in environments where the kernels may not load."""
    code = (
        "import sys; sys.modules['matquant._native'] = None; import matquant.format.read, matquant.integrations.words"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# Half-bin arithmetic --------------------------------------------------------------------------------------------------

# Names that stand for how many 8-bit codes share a slice, or how many codes a width has.
COUNTS = ("step", "levels")


def is_number(node: ast.expr, value: float) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == value


def counts_codes(node: ast.expr) -> bool:
    """Whether an expression is, or is built from, 2**bits, ``step`` or ``levels``, or is "... - 1"."""
    if isinstance(node, ast.Call) and len(node.args) == 1:  # float(...)
        return counts_codes(node.args[0])
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Sub) and is_number(node.right, 1):
            return True
        if isinstance(node.op, ast.Pow):
            return is_number(node.left, 2)
        return counts_codes(node.left) or counts_codes(node.right)
    return isinstance(node, ast.Name) and node.id in COUNTS


def halves(module: ast.Module) -> list[str]:
    """Every place that adds or subtracts 1/2, or halves a count of codes: (2**r - 1) / 2, step // 2, x + 0.5."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.BinOp):
            continue
        if isinstance(node.op, (ast.Add, ast.Sub)):
            wrong = is_number(node.left, 0.5) or is_number(node.right, 0.5)
        else:
            halved = isinstance(node.op, (ast.Div, ast.FloorDiv)) and is_number(node.right, 2)
            wrong = halved and counts_codes(node.left)
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@each("file", FILES)
def test_half_bins_are_computed_in_nest_alone(file: Path) -> None:
    if file != SOURCE / "core" / "nest.py":
        assert halves(tree(file)) == [], "use middle, bin_centre, centred_codes, ... or round_half_up of nest.py"


@each(
    "source",
    [
        "middle = (2**bits - 1) / 2", "middle = float(2**bits - 1) / 2", "code = code * step + step // 2",
        "centre = (step - 1) / 2", "code = floor(x + 0.5)", "zero = zero - 0.5", "zero = 0.5 + zero",
        "half = 2 ** (8 - bits) / 2", "top = (levels - 1) // 2",
    ],
)  # fmt: skip
def test_half_bins_are_found(source: str) -> None:
    assert len(halves(ast.parse(source))) == 1


@each(
    "source",
    [
        '"""(2**r - 1) / 2"""', "x = 1  # step // 2", "rate = peak * (1 + cos(x)) / 2", "half = head_dim // 2",
        "noise = 0.5 * noise", "low = (first + second) / 2", "place = size / 2**20", "last = 2**bits - 1",
    ],
)  # fmt: skip
def test_other_halves_are_left_alone(source: str) -> None:
    assert halves(ast.parse(source)) == []


MOST_LINES, MOST_OF_A_FUNCTION = 400, 60
NATIVE = sorted(file for file in (SOURCE.parents[1] / "native").rglob("*") if file.suffix in (".cpp", ".hpp", ".inl"))
OPENING = re.compile(r"^( {0,2})(?!namespace|struct|class|enum|union|extern)[\w~].*\{$")


def functions(file: Path) -> dict[str, int]:
    """Name or first line of every function -> its lines, from the signature to the end."""
    if file.suffix == ".py":
        nodes = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]
        return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
    lines, found = file.read_text().splitlines(), {}
    for number, line in enumerate(lines):
        if opened := OPENING.match(line):
            rest = lines[number + 1 :]
            found[line] = 2 + next((n for n, end in enumerate(rest) if end.startswith(f"{opened[1]}}}")), len(rest))
    return found


@each("file", [*FILES, *NATIVE])
def test_files_and_functions_can_be_held_in_mind(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES
    assert {name: lines for name, lines in functions(file).items() if lines > MOST_OF_A_FUNCTION} == {}


def test_long_functions_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int f(int x) {\n" + "  ++x;\n" * 70 + "}\n")
    (tmp_path / "a.py").write_text("def f(x):\n" + "    x += 1\n" * 70)
    assert functions(tmp_path / "a.cpp") == {"int f(int x) {": 72}
    assert functions(tmp_path / "a.py") == {"f": 71}
