"""The command line, run in process: what it prints, what it writes, and what it refuses.

A refusal is one message on stderr, exit code 2, nothing on stdout, and a directory that is as it was, hidden files
included: no OUT, no .OUT.partial, no .OUT.work.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer.rich_utils
from safetensors.torch import load_file, save_file

import conftest
from conftest import Interrupt
from matquant import cli
from matquant.calibration import calibration_text
from matquant.export import FORMATS
from matquant.format.contents import summarise
from matquant.format.manifest import PLAN_CACHE
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.format.verify import verify_checkpoint
from matquant.methods import qat

UP = "model.layers.1.mlp.up_proj"
QAT = ("--method", "qat", "--steps", "3", "--batch-size", "2", "--seq-len", "16", "--save-every", "1", "--lr", "0.001")
SMALL = ("--scope", "ffn", "--group-size", "channel")
TORCHLESS = """
import contextlib, io, json, sys
for name in ("torch", "transformers", "tokenizers", "compressed_tensors", "matplotlib"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from matquant.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = ["matquant", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:  # ends with an exit code even when all went well
            found.append((stop.code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""


# Running --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did: exit code, stdout, stderr, without colours."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]
Refuse = Callable[..., None]
Arguments = Callable[..., tuple[object, ...]]  # makes a command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments, columns=140): the command line in this process."""
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(typer.rich_utils, "FORCE_TERMINAL", None)
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", None)

    def call(*arguments: object, columns: int = 140) -> Result:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["matquant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()  # ends with an exit code even when all went well
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capsys.readouterr())
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    return call


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything in a directory, hidden files too, with contents."""
    return {
        str(file.relative_to(directory)): file.read_bytes() if file.is_file() else None for file in directory.rglob("*")
    }


def assert_refused(result: Result, message: str) -> None:
    """Exit code 2, this message and nothing else."""
    assert result.code == 2, f"exit code {result.code}: {result.err}"
    assert result.err.lstrip("\n") == f"error: {message}\n"
    assert result.out == ""


def assert_unchanged(directory: Path, before: Mapping[str, bytes | None]) -> None:
    after = snapshot(directory)
    assert sorted(after) == sorted(before), f"files: {sorted(set(after) ^ set(before))}"
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, f"changed: {changed}"


@pytest.fixture
def refuse(run: Run, tmp_path: Path) -> Refuse:
    """refuse(*arguments, message=...): the command is refused with exactly this, and writes nothing.

    Instead of ``message``, ``naming`` gives parts that the message must have.
    """

    def call(*arguments: object, message: str = "", naming: tuple[str, ...] = ()) -> None:
        before = snapshot(tmp_path)
        result = run(*arguments)
        if naming:
            message = result.err.strip("\n").removeprefix("error: ")
            assert "Traceback" not in message
            for part in naming:
                assert part in message
        assert_refused(result, message)
        assert_unchanged(tmp_path, before)

    return call


@pytest.fixture
def start(llama: Path, text_file: Path, tmp_path: Path) -> Arguments:
    """start(*more, model=llama): the arguments of a short training run to tmp_path/out."""

    def arguments(*more: object, model: Path | str = llama) -> tuple[object, ...]:
        options = QAT if "--method" not in more or "qat" in more else ()
        return ("quantize", model, "-o", tmp_path / "out", "--text", text_file, *SMALL, *options, *more)

    return arguments


@pytest.fixture(scope="session")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model, not to be changed."""
    return conftest.quantize(llama, tmp_path_factory.mktemp("cli") / "checkpoint", method="rtn")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of the float model, to be broken."""
    return shutil.copytree(llama, tmp_path / "broken")


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_comparisons_fail_on_any_difference(tmp_path: Path) -> None:
    refused = Result(2, "", "error: no\n")
    assert_refused(refused, "no")
    for change in ({"code": 1}, {"code": 0}, {"out": "wrote"}, {"err": "error: no\nTraceback\n"}, {"err": "no\n"}):
        with pytest.raises(AssertionError):
            assert_refused(dataclasses.replace(refused, **change), "no")
    (tmp_path / "file").write_text("a")
    before = snapshot(tmp_path)
    assert_unchanged(tmp_path, before)
    (tmp_path / "file").write_text("b")
    with pytest.raises(AssertionError, match=r"changed: \['file'\]"):
        assert_unchanged(tmp_path, before)
    (tmp_path / ".out.work").mkdir()
    with pytest.raises(AssertionError, match=r"files: \['\.out\.work'\]"):
        assert_unchanged(tmp_path, before)


# The model ------------------------------------------------------------------------------------------------------------

KIND = "give a Hugging Face model directory, a GGUF file or a hub id"


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "../nowhere", "a/b/c", "/nowhere/at/all"])
def test_an_unknown_model_is_refused(model: str, refuse: Refuse, start: Arguments) -> None:
    for more in ((), ("--method", "rtn")):
        refuse(*start(*more, model=model), message=f"{model}: no such model directory; {KIND}")


def test_a_directory_or_file_that_is_no_model_is_refused(refuse: Refuse, start: Arguments, text_file: Path) -> None:
    refuse(*start(model=text_file), message=f"{text_file} is a file, not a model directory; {KIND}")
    directory = text_file.parent
    refuse(*start(model=directory), message=f"{directory} has no config.json; {KIND}")


LOADABLE = "give a directory with config.json and safetensors, or a hub id that this machine can reach"


@pytest.mark.parametrize("config", ["{", "[]", "{}", "null", '{"model_type": "nope"}', "\0"])
def test_a_model_with_a_broken_configuration_is_refused(
    config: str, refuse: Refuse, start: Arguments, broken: Path
) -> None:
    (broken / "config.json").write_text(config)
    refuse(*start("--method", "rtn", model=broken), naming=(f"{broken} cannot be loaded as a model (", LOADABLE))


def test_a_model_with_broken_weights_is_refused(refuse: Refuse, start: Arguments, broken: Path) -> None:
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:100], b""):
        file.write_bytes(content)
        refuse(*start("--method", "rtn", model=broken), naming=(f"{broken} cannot be loaded as a model (", LOADABLE))
    file.unlink()
    refuse(*start("--method", "rtn", model=broken), naming=(f"{broken} cannot be loaded as a model (", LOADABLE))


def test_a_model_that_lacks_a_weight_is_refused(refuse: Refuse, start: Arguments, broken: Path) -> None:
    edit_weights(broken, lambda tensors: tensors.pop(f"{UP}.weight"))
    refuse(*start("--method", "rtn", model=broken), naming=(str(broken), f"{UP}.weight"))


def test_a_model_with_a_weight_of_another_shape_is_refused(refuse: Refuse, start: Arguments, broken: Path) -> None:
    edit_weights(broken, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(49, 32)}))
    refuse(*start("--method", "rtn", model=broken), naming=(str(broken), f"{UP}.weight"))


def test_a_model_without_tokenizer_is_refused_when_text_is_needed(
    refuse: Refuse, run: Run, start: Arguments, broken: Path
) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    refuse(*start(model=broken), naming=(f"{broken} has no usable tokenizer (", "put tokenizer.json beside the model"))
    assert run(*start("--method", "rtn", model=broken)).code == 0


def test_a_quantised_model_is_refused(refuse: Refuse, start: Arguments, checkpoint: Path) -> None:
    message = f"{checkpoint} is quantised already, by matquant; give the float model it was made from"
    refuse(*start(model=checkpoint), message=message)


def test_a_model_without_linears_in_scope_is_refused(refuse: Refuse, start: Arguments, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes, **ends))
    model.save_pretrained(tmp_path / "gpt2")  # its linears are Conv1D
    for scope in ("ffn", "attention", "all"):
        message = (
            f"GPT2LMHeadModel has no linear layer in scope '{scope}' (found 0 in its decoder layers); "
            "use another --scope"
        )
        refuse(*start("--scope", scope, "--method", "rtn", model=tmp_path / "gpt2"), message=message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "qat"])
def test_a_weight_that_is_no_number_is_named(
    method: str, value: float, refuse: Refuse, start: Arguments, broken: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"][3, 5] = value
        tensors[f"{UP}.weight"][7, 0] = value

    edit_weights(broken, change)
    message = f"{UP} has 2 NaN or infinite weights out of 1536; repair the tensor, or exclude this module path"
    refuse(*start("--method", method, model=broken), message=message)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_weight_that_is_no_number_is_named_where_nothing_is_quantised_too(
    name: str, refuse: Refuse, start: Arguments, broken: Path
) -> None:
    edit_weights(broken, lambda tensors: tensors[name][1].fill_(float("nan")))
    refuse(*start("--method", "rtn", model=broken), naming=(name.removesuffix(".weight"), "has 32 NaN or infinite"))


# The text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["quantize", "eval"])
def with_text(request: pytest.FixtureRequest, llama: Path, checkpoint: Path, tmp_path: Path) -> Arguments:
    """with_text(file, *more): the arguments of quantize and of eval with this text."""

    def arguments(file: Path, *more: object) -> tuple[object, ...]:
        if request.param == "eval":
            return ("eval", checkpoint, "--bits", "8", "--text", file, *more)
        return ("quantize", llama, "-o", tmp_path / "out", "--method", "qat", "--steps", "1", "--text", file, *more)

    return arguments


def test_a_missing_text_is_named(refuse: Refuse, with_text: Arguments, tmp_path: Path, text_file: Path) -> None:
    for file in (tmp_path / "nowhere.txt", tmp_path):
        message = f"--text {file}: no such file; give a UTF-8 text file"
        refuse(*with_text(file), message=message)
        refuse(*with_text(text_file, "--text", file), message=message)
        refuse(*with_text(text_file, "--text", file), message=message)


@pytest.mark.parametrize("content", ["", " \n\t", "<|endoftext|>", "\n<|endoftext|> <|endoftext|>\n"])
def test_an_empty_text_is_named(content: str, refuse: Refuse, with_text: Arguments, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    refuse(*with_text(file), message=f"--text {file} is empty; give a UTF-8 text file")


def test_a_text_that_is_not_utf8_is_named(refuse: Refuse, with_text: Arguments, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("a café".encode("latin-1"))
    refuse(*with_text(file), message=f"--text {file} is not UTF-8 (unexpected end of data at byte 5); convert it")
    file.write_bytes(b"abc\xffdef")
    refuse(*with_text(file), message=f"--text {file} is not UTF-8 (invalid start byte at byte 3); convert it")


def test_a_text_shorter_than_a_window_is_refused(
    refuse: Refuse, run: Run, with_text: Arguments, tmp_path: Path
) -> None:
    file = tmp_path / "short.txt"
    window = ("--seq-len", "32")
    file.write_text("x" * 31)  # and a beginning of sequence: 32 tokens, one too few
    more = "give more text or a smaller --seq-len"
    message = f"the text has 32 tokens, shorter than one sequence of 32 + 1; {more}"
    refuse(*with_text(file, *window), message=message)
    file.write_text("x" * 32)
    assert run(*with_text(file, *window)).code == 0


def test_a_window_longer_than_the_context_is_refused(
    refuse: Refuse, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model("opt")  # it has no positions beyond its context
    conftest.quantize(model, tmp_path / "opt", method="rtn")
    text = ("--text", text_file, "--seq-len", "65")
    refuse(
        "quantize", model, "-o", tmp_path / "out", "--method", "qat", "--steps", "1", *text, naming=("seq_len=65", "64")
    )
    refuse("eval", tmp_path / "opt", "--bits", "8", *text, naming=("seq_len=65", "64"))


@pytest.mark.parametrize(("method", "more"), [("qat", {"steps": 1}), ("gptq", {}), ("omniquant", {"steps": 1})])
def test_a_window_is_by_default_no_longer_than_the_context(
    method: str, more: dict[str, int], family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = more if method == "qat" else {"samples": 2, **more}
    settings = {"model": family_model("opt"), "method": method, "text": [text_file], **options}
    for name, length in (("default", {}), ("context", {"seq_len": 64})):
        conftest.quantize(out=tmp_path / name, **settings, **length)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("default", "context")]
    assert files[0] == files[1]


def test_text_is_needed(refuse: Refuse, llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    message = "method 'qat' needs a training corpus; give --text FILE, or use --recipe balanced"
    refuse("quantize", llama, "-o", tmp_path / "out", "--method", "qat", message=message)
    refuse("eval", checkpoint, message="eval needs text or tasks; give --text FILE or --tasks arc_easy,boolq")


# Widths, objectives and weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "wrong"), [("9", 9), ("0", 0), ("8,9", 9), ("-1", -1), ("8,4,16,2", 16)])
def test_evaluating_at_a_width_outside_1_to_8_is_refused(
    bits: str, wrong: int, refuse: Refuse, checkpoint: Path, text_file: Path
) -> None:
    message = f"bits={wrong} is not a width; use one of 1 to 8"
    refuse("eval", checkpoint, "--text", text_file, "--bits", bits, message=message)


@pytest.mark.parametrize("bits", ["", "x", "4.5", "8,,2", "8;2", "8,"])
def test_widths_that_are_no_numbers_are_refused(bits: str, refuse: Refuse, checkpoint: Path, text_file: Path) -> None:
    message = f"--bits {bits!r} is not a list of numbers; separate them with commas, such as 8,4,2"
    refuse("eval", checkpoint, "--text", text_file, "--bits", bits, message=message)


@pytest.mark.parametrize("bits", [0, 9, -2])
def test_a_baseline_outside_1_to_8_is_refused(bits: int, refuse: Refuse, start: Arguments) -> None:
    message = f"bits={bits} is not a width; use one of 1 to 8"
    refuse(*start("--baseline-bits", bits), message=message)


UNREADABLE: list[tuple[str, int, str]] = [
    ("9", 0, "width 9 is outside 1..8"),
    ("8,0", 2, "width 0 is outside 1..8"),
    ("8,4,12", 4, "width 12 is outside 1..8"),
    ("8,4,8->4;9", 4, "width 9 is outside 1..8"),
    ("", 0, "cannot read ''"),
    ("8->", 0, "cannot read '8->'"),
    ("8,4,2,->2", 6, "cannot read '->2'"),
    ("8,,2", 2, "cannot read ''"),
    ("8,4,2,", 6, "cannot read ''"),
    ("8,four,2", 2, "cannot read 'four'"),
    ("8,4,gp->2", 4, "cannot read 'gp->2'"),
    ("8,4,-2", 4, "cannot read '-2'"),
    ("8,4.0", 2, "cannot read '4.0'"),
    ("8,2->4", 2, "width 4 cannot learn from width 2"),
    ("8,4,4->4", 4, "width 4 cannot learn from width 4"),
    ("8,4,4", 4, "'4' names no teacher, or names it twice"),
    ("8,4;2", 2, "'4;2' names no teacher, or names it twice"),
    ("8, x", 3, "cannot read 'x'"),
]


@pytest.mark.parametrize(("objective", "place", "problem"), UNREADABLE, ids=[case[0] for case in UNREADABLE])
def test_an_objective_that_does_not_parse_is_pointed_at(
    objective: str, place: int, problem: str, refuse: Refuse, start: Arguments
) -> None:
    message = (
        f"objective does not parse: {problem}\n    {objective}\n    {' ' * place}^\n"
        'give widths and distillation terms such as "8,4,2" or "8,4,2,8->4;2" or "8,4,2,fp->2"'
    )
    refuse(*start("--objective", objective), message=message)


def test_widths_without_8_are_refused(refuse: Refuse, start: Arguments) -> None:
    for objective, widths in (("4,2", "4, 2"), ("6,4,2,fp->2", "6, 4, 2"), ("4,4->2", "4, 2")):
        message = (
            f"objective {objective!r} trains widths {widths} but not 8, which the checkpoint stores; "
            "add 8, or name a single width for single precision (S.P.)"
        )
        refuse(*start("--objective", objective), message=message)


def test_a_teacher_that_is_not_trained_is_refused(refuse: Refuse, start: Arguments) -> None:
    message = "objective '8,2,6->2' distils from width 6, which it does not train; add 6"
    refuse(*start("--objective", "8,2,6->2"), message=message)


@pytest.mark.parametrize("weights", ["1,1", "1,1,1,1", "1"])
def test_weights_are_one_for_each_width(weights: str, refuse: Refuse, start: Arguments) -> None:
    count = weights.count(",") + 1
    message = f"{count} weights for the 3 widths 8, 4, 2; give one per width, in that order"
    refuse(*start("--weights", weights), message=message)


@pytest.mark.parametrize("weights", ["-1,1,1", "1,1,-0.5", "0,0,0", "nan,1,1", "1,inf,1"])
def test_weights_are_numbers_of_at_least_0(weights: str, refuse: Refuse, start: Arguments) -> None:
    shown = ", ".join(str(float(weight)) for weight in weights.split(","))
    message = f"weights {shown} are not valid; use numbers of at least 0, not all 0"
    refuse(*start("--weights", weights), message=message)


@pytest.mark.parametrize("weights", ["", "a,b,c", "1,,1", "1 1 1"])
def test_weights_that_are_no_numbers_are_refused(weights: str, refuse: Refuse, start: Arguments) -> None:
    message = f"--weights {weights!r} is not a list of numbers; separate them with commas, such as 8,4,2"
    refuse(*start("--weights", weights), message=message)


# Choices and numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "message"), [
    ("--rule", "rule='nope' is not known; use one of prefix, round, extra"),
    ("--scope", "scope='nope' is not known; use one of ffn, attention, linears, all"),
    ("--recipe", "recipe='nope' is not known; use one of fast, balanced, best, paper"),
    ("--method", "method='nope' is not known; use one of rtn, gptq, omniquant, qat, distill"),
    ("--affine", "affine='nope' is not known; use one of none, refit, learned"),
    ("--scale-dtype", "scale_dtype='nope' is not known; use one of bfloat16, float32"),
    ("--zero-point", "zero_point='nope' is not known; use one of stored, midrange"),
    ("--group-size", "--group-size 'nope' is not a group size; use a number, 'auto' or 'channel'"),
])  # fmt: skip
def test_a_choice_that_is_not_known_is_refused(flag: str, message: str, refuse: Refuse, start: Arguments) -> None:
    refuse(*start(flag, "nope"), message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--rule", "round"),
            "does not work with rule='round', whose codes are not symmetric; use zero_point='stored', or rule='prefix'",
        ),
        (
            ("--asymmetric",),
            "does not work with symmetric=False, whose codes are not symmetric; "
            "use zero_point='stored', or symmetric=True",
        ),
        (
            ("--affine", "none"),
            "needs per-width scales, found affine='none'; use affine='refit'",
        ),
    ],
)
def test_midrange_zero_points_need_codes_that_lie_about_it(
    options: tuple[str, ...], message: str, refuse: Refuse, start: Arguments
) -> None:
    refuse(*start("--zero-point", "midrange", *options), message=f"zero_point='midrange' {message}")


def test_rounding_learns_nothing(refuse: Refuse, start: Arguments) -> None:
    message = "--affine learned needs a method that trains, found method 'rtn'; use --affine refit or none"
    refuse(*start("--method", "rtn", "--affine", "learned"), message=message)


def test_a_group_size_that_does_not_divide_is_refused(refuse: Refuse, start: Arguments) -> None:
    gate, down = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"
    for size, width, path, fits in ((7, 32, gate, "16, 32"), (64, 32, gate, "16, 32"), (32, 48, down, "16")):
        message = (
            f"group_size={size} does not divide in_features={width} of {path}; "
            f"use one of {fits}, or exclude this module path"
        )
        refuse(*start("--group-size", size), message=message)
    refuse(*start("--group-size", "0"), naming=("group_size=0", gate))


@pytest.mark.parametrize("size", ["-16", "16.0", "²", "", "channels"])
def test_a_group_size_that_is_no_number_is_refused(size: str, refuse: Refuse, start: Arguments) -> None:
    message = f"--group-size {size!r} is not a group size; use a number, 'auto' or 'channel'"
    refuse(*start("--group-size", size), message=message)


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--seq-len", "--accumulate", "--save-every", "--threads"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_above_0(flag: str, value: int, refuse: Refuse, start: Arguments) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    refuse(*start(flag, value), message=f"{name}={value}; give a number above 0")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_learning_rate_is_a_number_above_0(value: str, refuse: Refuse, start: Arguments) -> None:
    refuse(*start("--lr", value), naming=(f"lr={float(value)}; give a ", "above 0"))


@pytest.mark.parametrize("device", ["nope", "", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str, refuse: Refuse, start: Arguments) -> None:
    refuse(*start("--device", device), naming=("device", repr(device), "cpu"))


@pytest.mark.parametrize("verb", ["eval", "plan", "report"])
def test_measuring_on_a_device_that_is_not_there_is_refused(
    verb: str, refuse: Refuse, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    more = {"eval": (), "plan": ("-o", tmp_path / "p", "--bits-per-weight", 4), "report": ("-o", tmp_path / "r.html")}
    arguments = (verb, checkpoint, *more[verb], "--text", text_file, "--device", "cuda:99")
    refuse(*arguments, naming=("device='cuda:99' is not available", "use one of cpu"))


def test_a_device_whose_memory_is_full_is_named(
    refuse: Refuse, checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8.00 GiB. See ...")

    monkeypatch.setattr("matquant.measure.with_torch.load", load)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB; use a smaller --batch-size or --seq-len, or --device cpu"
    refuse("eval", checkpoint, "--text", text_file, message=message)


def test_a_seed_is_at_least_0(refuse: Refuse, start: Arguments) -> None:
    refuse(*start("--seed", "-1"), naming=("seed=-1; give a number", "0"))


@pytest.mark.parametrize("flag", ["--seq-len", "--stride", "--max-tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_of_an_evaluation_are_above_0(
    flag: str, value: int, refuse: Refuse, checkpoint: Path, text_file: Path
) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    message = f"{name}={value}; give a number above 0"
    refuse("eval", checkpoint, "--text", text_file, flag, value, message=message)


def test_a_stride_beyond_the_window_is_refused(refuse: Refuse, checkpoint: Path, text_file: Path) -> None:
    message = "stride=65 is outside 1..64, the sequence length; use a value inside"
    refuse("eval", checkpoint, "--text", text_file, "--stride", "65", message=message)


@pytest.mark.parametrize("skipped", [300, 1000, -1])
def test_skipping_every_document_is_refused(skipped: int, refuse: Refuse, checkpoint: Path, text_file: Path) -> None:
    arguments = ("eval", checkpoint, "--text", text_file, "--skip-documents", skipped)
    refuse(*arguments, naming=(f"skip_documents={skipped}",))


@pytest.mark.parametrize("arguments", [
    ("quantize",),
    ("quantize", "model"),
    ("quantize", "model", "-o"),
    ("quantize", "model", "-o", "out", "--nope"),
    ("quantize", "model", "-o", "out", "--steps", "many"),
    ("eval",),
    ("inspect",),
    ("verify",),
    ("inspect", "a", "b"),
    ("nope",),
])  # fmt: skip
def test_a_command_that_does_not_parse_ends_with_2(
    arguments: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 2
    assert "─ Error ─" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_printed_as_it_is_and_once(run: Run) -> None:
    for name in (
        "/nowhere/[bold]x[/bold]",
        "/nowhere/[/x]",
        "/nowhere/:smile:",
        "/nowhere/\\[b]",
        "/nowhere" + "/much_too_deep" * 20,
    ):
        result = run("verify", name)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: {name}: no such directory; give a checkpoint made by matquant quantize\n"


def test_a_refused_run_prints_its_message_and_nothing_else(run: Run, start: Arguments) -> None:
    assert (
        run(*start("--scope", "nope")).err
        == "error: scope='nope' is not known; use one of ffn, attention, linears, all\n"
    )


# The output -----------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_not_replaced_without_being_asked(
    refuse: Refuse, run: Run, start: Arguments, copy: Path, tmp_path: Path
) -> None:
    out = copy.rename(tmp_path / "out")
    for method in ("rtn", "qat"):
        message = f"{out} exists; use another -o, or --overwrite to replace it"
        refuse(*start("--method", method), message=message)
    assert run(*start("--method", "rtn", "--overwrite", "--rule", "round")).code == 0
    assert verify_checkpoint(out).spec.rule == "round"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_directory_we_are_in_may_be_replaced(
    run: Run, start: Arguments, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    for method in ("rtn", "qat"):
        arguments = ["." if argument == tmp_path / "out" else argument for argument in start("--method", method)]
        assert run(*arguments).code == 2  # it exists
        assert run(*arguments, "--overwrite").code == 0
        assert verify_checkpoint(copy).spec.method == method
        assert [file.name for file in tmp_path.iterdir()] == ["copy"]
        monkeypatch.chdir(copy)  # a new directory of that name


def test_an_output_that_is_no_checkpoint_is_never_replaced(refuse: Refuse, start: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    message = f"{out} is not a matquant checkpoint and will not be replaced; use another -o"
    refuse(*start("--overwrite"), message=message)
    shutil.rmtree(out)
    out.write_text("years of work")
    refuse(*start("--overwrite"), message=message)


def disk_is_full(*_arguments: Any, **_options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_of_config_is_full(file: Path, _content: bytes) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@pytest.mark.parametrize(("where", "fail"), [
    ("matquant.format.write.write_safetensors", disk_is_full),
    ("pathlib.Path.write_bytes", disk_of_config_is_full),
])  # fmt: skip
def test_a_full_disk_is_said_and_leaves_nothing(
    where: str,
    fail: Callable[..., Any],
    refuse: Refuse,
    start: Arguments,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _directory: usage)
    monkeypatch.setattr(where, fail)
    message = (
        f"{tmp_path / 'out'} was not written: no space left on the device ({10**12} bytes free); "
        "free some space, or use another path"
    )
    before = snapshot(tmp_path)
    result = run(*start("--method", "rtn"))
    assert (result.code, result.out, result.err.splitlines()[-1]) == (2, "", f"error: {message}")
    assert_unchanged(tmp_path, before)


def test_a_disk_that_is_too_small_is_said_before_any_work(
    refuse: Refuse,
    start: Arguments,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    usage = shutil._ntuple_diskusage(10**12, 10**12 - needed + 1, needed - 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _directory: usage)
    message = (
        f"{tmp_path / 'out'} needs about {needed} bytes, its disk has {needed - 1} free; "
        "free some space, or use another path"
    )
    for method in ("rtn", "qat"):
        refuse(*start("--method", method), message=message)


def test_a_disk_that_fills_up_in_training_keeps_the_state_there_was(
    run: Run, start: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    save = qat.save_state

    def save_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            monkeypatch.setattr("matquant.methods.parts.sealed.write_safetensors", disk_is_full)
        save(*arguments)

    monkeypatch.setattr(qat, "save_state", save_once)
    with monkeypatch.context():
        result = run(*start())
    assert result.code == 2
    assert "no space left on the device" in result.err
    assert "Traceback" not in result.err
    assert [file.name for file in tmp_path.iterdir()] == [".out.work"]
    monkeypatch.undo()
    assert not list((tmp_path / ".out.work").glob("*.partial"))
    assert (tmp_path / ".out.work" / "state.safetensors").is_file()


# Interrupted runs -----------------------------------------------------------------------------------------------------


def test_the_table_of_formats_fits_a_terminal_and_gives_reasons(run: Run, refuse: Refuse, checkpoint: Path) -> None:
    shown = run("export", checkpoint, "--explain", columns=80).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert re.search(r"int8 .*int6 .*int4 .*int3 .*int2 ", shown)
    assert "int5" not in shown
    for name in FORMATS:
        assert f"│ {name.replace('-', '-│').split('│')[0]} " in shown
    assert "--to gguf cannot hold" in shown
    message = "--explain prints what is exact, --requantise is not; drop one of them"
    refuse("export", checkpoint, "--explain", "--requantise", message=message)


@pytest.fixture
def interrupted(run: Run, start: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work directory of a run that was interrupted in its third step."""
    with monkeypatch.context() as patch:
        patch.setattr(qat, "train_step", Interrupt(qat.train_step, 3))
        result = run(*start())
    assert result.code == 130
    assert "Traceback" not in result.err
    assert [file.name for file in tmp_path.iterdir()] == [".out.work"]
    return tmp_path / ".out.work"


def test_an_interrupted_run_says_how_to_go_on(run: Run, start: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "train_step", Interrupt(qat.train_step, 2))
    result = run(*start())
    assert result.code == 130
    assert (
        result.err.splitlines()[-1]
        == "interrupted; to continue a run that had begun its work, repeat the command with --resume"
    )


def test_an_interrupted_run_is_neither_lost_nor_continued_unasked(
    interrupted: Path, refuse: Refuse, start: Arguments
) -> None:
    message = f"{interrupted} holds an interrupted run; use --resume to continue it, or --overwrite to start again"
    refuse(*start(), message=message)


def test_there_is_nothing_to_resume_without_an_interrupted_run(
    refuse: Refuse, start: Arguments, tmp_path: Path
) -> None:
    message = f"--resume found no interrupted run in {tmp_path / '.out.work'}; drop --resume to start one"
    refuse(*start("--resume"), message=message)
    refuse(*start("--resume", "--overwrite"), message=message)
    refuse(*start("--resume", "--method", "rtn"), message=message)


@pytest.mark.parametrize(("flag", "given", "name", "ours", "theirs"), [
    ("--seed", "1", "seed", "1", "0"),
    ("--rule", "round", "rule", "'round'", "'prefix'"),
    ("--steps", "4", "steps", "4", "3"),
    ("--lr", "0.002", "lr", "0.002", "0.001"),
])  # fmt: skip
def test_a_run_is_not_resumed_with_other_settings(
    flag: str,
    given: str,
    name: str,
    ours: str,
    theirs: str,
    interrupted: Path,
    refuse: Refuse,
    start: Arguments,
) -> None:
    assert (interrupted / "state.safetensors").is_file()
    message = (
        f"--resume needs {name}={theirs} as in the interrupted run, found {ours}; "
        "use the same settings, or use --overwrite to start again"
    )
    refuse(*start("--resume", flag, given), message=message)


def assert_same_model(found: Path, expected: Path) -> None:
    """The same tensors, bit for bit."""
    names = sorted(file.name for file in expected.glob("*.safetensors"))
    assert sorted(file.name for file in found.glob("*.safetensors")) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), f"{name} differs"


def steps_logged(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def uninterrupted(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``start`` makes if nothing goes wrong."""
    numbers = {"steps": 3, "batch_size": 2, "seq_len": 16, "save_every": 1, "lr": 0.001}
    return conftest.quantize(llama, tmp_path_factory.mktemp("whole") / "out", text=[text_file], **numbers)


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    flag: str,
    interrupted: Path,
    uninterrupted: Path,
    run: Run,
    start: Arguments,
    tmp_path: Path,
) -> None:
    assert interrupted.is_dir()
    assert run(*start(flag)).code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert_same_model(tmp_path / "out", uninterrupted)
    assert steps_logged(tmp_path / "out") == [1, 2, 3]


def test_a_run_interrupted_before_its_first_state_starts_again(
    uninterrupted: Path,
    run: Run,
    start: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = ("--save-every", "100")
    with monkeypatch.context() as patch:
        patch.setattr(qat, "train_step", Interrupt(qat.train_step, 3))
        assert run(*start(*late)).code == 130
    assert run(*start(*late, "--resume")).code == 0
    assert_same_model(tmp_path / "out", uninterrupted)
    assert steps_logged(tmp_path / "out") == [1, 2, 3]


def test_a_failed_start_keeps_an_interrupted_run(
    interrupted: Path, refuse: Refuse, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    assert interrupted.is_dir()
    start = ("quantize", llama, "-o", tmp_path / "out", *QAT)
    nowhere, short = tmp_path / "nowhere", tmp_path / "short"
    short.write_text("too short")
    for flag in ("--resume", "--overwrite"):
        refuse(*start, flag, "--text", nowhere, message=f"--text {nowhere}: no such file; give a UTF-8 text file")
        refuse(*start, flag, "--text", short, naming=("the text has 10 tokens, shorter than one sequence of 16 + 1",))
        refuse(*start, flag, "--text", text_file, "--scope", "nope", naming=("scope='nope' is not known",))


def test_a_damaged_state_is_refused(interrupted: Path, refuse: Refuse, start: Arguments) -> None:
    state = interrupted / "state.safetensors"
    whole = state.read_bytes()
    for content in (b"", whole[:100], whole[:-1]):
        state.write_bytes(content)
        refuse(*start("--resume"), naming=(str(state), "--overwrite"))


# Quantise, inspect, verify, evaluate ----------------------------------------------------------------------------------


def test_quantising_says_what_it_wrote_and_what_to_try(run: Run, llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", llama, "-o", out, "--method", "rtn", *SMALL)
    assert result.code == 0
    assert result.err.startswith("method       rtn: round to nearest; needs no text\nlayers       6 (--scope ffn)")
    assert result.out == f"wrote {out}; try: matquant eval {out} --text FILE\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert_same_model(out, checkpoint)


def test_quantising_takes_every_option_of_the_record(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--rule", "extra", "--scope", "attention", "--group-size", "16", "--asymmetric", "--affine", "none")
    more = ("--scale-dtype", "float32")
    assert run("quantize", llama, "-o", out, "--method", "rtn", *options, *more).code == 0
    spec = verify_checkpoint(out).spec
    assert spec.format == 1
    assert dataclasses.asdict(spec) == {
        "rule": "extra",
        "widths": (),
        "slices": (),
        "group_size": 16,
        "symmetric": False,
        "scale_dtype": "float32",
        "scope": "attention",
        "method": "rtn",
        "objective": "",
        "weights": (),
        "baseline_bits": None,
        "steps": 0,
        "seed": 0,
        "data_sha256": "",
        "stored_bits": 8,
        "zeros": "own",
        "grid": "uniform",
        "head_bits": None,
        "experts": None,
    }


def test_training_records_what_it_was_asked(run: Run, start: Arguments, tmp_path: Path) -> None:
    options = ("--objective", "8,4,8->2", "--weights", "1,0.5,2", "--seed", "7", "--rule", "round")
    assert run(*start(*options)).code == 0
    spec = verify_checkpoint(tmp_path / "out").spec
    assert (spec.method, spec.rule, spec.widths, spec.weights) == ("qat", "round", (8, 4, 2), (1.0, 0.5, 2.0))
    assert (spec.objective, spec.seed, spec.steps, spec.baseline_bits) == ("8,4,8->2", 7, 3, None)
    assert len(spec.data_sha256) == 64
    assert steps_logged(tmp_path / "out") == [1, 2, 3]


def test_training_takes_several_texts_and_leaves_no_work(
    run: Run, start: Arguments, text_file: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    second = tmp_path / "second.txt"
    second.write_text("Something else. " * 20)
    hashes = set()
    for arguments in (start("--text", second), (*start()[:4], *start()[4:], "--text", second)):
        assert run(*arguments).code == 0
        hashes.add(verify_checkpoint(tmp_path / "out").spec.data_sha256)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "second.txt"]
        shutil.rmtree(tmp_path / "out")
    assert len(hashes) == 1
    assert hashes != {verify_checkpoint(uninterrupted).spec.data_sha256}


def test_inspecting_shows_every_width_with_its_honest_bits(run: Run, checkpoint: Path) -> None:
    result = run("inspect", checkpoint)
    assert (result.code, result.err) == (0, "")
    found = open_checkpoint(checkpoint)
    shown = {row[0]: row[1:] for row in re.findall(r"│ +int(\d) │ +([\d,]+) │ +([\d,]+) │ +([\d.]+) │", result.out)}
    assert list(shown) == ["8", "7", "6", "5", "4", "3", "2", "1"]
    for bits, cells in shown.items():
        row = summarise(found)["widths"][int(bits)]
        sizes = (f"{row['bytes']:,.0f}", f"{row['model_bytes']:,.0f}")
        assert cells == (*sizes, f"{row['bits_per_weight']:.3f}")
        plan = dict.fromkeys(found.shapes, int(bits))
        assert row["bits_per_weight"] == bits_per_weight(found, plan)
    for fact in (
        "rule            prefix",
        "trained widths  none",
        "9,216 weights in 6 layers (ffn)",
        str(checkpoint),
    ):
        assert fact in result.out


def test_inspecting_an_extra_checkpoint_shows_overflow_and_the_papers_bits(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    assert run("quantize", llama, "-o", tmp_path / "out", "--method", "rtn", "--rule", "extra").code == 0
    table = run("inspect", tmp_path / "out").out
    assert "overflow" in table
    assert "paper's bits" in table
    values = json.loads(run("inspect", tmp_path / "out", "--json").out)
    two = values["widths"]["2"]
    assert two["paper_bits"] == 2 + two["overflow"]
    assert two["bits_per_weight"] > two["paper_bits"]
    for bits in range(1, 8):  # the honest bits, the paper's beside them
        row = values["widths"][str(bits)]
        shown = rf"{row['bits_per_weight']:.3f} │ +{row['paper_bits']:.3f} │ +{row['overflow']:.2%} │"
        assert re.search(shown, table), shown


def test_inspecting_as_json_is_one_line_of_the_same_numbers(run: Run, checkpoint: Path) -> None:
    result = run("inspect", checkpoint, "--json", columns=40)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1
    expected = summarise(open_checkpoint(checkpoint))
    assert json.loads(result.out) == json.loads(json.dumps(expected))
    assert list(json.loads(result.out)["widths"]) == [str(bits) for bits in range(1, 9)]


def test_inspecting_fits_a_narrow_terminal(run: Run, copy: Path) -> None:
    result = run("inspect", copy, columns=80)
    assert result.code == 0
    assert max(len(line.rstrip()) for line in result.out.splitlines() if str(copy) not in line) <= 80


def test_verifying_says_that_a_checkpoint_is_whole(run: Run, checkpoint: Path) -> None:
    result = run("verify", checkpoint)
    assert result == Result(0, f"{checkpoint} is intact: 6 quantised weights, rule prefix\n", "")


@pytest.mark.parametrize("verb", ["verify", "inspect", "eval"])
def test_a_damaged_checkpoint_is_refused_by_every_verb(verb: str, refuse: Refuse, copy: Path, text_file: Path) -> None:
    more = ("--text", text_file) if verb == "eval" else ()
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    again = "copy it again or write the checkpoint again"
    file.write_bytes(whole[:-1])
    message = f"{file} has {len(whole) - 1} bytes, the manifest says {len(whole)}; {again}"
    refuse(verb, copy, *more, message=message)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuse(verb, copy, *more, naming=(f"{file} is damaged: sha256 ", "…, the manifest says ", f"…; {again}"))
    file.unlink()
    refuse(verb, copy, *more, message=f"{file} is missing; {again}")
    (copy / "matquant_manifest.json").unlink()
    made = "give a checkpoint made by matquant quantize"
    refuse(verb, copy, *more, message=f"{copy} has no matquant_manifest.json; {made}")
    refuse(verb, copy / "nowhere", *more, message=f"{copy / 'nowhere'}: no such directory; {made}")


def last_record(result: Result) -> dict[str, Any]:
    """The JSON of the last line."""
    assert result.code == 0, result.err
    record: dict[str, Any] = json.loads(result.out.splitlines()[-1])
    return record


def test_evaluating_ends_with_one_line_of_json(run: Run, checkpoint: Path, text_file: Path) -> None:
    result = run("eval", checkpoint, "--text", text_file, "--bits", "8,4,2", columns=60)
    record = last_record(result)
    keys = {"checkpoint", "engine", "log_perplexity", "bits_per_weight", "reference", "context", "tokens"}
    assert set(record) == keys
    assert (record["reference"], record["context"]) == (None, 64)
    found = open_checkpoint(checkpoint)
    for bits in ("8", "4", "2"):
        assert 0 < record["log_perplexity"][bits] < 20
        plan = dict.fromkeys(found.shapes, int(bits))
        assert record["bits_per_weight"][bits] == bits_per_weight(found, plan)
        shown = f"{record['log_perplexity'][bits]:.4f}"
        row = next(line for line in result.out.splitlines() if f"int{bits} " in line)
        assert shown in row
        assert f"{record['bits_per_weight'][bits]:.3f}" in row
    values = record["log_perplexity"]
    assert len(set(values.values())) == 3, "two widths gave the same numbers"
    documents = text_file.read_text().split("<|endoftext|>")
    tokens = sum(1 + len(document.encode()) for document in documents)
    assert record["tokens"] == (tokens - 1) // 64 * 64  # predicted tokens, in whole windows


def test_evaluating_beside_the_float_model_writes_json_and_a_picture(
    run: Run, checkpoint: Path, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    json_file, picture = tmp_path / "new" / "record.json", tmp_path / "new" / "curve.png"
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "8,3", "--max-tokens", "1000")
    result = run(*arguments, "--reference", llama, "--json", json_file, "--plot", picture)
    record = last_record(result)
    assert json.loads(json_file.read_text()) == record
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(file.name for file in json_file.parent.iterdir()) == ["curve.png", "record.json"]
    assert abs(record["reference"] - record["log_perplexity"]["8"]) < 0.01
    assert abs(record["reference"] - record["log_perplexity"]["8"]) < abs(
        record["reference"] - record["log_perplexity"]["3"]
    )
    assert "float" in result.out


def test_evaluating_twice_gives_the_same_record(run: Run, checkpoint: Path, text_file: Path) -> None:
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "2", "--max-tokens", "500")
    assert last_record(run(*arguments)) == last_record(run(*arguments))


def test_evaluating_takes_window_stride_and_documents(run: Run, checkpoint: Path, text_file: Path) -> None:
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "8", "--max-tokens", "600")
    records = [
        last_record(run(*arguments, *more))
        for more in ((), ("--seq-len", "32"), ("--stride", "16"), ("--skip-documents", "100"))
    ]
    assert [record["context"] for record in records] == [64, 32, 64, 64]
    assert len({record["log_perplexity"]["8"] for record in records}) == 4


@pytest.mark.parametrize("picture", ["curve.txt", "curve.doc"])
def test_a_picture_of_an_unknown_kind_is_refused_before_any_work(
    picture: str, refuse: Refuse, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "8", "--plot", tmp_path / picture)
    refuse(*arguments, naming=(f"--plot {tmp_path / picture}", ".png"))


def test_a_reference_that_is_no_model_is_refused_before_any_work(
    refuse: Refuse, checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matquant.measure.with_torch.measure", Interrupt(print, 1))  # Ctrl-C if it comes to evaluating
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "8", "--reference", "nowhere")
    refuse(*arguments, message=f"nowhere: no such model directory; {KIND}")


def test_a_record_cannot_replace_a_directory(refuse: Refuse, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    arguments = ("eval", checkpoint, "--text", text_file, "--bits", "8", "--max-tokens", "100")
    refuse(*arguments, "--json", tmp_path / "results", naming=(str(tmp_path / "results"),))


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(checkpoint: Path, text_file: Path, tmp_path: Path) -> Arguments:
    """plan(content): the arguments of an evaluation with a plan of this content (text, bytes or JSON values)."""

    def arguments(content: Any) -> tuple[object, ...]:
        file = tmp_path / "plan.json"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        text = ("--text", text_file, "--max-tokens", "300", "--bits", "8,2")
        return ("eval", checkpoint, *text, "--plan", file)

    return arguments


def test_a_plan_is_evaluated_at_its_bits(run: Run, plan: Arguments, checkpoint: Path) -> None:
    record = last_record(run(*plan({"default": 2, "bits": {UP: 8}})))
    found = open_checkpoint(checkpoint)
    assert record["bits_per_weight"]["plan"] == bits_per_weight(found, {**dict.fromkeys(found.shapes, 2), UP: 8})
    assert len(set(record["log_perplexity"].values())) == 3
    same = last_record(run(*plan({"default": 2})))
    assert same["log_perplexity"]["plan"] == same["log_perplexity"]["2"]


def test_a_plan_that_names_an_unknown_path_names_the_nearest(refuse: Refuse, plan: Arguments) -> None:
    for unknown, nearest in (("model.layers.1.mlp.up", UP), ("model.layers.1.mlp.upproj", UP), (UP[6:], UP)):
        message = f"the plan names {unknown!r}, which the model does not quantise; nearest: {nearest!r}"
        arguments = plan({"default": 4, "bits": {unknown: 2}})
        refuse(*arguments, message=message)


SHOWN = 'give {"default": 4, "bits": {...}}'


def test_a_plan_that_cannot_be_read_is_named(refuse: Refuse, plan: Arguments, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for content in ([], 4, "null", {"bits": []}, {"bits": None}, {"bits": 4}):
        arguments = plan(content)
        refuse(*arguments, message=f'--plan {file} is not an object with "bits"; {SHOWN}')
    arguments = plan('{"bits": ')
    refuse(*arguments, message=f"--plan {file} is not JSON (Expecting value: line 1 column 10 (char 9)); {SHOWN}")
    arguments = plan(b'\xff\xfe{"bits": {}}')
    refuse(*arguments, naming=(f"--plan {file} is not JSON (", SHOWN))
    file.unlink()
    give = 'give a JSON file {"default": 4, "bits": {path: bits}}'
    refuse(*arguments, message=f"--plan {file}: no such file; {give}")


def test_a_plan_with_a_width_outside_1_to_8_is_refused(refuse: Refuse, plan: Arguments) -> None:
    for wrong in (0, 9, "4", 4.0, None, [2]):
        message = f"bits={wrong!r} is not a width; use one of 1 to 8"
        for content in ({"bits": {UP: wrong}}, {"default": wrong}):
            arguments = plan(content)
            refuse(*arguments, message=message)


def test_a_plan_with_an_unknown_key_names_the_nearest(refuse: Refuse, plan: Arguments, tmp_path: Path) -> None:
    arguments = plan({"defualt": 4})
    message = f"{tmp_path / 'plan.json'} has the unknown key 'defualt' (format 1); nearest: 'default'"
    refuse(*arguments, message=message)


# Making plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(copy: Path, text_file: Path, tmp_path: Path) -> Arguments:
    """make(*more): the arguments of a plan; a text is among them if ``more`` begins with "text"."""

    def arguments(*more: object) -> tuple[object, ...]:
        text = ("--text", text_file, "--samples", "2", "--seq-len", "16") if more[:1] == ("text",) else ()
        return ("plan", copy, "-o", tmp_path / "made.json", *text, *more[len(more[:1]) if text else 0 :])

    return arguments


def test_a_strategy_needs_no_text_and_no_torch(run: Run, make: Arguments, tmp_path: Path, copy: Path) -> None:
    arguments = make("--strategy", "decreasing", "--bits-per-weight", "4.5")
    record = last_record(run(*arguments))
    plan = json.loads((tmp_path / "made.json").read_text())
    assert plan["bits"] == {path: 4 if ".0." in path else 2 for path in open_checkpoint(copy).shapes}
    assert record["bits_per_weight"] == plan["about"]["bits_per_weight"] <= 4.5
    (tmp_path / "made.json").unlink()
    assert [result.code for result in run_without_torch(arguments)] == [0]
    assert json.loads((tmp_path / "made.json").read_text()) == plan


def test_a_search_writes_a_plan_that_eval_reads(run: Run, make: Arguments, tmp_path: Path, copy: Path) -> None:
    arguments = make("text", "--bits-per-weight", "5.9", "--evaluations", "4")
    result = run(*arguments)
    record = last_record(result)
    assert record["evaluations"] > 0
    assert record["bits_per_weight"] <= 5.9
    assert all(str(width) in result.out for width in json.loads((tmp_path / "made.json").read_text())["bits"].values())
    again = last_record(run(*arguments))
    assert again["loss"] <= record["loss"]
    text = arguments[arguments.index("--text") + 1]
    found = last_record(run("eval", copy, "--text", text, "--bits", "8", "--plan", tmp_path / "made.json"))
    assert found["bits_per_weight"]["plan"] == record["bits_per_weight"]


def test_the_curve_is_a_record_and_a_picture(run: Run, make: Arguments, tmp_path: Path) -> None:
    baselines = tmp_path / "baselines.json"
    baselines.write_text('{"dedicated": [[4.5, 5.1], [8.4, 5.0]]}')
    arguments = make("text", "--pareto", "--widths", "2,4,8", "--evaluations", "1", "--baselines", baselines)
    last_record(run(*arguments))
    curves = json.loads((tmp_path / "made.json").read_text())["curves"]
    assert sorted(curves) == sorted(
        ["search", "uniform, interpolated", "pyramid", "reverse-pyramid", "increasing", "decreasing"]
    )  # round to nearest trains no width
    losses = [point["loss"] for point in curves["search"]]
    assert losses == sorted(losses, reverse=True)
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    baselines.write_text('{"dedicated": [4.5]}')
    refused = run(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert "holds no points" in refused.err


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ((), ("found 0 budgets; give one of --bits-per-weight, --size and --tokens-per-second, or --pareto",)),
        (("--bits-per-weight", "3", "--size", "1GB"), ("found 2 budgets; give one of",)),
        (("--bits-per-weight", "0"), ("bits_per_weight=0.0; give a number above 0",)),
        (("--bits-per-weight", "nan"), ("bits_per_weight=nan; give a number above 0",)),
        (("--tokens-per-second", "-1"), ("tokens_per_second=-1.0; give a number above 0",)),
        (("--size", "much"), ("--size 'much' is not a size; give a number and one of B, KB, MB, GB, KiB, MiB, GiB",)),
        (("--pareto", "--experts"), ("--experts is for one plan; drop one of --experts and --pareto",)),
        (
            ("--pareto", "--size", "1GB"),
            ("--pareto covers all strategies and budgets; drop --strategy",),
        ),
        (("--plot", "a.png", "--size", "1GB"), ("--baselines and --plot need --pareto",)),
        (("--strategy", "best", "--size", "1GB"), ("--strategy 'best' is not known; use one of search, pyramid,",)),
        (("--widths", "4,2", "--size", "1GB"), ("--widths 4,2 are not ascending; give them as in 2,4,8",)),
        (("--widths", "2,9", "--size", "1GB"), ("bits=9 is not a width; use one of 1 to 8",)),
        (("--widths", "two", "--size", "1GB"), ("--widths 'two' is not a list of numbers; separate them with commas",)),
        (
            ("--strategy", "pyramid", "--bits-per-weight", "1"),
            (
                "1 bits per weight is below the smallest plan of the widths 2,4,8, which has",
                " bits per weight; use a larger budget, or other",
            ),
        ),
        (
            ("--strategy", "pyramid", "--tokens-per-second", "1e9"),
            (
                "1e+09 tokens per second is below the smallest plan of the widths 2,4,8, which has",
                " tokens per second; use a larger budget",
            ),
        ),
        (
            ("text", "--bits-per-weight", "1"),
            ("1 bits per weight is below the smallest plan of the widths 2,3,4,5,6,8",),
        ),
        (
            ("text", "--bits-per-weight", "5", "--evaluations", "-1"),
            ("--evaluations -1 is not valid; use a number of at least 0",),
        ),
        (("text", "--bits-per-weight", "5", "--seed", "-1"), ("seed=-1 is not valid; use a number of at least 0",)),
        (("text", "--bits-per-weight", "5", "--samples", "0"), ("samples=0; give a number above 0",)),
        (("text", "--bits-per-weight", "5", "--reference", "/nowhere"), ("/nowhere: no such model directory; give",)),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    more: tuple[str, ...], parts: tuple[str, ...], refuse: Refuse, make: Arguments
) -> None:
    arguments = make(*more)
    refuse(*arguments, naming=parts)


def test_a_plan_without_text_takes_the_calibration_text(run: Run, make: Arguments, copy: Path, tmp_path: Path) -> None:
    """The same plan as with a file of that text."""
    file = tmp_path / "calibration.txt"
    file.write_text("<|endoftext|>".join(calibration_text()), encoding="utf-8")
    asked = ("--bits-per-weight", "5", "--evaluations", "0")
    plans = []
    for text in ((), ("--text", file)):
        (copy / PLAN_CACHE).unlink(missing_ok=True)
        plans.append({**last_record(run(*make(*asked), *text)), "seconds": 0})
    assert plans[0] == plans[1]


def test_a_plan_cannot_replace_a_directory(refuse: Refuse, make: Arguments, tmp_path: Path) -> None:
    (tmp_path / "made.json").mkdir()
    arguments = make("--strategy", "pyramid", "--bits-per-weight", "6")
    refuse(*arguments, message=f"-o {tmp_path / 'made.json'} is a directory; give a file")


# Help -----------------------------------------------------------------------------------------------------------------

VERBS = (
    *("quantize", "eval", "plan", "report", "inspect", "verify"),
    *("generate", "chat", "serve", "bench", "export", "demo"),
)


def test_the_help_fits_a_small_terminal(run: Run) -> None:
    result = run("--help", columns=100)
    assert (result.code, result.err) == (0, "")
    lines = result.out.rstrip().splitlines()
    assert len(lines) <= 24, f"{len(lines)} lines"
    assert max(len(line.rstrip()) for line in lines) <= 100
    for verb in VERBS:
        assert sum(line.startswith(f"│ {verb} ") for line in lines) == 1, f"{verb} has no line of its own"
    assert run("-h", columns=100).out == result.out


def option_lines(text: str) -> list[str]:
    """The lines in the boxes of options, those of --help last."""
    boxes = {name: lines for name, lines in panels(text).items() if name != "Arguments"}
    return [line for name in sorted(boxes, key=lambda name: name == "Options") for line in boxes[name]]


def panels(text: str) -> dict[str, list[str]]:
    """Name of a box -> its lines."""
    boxes = re.findall(r"^╭─ ([\w ]+) ─+╮$(.*?)^╰", text, flags=re.DOTALL | re.MULTILINE)
    return {
        name: [line.strip("│ ").removeprefix("*").strip() for line in box.strip().splitlines()] for name, box in boxes
    }


def shown_defaults(lines: list[str]) -> dict[str, str]:
    """First name of a flag -> its default, where one is shown; lines that do not begin with a flag continue."""
    flags = re.split(r"\n(?=--)", "\n".join(lines))
    found = ((flag.split()[0], re.search(r"\[default: (.*?)\]", flag.replace("\n", " "))) for flag in flags)
    return {name: default[1] for name, default in found if default}


FLAGS: dict[str, list[str]] = {
    "quantize": [
        *("--out", "--recipe", "--dry-run", "--text", "--scope", "--group-size", "--resume", "--overwrite"),
        *("--method", "--objective", "--weights", "--baseline-bits", "--start"),
        *("--rule", "--grid", "--portable", "--symmetric", "--affine", "--zero-point", "--scale-dtype", "--head-bits"),
        "--exclude",
        *("--samples", "--seq-len", "--batch-size", "--seed", "--deterministic"),
        *("--lr", "--bf16", "--steps", "--learn-clip", "--weight-decay", "--warmup", "--clip-norm", "--accumulate"),
        *("--checkpoint-activations", "--save-every", "--gptq-weights", "--trained-widths"),
        *("--damp", "--sweeps", "--tune"),
        *("--clip-lr", "--transform-lr", "--transform", "--codes"),
        *("--pull", "--affine-lr", "--train-rest", "--masters", "--wide-lr", "--freeze", "--mix", "--hidden"),
        *("--device", "--threads", "--help"),
    ],
    "eval": [
        "--bits", "--text", "--plan", "--reference", "--reference-logits", "--metrics", "--engine", "--seq-len",
        "--stride", "--max-tokens", "--skip-documents", "--tasks", "--tasks-data",
        "--limit", "--batch-size", "--device", "--json", "--plot", "--help",
    ],
    "report": [
        "--out", "--eval", "--plan", "--pareto", "--sensitivity", "--text", "--max-tokens", "--device", "--help",
    ],
    "plan": [
        "--out", "--strategy", "--bits-per-weight", "--size", "--tokens-per-second", "--text", "--reference",
        "--widths", "--fused", "--experts", "--samples", "--seq-len", "--seed", "--device", "--evaluations", "--pareto",
        "--baselines", "--plot", "--help",
    ],
    "inspect": ["--json", "--help"],
    "verify": ["--seal", "--help"],
    "generate": [
        "--prompt", "--bits", "--plan", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--seed",
        "--stop", "--speculate", "--max-bits", "--threads", "--activations", "--check-hashes", "--mmap", "--help",
    ],
    "chat": [
        "--bits", "--plan", "--system", "--context", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p",
        "--seed", "--speculate", "--max-bits", "--threads", "--activations", "--check-hashes", "--mmap", "--help",
    ],
    "serve": [
        *("--resident", "--context", "--max-num-seqs", "--max-queued", "--kv-bytes", "--answer-tokens"),
        *("--max-body-mb", "--drain-seconds", "--api-key", "--cors-origin", "--allow-host"),
        *("--host", "--port", "--name", "--widths", "--plan", "--min-bits", "--prefill-bits", "--latency-ms"),
        *("--speculate", "--tool-format"),
        *("--max-bits", "--threads", "--activations", "--check-hashes", "--mmap", "--help"),
    ],
    "bench": [
        "--bits", "--tokens", "--rounds", "--context", "--threads", "--activations", "--check-hashes", "--mmap",
        "--help",
    ],
    "export": [
        "--to", "--out", "--bits", "--plan", "--zero-point", "--dtype", "--base-model", "--measured",
        "--requantise", "--split-experts", "--explain", "--overwrite", "--help",
    ],
    "demo": ["--out", "--help"],
}  # fmt: skip
DEFAULTS: dict[str, dict[str, str]] = {
    "quantize": {
        "--recipe": "(balanced)",
        "--text": "(text that comes with matquant)",
        "--method": "(the recipe's)",
        "--objective": "(by method)",
        "--weights": "(by objective)",
        "--rule": "(prefix)",
        "--scope": "(all)",
        "--group-size": "(auto)",
        "--symmetric": "(symmetric; rtn chooses by error)",
        "--affine": "(by method)",
        "--zero-point": "(stored)",
        "--grid": "(uniform)",
        "--scale-dtype": "(bfloat16)",
        "--head-bits": "(6)",
        "--steps": "(omniquant 1220, qat 300, distill 96)",
        "--batch-size": "(gptq and omniquant 4, qat 8, distill 4, then 8)",
        "--seq-len": "(gptq and omniquant 2048, qat 256, distill 512, then 256)",
        "--samples": "(128)",
        "--lr": "(gptq 0.003, omniquant 0.001, qat by width of the model, distill half of qat's, at most 5e-4)",
        "--clip-lr": "(as --lr)",
        "--transform-lr": "(as --lr)",
        "--transform": "(transform)",
        "--codes": "(round)",
        "--damp": "(0.01)",
        "--sweeps": "(1)",
        "--tune": "(gptq 0, distill 60)",
        "--seed": "(0)",
        "--accumulate": "(1)",
        "--bf16": "(fp32)",
        "--learn-clip": "(omniquant learn-clip, qat where scales are learned)",
        "--weight-decay": "(0)",
        "--warmup": "(a tenth, at most 150)",
        "--clip-norm": "(1)",
        "--masters": "(one)",
        "--pull": "(gptq 0.35, qat 1)",
        "--wide-lr": "(1)",
        "--affine-lr": "(1)",
        "--freeze": "(qat 0, distill 4)",
        "--mix": "(0)",
        "--hidden": "(0)",
        "--save-every": "(100)",
        "--gptq-weights": "(gptq's)",
        "--trained-widths": "(8,4,3,2)",
        "--device": "(cuda if there is one)",
        "--threads": "(all)",
    },
    "eval": {
        "--bits": "8,6,4,3,2",
        "--metrics": "ppl",
        "--engine": "torch",
        "--seq-len": "(the model's context)",
        "--stride": "(no overlap)",
        "--skip-documents": "0",
        "--tasks-data": "(the hub)",
        "--batch-size": "8",
        "--device": "(cuda if there is one)",
    },
    "plan": {
        "--strategy": "search",
        "--text": "(text that comes with matquant)",
        "--reference": "(the 8-bit model)",
        "--widths": "(search 2,3,4,5,6,8, others 2,4,8)",
        "--samples": "8",
        "--seq-len": "(the model's context, 512 at most)",
        "--seed": "0",
        "--device": "(cuda if there is one)",
        "--evaluations": "100",
        "--plot": "(-o with .png)",
    },
    "report": {"--device": "(cuda if there is one)"},
    "inspect": {},
    "verify": {},
    "generate": {
        "--bits": "(--max-bits)",
        "--max-tokens": "256",
        "--temperature": "(generation_config.json, else greedy)",
        "--top-k": "(as temperature)",
        "--top-p": "(as temperature)",
        "--min-p": "(as temperature)",
        "--seed": "(0)",
        "--speculate": "off",
        "--max-bits": "8",
        "--threads": "(OMP_NUM_THREADS, else all)",
        "--activations": "int8",
        "--check-hashes": "check-hashes",
        "--mmap": "mmap",
    },
    "chat": {
        "--bits": "(--max-bits)",
        "--context": "(the model's context, 32768 at most)",
        "--max-tokens": "1024",
        "--temperature": "(generation_config.json, else greedy)",
        "--top-k": "(as temperature)",
        "--top-p": "(as temperature)",
        "--min-p": "(as temperature)",
        "--seed": "(0)",
        "--speculate": "off",
        "--max-bits": "8",
        "--threads": "(OMP_NUM_THREADS, else all)",
        "--activations": "int8",
        "--check-hashes": "check-hashes",
        "--mmap": "mmap",
    },
    "bench": {
        "--bits": "8,6,4,3,2",
        "--tokens": "32",
        "--rounds": "7",
        "--context": "16",
        "--threads": "(OMP_NUM_THREADS, else all)",
        "--activations": "int8",
        "--check-hashes": "check-hashes",
        "--mmap": "mmap",
    },
    "serve": {
        "--host": "127.0.0.1",
        "--port": "8000",
        "--name": "(that of DIR)",
        "--widths": "(8,6,4,3,2)",
        "--min-bits": "4",
        "--prefill-bits": "(that of the request)",
        "--latency-ms": "100.0",
        "--speculate": "off",
        "--tool-format": "(from its template)",
        "--resident": "(all of them)",
        "--context": "(the model's context, 32768 at most)",
        "--max-num-seqs": "16",
        "--max-queued": "128",
        "--kv-bytes": "(a quarter of what is free)",
        "--answer-tokens": "2048",
        "--max-body-mb": "8.0",
        "--drain-seconds": "30.0",
        "--api-key": "(none is needed)",
        "--max-bits": "8",
        "--threads": "(OMP_NUM_THREADS, else all)",
        "--activations": "int8",
        "--check-hashes": "check-hashes",
        "--mmap": "mmap",
    },
    "export": {"--bits": "(8)", "--zero-point": "exact", "--dtype": "(the model's)"},
    "demo": {"--out": "out/demo"},
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_one_line_for_each_flag(verb: str, run: Run) -> None:
    result = run(verb, "--help", columns=140)
    assert (result.code, result.err) == (0, "")
    lines = option_lines(result.out)
    flags = [re.match(r"(--[\w-]+)", line) for line in lines]
    if verb != "quantize":  # whose options have a sentence or two
        wrapped = [line for line, flag in zip(lines, flags, strict=True) if flag is None]
        assert wrapped == [], "these lines continue the one before"
    assert [flag[1] for flag in flags if flag] == FLAGS[verb]


@pytest.mark.parametrize("stray", ["more.txt", "--nonsense"])
def test_a_stray_word_is_an_error(stray: str, run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    for words in (
        ("quantize", llama, "-o", tmp_path / "out", "--text", text_file),
        ("eval", llama, "--text", text_file),
    ):
        result = run(*words, stray)
        assert (result.code, result.out) == (2, "")
        assert stray in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_first_panel_of_quantize_is_a_newcomers(run: Run) -> None:
    boxes = panels(run("quantize", "--help", columns=140).out)
    names = ["Basics", "Objective", "Grid", "Calibration", "Training"]
    assert [name for name in boxes if name not in ("Arguments", "Options")] == [
        *names, "Method gptq", "Method omniquant", "Method qat", "Run",
    ]  # fmt: skip
    assert sum(line.startswith("--") for line in boxes["Basics"]) <= 8


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_every_default(verb: str, run: Run) -> None:
    assert shown_defaults(option_lines(run(verb, "--help", columns=140).out)) == DEFAULTS[verb]


# Without torch --------------------------------------------------------------------------------------------------------


def run_without_torch(*commands: tuple[object, ...]) -> list[Result]:
    """The command lines, one after the other, in a process where torch and its company cannot be imported."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", TORCHLESS, json.dumps([[*map(str, command)] for command in commands])],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140", "NO_COLOR": "1"},
        check=True,
    )
    results = [Result(*result) for result in json.loads(found.stdout)]
    assert (len(results), found.stderr) == (len(commands), "")
    return results


def test_inspect_verify_and_help_work_without_torch(run: Run, checkpoint: Path) -> None:
    commands = ("verify", checkpoint), ("inspect", checkpoint, "--json"), ("inspect", checkpoint), ("--help",)
    for command, result in zip(commands, run_without_torch(*commands), strict=True):
        assert (result.code, result.err) == (0, "")
        assert result.out.split() == run(*command).out.split()


def test_what_needs_torch_says_what_to_install(llama: Path, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    for result in run_without_torch(
        ("quantize", llama, "-o", tmp_path / "out", "--method", "rtn"),
        ("eval", checkpoint, "--text", text_file),
        ("plan", checkpoint, "--text", text_file, "--bits-per-weight", "4", "-o", tmp_path / "plan.json"),
        ("demo", "-o", tmp_path / "out"),
    ):
        assert result.code == 2
        assert re.fullmatch(
            r"\n?error: this needs (torch|matplotlib), which is not installed; pip install 'matquant\[train\]'\n",
            result.err,
        )
        assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_importing_the_command_line_imports_no_torch() -> None:
    code = "import sys, matquant.cli; print([n for n in ('torch', 'transformers', 'tokenizers') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
