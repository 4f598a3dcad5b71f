"""Three stages as one method: the same bits as three commands, however often it is stopped."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conftest
from conftest import Interrupt
from matquant.format.verify import verify_checkpoint
from matquant.methods import distill, gptq, qat
from matquant.options.distill import SHARED
from matquant.system.errors import InputError

SIZE: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "seed": 3}
RUN: dict[str, Any] = {**SIZE, "method": "distill", "samples": 8, "tune": 2, "steps": 6, "lr": 1e-3, "save_every": 2}
GRID: dict[str, Any] = {"scope": "all", "group_size": 16, "zero_point": "midrange"}
FILES = ("model.safetensors", "matquant_slices.safetensors")


Run = Callable[..., Path]


def weights(directory: Path) -> list[bytes]:
    return [(directory / file).read_bytes() for file in FILES]


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes that nothing stops."""
    return conftest.quantize(llama, tmp_path_factory.mktemp("distill") / "out", text=[text_file], **RUN, **GRID)


@pytest.fixture
def run(llama: Path, text_file: Path, tmp_path: Path) -> Run:
    return functools.partial(conftest.quantize, llama, tmp_path / "out", text=[text_file], **{**RUN, **GRID})


def test_it_is_the_three_commands_of_the_page(whole: Path, llama: Path, text_file: Path, tmp_path: Path) -> None:
    make = functools.partial(conftest.quantize, llama, text=[text_file], **SIZE, **GRID)
    each: dict[str, Any] = {"method": "qat", "masters": "each", "pull": 0.5}
    make(tmp_path / "first", method="gptq", tune=2, samples=8)
    make(
        tmp_path / "second",
        **each,
        start=tmp_path / "first",
        objective="fp->8;4;3;2",
        weights=(1, 1, 1, 1),
        wide_lr=0.5,
        hidden=1.0,
        lr=1e-3,
        steps=6,
    )
    last = make(
        tmp_path / "third",
        **each,
        start=tmp_path / "second",
        objective="8,6,4,3,2,fp->8;6;4;3;2",
        weights=(1, 1, 1, 1, 1),
        freeze=4,
        lr=1e-4,
        affine_lr=10.0,
        steps=4,
    )
    assert weights(whole) == weights(last)
    spec = verify_checkpoint(whole).spec
    assert spec.method == "gptq, qat, qat"
    assert spec == verify_checkpoint(last).spec
    counts = [len((tmp_path / name / "training.jsonl").read_text().splitlines()) for name in ("first", "second")]
    assert counts == [3, 3 + 6]  # one per block and one of the head, then per step, after those it starts from
    assert [json.loads(line)["step"] for line in (whole / "training.jsonl").read_text().splitlines()] == [
        *(1, 2, 3), *range(1, 7), *range(1, 5),
    ]  # fmt: skip


def test_what_is_left_to_itself_has_the_measured_settings(llama: Path) -> None:
    first, second, last = distill.stages(llama, {})
    assert (first["tune"], first["seq_len"]) == (60, 512)
    assert (second["steps"], second["lr"], second["hidden"]) == (96, 5e-4, 1.0)
    assert (last["steps"], last["lr"], last["affine_lr"], last["freeze"]) == (64, 5e-5, 10.0, 4)
    assert last["wide_lr"] == 1.0


def test_other_widths_can_be_trained(llama: Path) -> None:
    _, second, last = distill.stages(llama, {"trained_widths": (8, 5, 2)})
    assert (second["objective"], second["weights"]) == ("fp->8;5;2", (1, 1, 1))
    assert (last["objective"], last["weights"]) == ("8,6,5,2,fp->8;6;5;2", (1, 1, 1, 1))
    for widths, said in (((4, 2), "trains widths 4, 2 but not 8"), ((8, 9), "width 9 is outside 1..8")):
        with pytest.raises(InputError, match=said):
            distill.stages(llama, {"trained_widths": widths})


def test_with_a_corpus_the_last_phase_frees_more_at_a_higher_rate(llama: Path) -> None:
    last = distill.stages(llama, {"freeze": 2})[2]
    assert (last["freeze"], last["lr"], last["wide_lr"], last["affine_lr"]) == (2, 2e-4, 0.25, 2.5)


def test_without_a_last_phase_there_are_two_stages(llama: Path) -> None:
    assert distill.stages(llama, {"freeze": 0}) == distill.stages(llama, {})[:2]


def test_wider_models_have_smaller_rates(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "hidden_size", lambda model: 2304)
    _, second, last = distill.stages(llama, {})
    assert second["lr"] == pytest.approx(5e-6)
    assert last["lr"] == pytest.approx(5e-7)


def test_every_option_reaches_the_stages_that_have_it(llama: Path) -> None:
    given: dict[str, Any] = dict.fromkeys((*SHARED, "samples"), 5)
    first, *trained = distill.stages(llama, {**given, "autocast": True, "checkpoint_activations": True})
    for stage, settings in zip((first, *trained), (gptq.Settings, qat.Schedule, qat.Schedule), strict=True):
        theirs = {field.name for field in dataclasses.fields(settings)} & given.keys()
        assert {name for name in theirs if stage[name] in (5, True)} == theirs
        assert set(stage) - {"method", "objective", "weights"} <= {field.name for field in dataclasses.fields(settings)}
    assert "autocast" not in distill.stages(llama, {"autocast": True, "tune": 0})[0]  # an option of tuning
    first, *trained = distill.stages(llama, {"gptq_weights": (5.0, 4.0, 3.0, 2.0, 1.0)})
    assert first["weights"] == (5.0, 4.0, 3.0, 2.0, 1.0)
    assert trained == distill.stages(llama, {})[1:]


STOPS = {"1/3": (gptq, "_solve", 2), "2/3": (qat, "train_step", 4), "3/3": (qat, "train_step", 7)}  # calls


@pytest.mark.slow
def test_a_stopped_run_goes_on_in_the_stage_it_was_in(
    run: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    for stage in STOPS:
        records: list[dict[str, Any]] = []
        stop(stage, functools.partial(run, resume=stage != "1/3", report=records.append), monkeypatch)
        begun.append(records[0]["stage"])
        assert [file.name for file in tmp_path.iterdir()] == [".out.work"]
        with pytest.raises(InputError, match=r"holds an interrupted run; use --resume to continue it"):
            run()
    records = []
    out = run(resume=True, report=records.append)
    assert [*begun, records[0]["stage"]] == ["1/3", "1/3", "2/3", "3/3"]
    assert weights(out) == weights(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert "stage" not in json.loads((out / "training.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_stages_of_other_settings_are_not_taken(
    run: Run, whole: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop("2/3", functools.partial(run, seed=4), monkeypatch)
    other = tmp_path.parent / f"{tmp_path.name}.txt"
    other.write_text(text_file.read_text() + "And more.")
    for changed in ({}, {"seed": 4, "zero_point": "stored"}, {"seed": 4, "steps": 7}, {"seed": 4, "text": [other]}):
        with pytest.raises(InputError, match=r"--resume needs the settings and text of the interrupted run"):
            run(resume=True, **changed)
    for refused in ({"scope": "nope"}, {"group_size": 5}, {"steps": 0}, {"text": [tmp_path / "nowhere"]}):
        with pytest.raises(InputError):
            run(overwrite=True, **refused)
    stop("1/3", functools.partial(run, overwrite=True), monkeypatch)  # the first stage of seed 4 is still there
    assert weights(run(resume=True)) == weights(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "8,4,2"},
            "objective='8,4,2' does not work with method 'distill', whose stages set it themselves",
        ),
        ({"symmetric": False}, "symmetric=False does not work with method 'distill', whose stages set it themselves"),
        ({"baseline_bits": 2}, "baseline_bits=2 does not work with method 'distill', whose stages set it themselves"),
        ({"pull": 0.3}, "method 'distill' has no option 'pull'; it has steps, batch_size, seq_len, lr"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0"),
        (
            {"freeze": 6},
            "freeze=6 is not supported by method 'distill'; use 4 (little text), 3, 2 (corpus) or 0 (no last phase)",
        ),
        ({"tune": -1}, "tune=-1; give a number of at least 0"),
        ({"samples": 10**6}, "sequences of 16 tokens need"),
        ({"resume": True}, "--resume found no interrupted run"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    options: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run(**options)
    assert not list(tmp_path.iterdir())


def stop(stage: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start or continue a run and interrupt it in a stage."""
    module, name, calls = STOPS[stage]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Interrupt(getattr(module, name), calls))
        with pytest.raises(KeyboardInterrupt):
            run()
