"""Several processes give what one gives: training, one-shot methods and evaluation, saved states, and errors."""

import functools
import itertools
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts

import conftest
import forked
import matquant
from matquant.distributed import collect, sums
from matquant.distributed.sums import Sums
from matquant.format.read import open_checkpoint
from matquant.hf_torch import shards
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.shards import open_shards
from matquant.measure.run import evaluate_checkpoint
from matquant.methods import gptq, qat
from matquant.system import ranks
from matquant.system.errors import InputError

TRAINED: dict[str, Any] = {
    "method": "qat",
    "scope": "linears",
    "objective": "8,4,2,8->2,fp->8;4;2",
    "masters": "each",
    "hidden": 1.0,
    "checkpoint_activations": True,
    "steps": 5,
    "save_every": 4,
    "batch_size": 4,
    "seq_len": 16,
    "lr": 1e-4,
}


def train(model: Path, text: Path, out: Path, *, stop: int | None = 5, **options: Any) -> None:
    """Train, and be interrupted once step ``stop`` is done; the last state saved is that of step 4."""

    def report(record: Mapping[str, Any]) -> None:
        if record.get("step") == stop:
            raise KeyboardInterrupt

    conftest.quantize(model, out, **{"text": [text], "report": report, **TRAINED, **options})


def interrupted(function: Callable[[], Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        function()


def saved(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved state, in whichever form."""
    work = out.with_name(f".{out.name}.work")
    if (work / "state.safetensors").is_file():
        return load_file(work / "state.safetensors")
    reader = FileSystemReader(work / "state")
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.distributed is not used
        load_parts(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        gap = float((found[name].double() - tensor.double()).abs().max())
        if not gap <= tolerance:
            raise AssertionError(f"{name} differs by {gap:.1e}")


def test_two_processes_train_as_one(llama: Path, text_file: Path, tmp_path: Path) -> None:
    # Adam divides by the size of a gradient: near 0 its last bits move a weight, by 1.1e-6 at 1e-4 on a CPU with AVX2
    # and at 5e-5 on a Zen 4. The gradient of half a batch moves one by 1.1e-4 at 2e-5.
    once = functools.partial(train, llama, text_file, lr=2e-5)
    interrupted(functools.partial(once, tmp_path / "one"))
    forked.run(functools.partial(once, tmp_path / "two"), 2)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert any(name.endswith("/2/weight") for name in one)
    assert_close(two, one, tolerance=1e-6)
    with pytest.raises(AssertionError, match="differs"):
        assert_close({name: tensor + 2e-6 for name, tensor in two.items()}, one, tolerance=1e-6)


RESUMED = {"steps": 8, "save_every": 2, "batch_size": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(3, 2), (1, 2), (2, 1), (2, 2)])
def test_any_number_of_processes_continues_a_saved_state(
    first: int, then: int, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def start(out: Path, count: int, **options: Any) -> None:
        work = functools.partial(train, llama, text_file, out, **{**RESUMED, **options})
        interrupted(work) if count == 1 else forked.run(work, count)

    start(tmp_path / "whole", then, stop=7)
    start(tmp_path / "out", first, stop=5)  # the state of step 4 is there
    start(tmp_path / "out", then, stop=7, resume=True)
    same = first == then
    assert_close(saved(tmp_path / "out"), saved(tmp_path / "whole"), tolerance=0.0 if same else 1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_all_continue_bit_identically(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**RESUMED, "stop": None}

    def killed() -> None:
        def report(record: Mapping[str, Any]) -> None:
            if record.get("step") == 5 and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        conftest.quantize(llama, tmp_path / "out", text=[text_file], report=report, **{**TRAINED, **RESUMED})

    forked.run(functools.partial(train, llama, text_file, tmp_path / "whole", **options), 2)
    found = forked.run_all(killed, 2)
    assert found[0][1][0] == "LostProcessError", found[0]
    assert not (tmp_path / "out").exists()
    forked.run(functools.partial(train, llama, text_file, tmp_path / "out", resume=True, **options), 2)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "whole")


def assert_same_checkpoint(found: Path, wanted: Path) -> None:
    for file in sorted(wanted.glob("*.safetensors")):
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def assert_similar_checkpoint(found: Path, wanted: Path, *, share: float) -> None:
    """At most this share of the codes differ, and other tensors by at most 1e-5."""
    one, two = open_checkpoint(wanted), open_checkpoint(found)
    assert list(one.shapes) == list(two.shapes)
    assert sorted(one.plain_names()) == sorted(two.plain_names())
    differing = sum(int((one.nested(path).codes != two.nested(path).codes).sum()) for path in one.shapes)
    if differing > share * sum(math.prod(shape) for shape in one.shapes.values()):
        raise AssertionError(f"{differing} codes differ")
    for name in one.plain_names():
        np.testing.assert_allclose(
            two.array(name).astype(np.float64), one.array(name).astype(np.float64), rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"train_rest": True, "scope": "ffn"}),
        ("llama", {"masters": "one", "affine": "refit", "learn_clip": False, "accumulate": 2, "mix": 0.5}),
        ("qwen3_moe", {"masters": "one", "mix": 0.5}),
        ("qwen3_moe", {"scope": "ffn"}),
    ],
)
def test_two_processes_write_the_checkpoint_of_one(
    family: str, options: dict[str, Any], family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model(family)
    for count, name in ((1, "one"), (2, "two")):
        work = functools.partial(train, model, text_file, tmp_path / name, stop=None, **options)
        work() if count == 1 else forked.run(work, count)
    assert_similar_checkpoint(tmp_path / "two", tmp_path / "one", share=1e-3)


@pytest.mark.slow
def test_two_processes_start_from_a_checkpoint(llama: Path, text_file: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"scope": "all", "group_size": 16}
    matquant.quantize(llama, tmp_path / "start", method="gptq", samples=8, seq_len=32, text=[text_file], **common)
    options = {**common, "start": tmp_path / "start", "objective": "8,4,2,fp->8;4;2", "freeze": 2}
    for count, name in ((1, "one"), (2, "two")):
        work = functools.partial(train, llama, text_file, tmp_path / name, stop=None, **options)
        work() if count == 1 else forked.run(work, count)
    assert_similar_checkpoint(tmp_path / "two", tmp_path / "one", share=1e-3)


# ------------------------------------------------------------------------------------------------- one-shot methods

ONE_SHOT: dict[str, Any] = {"scope": "all", "group_size": None, "samples": 7, "seq_len": 32, "batch_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "tuned": {"method": "gptq", "tune": 4},
    "omniquant": {"method": "omniquant", "steps": 4, "codes": "gptq"},
}


def quantise(model: Path, text: Path, out: Path, name: str, **options: Any) -> None:
    conftest.quantize(model, out, **{"text": [text], **ONE_SHOT, **SETTINGS[name], **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "ordered"),
    [
        ("gptq", "llama", False),
        ("gptq", "qwen3_moe", True),
        ("tuned", "llama", True),
        ("omniquant", "llama", True),
    ],
)
def test_three_processes_choose_the_codes_of_one(
    name: str, family: str, ordered: bool, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    for count, out in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        options = {"deterministic": ordered}
        work = functools.partial(quantise, family_model(family), text_file, out, name, **options)
        work() if count == 1 else forked.run(work, count)
    if ordered:
        assert_same_checkpoint(tmp_path / "three", tmp_path / "one")
    else:
        assert_similar_codes(tmp_path / "three", tmp_path / "one", share=1e-3)


def assert_similar_codes(found: Path, wanted: Path, *, share: float) -> None:
    one, two = open_checkpoint(wanted), open_checkpoint(found)
    differing = sum(int((one.nested(path).codes != two.nested(path).codes).sum()) for path in one.shapes)
    assert differing <= share * sum(math.prod(shape) for shape in one.shapes.values())


@pytest.mark.slow
def test_two_processes_choose_the_codes_of_one_in_a_wider_model(text_file: Path, tmp_path: Path) -> None:
    """Here GPTQ carries a difference in the last bit of a Hessian on to a fifth of the codes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=300, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    conftest.make_tokenizer().save_pretrained(tmp_path / "model")
    options = {"seq_len": 128, "objective": "8,4,2", "group_size": 64}
    for count, name in ((1, "one"), (2, "two")):
        work = functools.partial(quantise, tmp_path / "model", text_file, tmp_path / name, "gptq", **options)
        work() if count == 1 else forked.run(work, count)
    assert_similar_codes(tmp_path / "two", tmp_path / "one", share=1e-3)


@pytest.mark.parametrize("method", ["gptq", pytest.param("qat", marks=pytest.mark.slow)])
def test_a_process_reads_only_its_rows(method: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    read_key, end = shards.read_key, "the head" if method == "gptq" else None

    def work() -> dict[str, float]:
        largest: dict[str, float] = {}
        solved: list[Any] = []

        def counted(files: Any, key: str, **rows: Any) -> torch.Tensor:
            tensor = read_key(files, key, **rows)
            if not solved:  # then the first process reads what it writes
                largest[key] = max(largest.get(key, 0), len(tensor) / files[key][1][0])
            return tensor

        def report(record: Mapping[str, Any]) -> None:
            if record.get("block") == end and "step" in record:
                solved.append(record)

        shards.read_key = counted  # type: ignore[assignment]  # in the child alone
        if method == "gptq":
            quantise(llama, text_file, tmp_path / "out", "gptq", samples=4, objective="8,2", report=report)
        else:
            conftest.quantize(llama, tmp_path / "out", text=[text_file], report=report, **{**TRAINED, "steps": 1})
        return largest

    for largest in forked.run(work, 2):
        assert "model.embed_tokens.weight" in largest
        assert len(largest) > 10
        assert max(largest.values()) < 0.55, largest


def test_sums_in_float64_hardly_depend_on_their_order() -> None:
    pieces = [torch.randn(200, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(64)]
    forward, backward = Sums(None), Sums(None)
    for piece, other in zip(pieces, reversed(pieces), strict=True):
        forward.add([piece])
        backward.add([other])
    (one,), (two,) = forward.total([pieces[0]]), backward.total([pieces[0]])
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    assert not torch.equal(sum(pieces, torch.zeros(200, 200)), sum(reversed(pieces), torch.zeros(200, 200)))


@pytest.mark.slow
def test_a_killed_process_of_gptq_resumes(llama: Path, text_file: Path, tmp_path: Path) -> None:
    def killed() -> None:
        def report(record: Mapping[str, Any]) -> None:
            if record.get("block") == "model.layers.0" and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        quantise(llama, text_file, tmp_path / "out", "tuned", report=report)

    forked.run(functools.partial(quantise, llama, text_file, tmp_path / "whole", "tuned"), 2)
    found = forked.run_all(killed, 2)
    assert found[0][1][0] == "LostProcessError", found[0]
    work = tmp_path / ".out.work"
    assert [file.name for file in (work / "blocks").iterdir()] == ["00000.safetensors"]
    forked.run(functools.partial(quantise, llama, text_file, tmp_path / "out", "tuned", resume=True), 2)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "whole")
    assert not work.exists()


def test_sums_in_a_fixed_order_do_not_depend_on_who_holds_the_pieces() -> None:
    for count in range(1, 20):
        leaves = [torch.randn(50) * 10.0**place for place in range(count)]
        whole = Sums([range(count)])
        for leaf in leaves:
            whole.add([leaf.clone()])
        (wanted,) = whole.total([leaves[0]])
        for cuts in ((count // 2,), (count // 3, count // 2), (0, 1)):
            bounds = [0, *cuts, count]
            parts = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
            nodes: list[Any] = []
            for part in parts:
                held: list[Any] = []
                for place in part:
                    sums._push(held, (place, 1, [leaves[place].clone()]))
                assert [(first, size) for first, size, _ in held] == sums.branches(part)
                for node in held:
                    sums._push(nodes, node)
            assert torch.equal(sums.fold(nodes)[0], wanted)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", ["qat", "gptq"])
def test_a_full_disk_of_one_process_is_an_error_of_all(
    method: str, rank: int, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    module, name = (qat, "train_step") if method == "qat" else (gptq, "_solve")

    def full(*arguments: Any, **options: Any) -> Any:
        if ranks.rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        return function(*arguments, **options)

    def work() -> None:
        setattr(module, name, full)  # in the child alone
        if method == "qat":
            train(llama, text_file, tmp_path / "out", stop=None)
        else:
            quantise(llama, text_file, tmp_path / "out", method)

    function = getattr(module, name)

    answers = forked.run_all(work, 2)
    if (method, rank) == ("gptq", 1):  # only the first process writes
        assert [good for good, _ in answers] == [True, True]
        return
    assert [good for good, _ in answers] == [False, False]
    for _, (kind, message, _) in answers:
        assert kind == "InputError", answers
        assert "no space left on the device" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.work" / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_in_one_process_changes_nothing_in_any(
    broken: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    step, loss, finish = qat.train_step, qat.width_loss, qat._finish_gradients

    def late(name: str) -> bool:
        return broken == name and ranks.rank() == 1 and len(seen) == 3

    def train_step(training: Any, grid: Any, state: Any, *rest: Any) -> Any:
        seen.append(next(iter(state.masters.values())).detach().clone())
        return step(training, grid, state, *rest)

    def width_loss(*arguments: Any, **options: Any) -> torch.Tensor:
        return loss(*arguments, **options) * (torch.inf if late("loss") else 1.0)

    def finish_gradients(training: Any, state: Any, *rest: Any) -> None:
        finish(training, state, *rest)
        if late("gradient"):
            next(iter(state.masters.values())).grad[0, 0] = torch.nan

    def work() -> tuple[str, list[bool]]:
        changes = {"train_step": train_step, "width_loss": width_loss, "_finish_gradients": finish_gradients}
        vars(qat).update(changes, steps_at_once=lambda device: 10)  # in the child alone
        with pytest.raises(InputError) as error:
            train(llama, text_file, tmp_path / "out", stop=None)
        return str(error.value), [torch.equal(masters, seen[2]) for masters in seen]

    what = {"loss": "loss at 8 bits is not finite at step 3, first in the head", "gradient": "gradient is not finite"}
    for message, same in forked.run(work, 2):
        assert message.startswith(f"the {what[broken]}")
        assert same == [False, False, True, True]  # the state is due after step 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**TRAINED, "batch_size": 1}, "--batch-size 1 leaves some of 2 processes without a sequence; use at least 2"),
        ({**ONE_SHOT, "method": "gptq", "samples": 1, "seq_len": 48}, "--samples 1 leaves some of 2 processes"),
        (
            {"method": "distill", "batch_size": 1, "accumulate": 8},
            "--batch-size 1 leaves some of 2 processes without a sequence; use at least 2; a step has --accumulate 8",
        ),
        ({"method": "rtn"}, "method 'rtn' runs in one process, found WORLD_SIZE=2; start it without torchrun"),
    ],
)
def test_too_many_processes_are_one_clear_error(
    options: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    if options["method"] != "rtn":
        options = {**options, "text": [text_file]}
    answers = forked.run_all(functools.partial(conftest.quantize, llama, tmp_path / "out", **options), 2)
    for good, (kind, found, _) in answers:
        assert not good
        assert kind == "InputError"
        assert message in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_with_different_models_are_an_error(
    llama: Path, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def work() -> None:
        quantise(llama if os.environ["RANK"] == "0" else family_model("mistral"), text_file, tmp_path / "out", "gptq")

    family_model("mistral")
    for good, (kind, message, _) in forked.run_all(work, 2):
        assert not good
        assert kind == "InputError"
        assert message.startswith("process 1 of 2 and process 0 differ in the model, the text or the settings")


@pytest.mark.slow
def test_torchrun_prints_one_error_when_a_process_is_killed(llama: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(forked.free_port()), "-m", "matquant", "quantize", str(llama)]
    command += ["--method", "qat", "--text", str(text_file), "--steps", "100000", "--batch-size", "2", "--seq-len"]
    command += ["16", "--group-size", "channel", "--save-every", "2", "-o", str(tmp_path / "out")]
    state = tmp_path / ".out.work" / "state" / "seal.json"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        deadline = time.monotonic() + 200
        while not state.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        children = psutil.Process(run.pid).children()
        assert len(children) == 2
        children[1].kill()
        _, errors = run.communicate(timeout=100)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1, errors  # torchrun may end the other process before it can say anything
    assert all("another process of this run has ended" in line for line in lines)
    assert "exitcode  : -9" in errors
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.slow
def test_three_processes_measure_exactly_what_one_does(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = matquant.quantize(llama, tmp_path / "out", method="rtn", scope="linears", group_size=16)

    def measured(**options: Any) -> dict[str, Any]:
        with ranks.shared():
            return evaluate_checkpoint(
                out, bits=(8, 4, 2), device="cpu", text=[text_file], seq_len=64, stride=48, reference=llama, **options
            )

    for options in ({}, {"metrics": ("ppl", "kld", "top1")}):
        wanted = measured(**options)
        assert forked.run(functools.partial(measured, **options), 3) == [wanted] * 3
    assert wanted["tokens"] > 3 * 1024  # every process has batches


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rows_are_read_as_parts_of_whole_tensors(family: str, family_model: Callable[[str], Path]) -> None:
    opened = open_shards(family_model(family))
    views = select_linears(opened.model, "linears")
    for name, parameter in opened.model.named_parameters():
        whole, count = opened.read(name), parameter.shape[0]
        for rows in (slice(0, count), slice(0, count // 2), slice(count // 2, count), slice(count, count)):
            assert torch.equal(opened.read_rows(name, rows), whole[rows]), (name, rows)
            for path, view in views.items():
                if view.parameter == name and (part := view.within(rows, parameter[0].numel())) is not None:
                    inside = part.of(whole[rows].clone()) if part.shape[0] else torch.empty(part.shape)
                    expected = view.of(whole)
                    if part.shape[0] != view.shape[0]:
                        expected = expected[rows] if view.shape[0] == count else expected[:0]
                    assert torch.equal(inside, expected), (path, rows)


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ranks.VARIABLES, ("0", "2", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_sharing", [False])  # a command of another test may have asked, in this process
    message = "matquant serve runs in one process, found WORLD_SIZE=2; start it without torchrun (quantize and eval can"
    with pytest.raises(InputError, match=re.escape(message)):
        ranks.check_single("matquant serve")
    assert (ranks.count(), ranks.rank(), ranks.leads()) == (1, 0, True)  # nothing is shared unless a command asks
    with ranks.shared():
        assert ranks.count() == 2
        assert collect.own_rows(5) == slice(0, 3)
        assert collect.own_rows(5, rank=1) == slice(3, 5)
        assert collect.own_parts(5) == [slice(0, 2), slice(2, 5)]
        with pytest.raises(InputError, match="2 processes leave one of them without any of the 1 rows of x; start at"):
            collect.check_rows(1, "x")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="the environment has WORLD_SIZE='two', not a number; unset it"):
        ranks.check_single("matquant serve")
