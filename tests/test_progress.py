"""Lines in a log: which are written when, with the time left, and nothing on stdout."""

import io
import json
import sys
import time
from pathlib import Path

import pytest

import conftest
from cases import each
from matquant import cli
from matquant.system import progress
from matquant.system.progress import Log, duration


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> Log:
    return Log("eval", stream=io.StringIO(), clock=clock)


def lines(log: Log) -> list[str]:
    stream = log._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


def test_a_log_has_a_line_for_every_stage_and_one_a_minute_with_the_time_left(log: Log, clock: Clock) -> None:
    for second in range(0, 301, 10):
        clock.now = float(second)
        log.at("int8" if second < 150 else "int4", f"{second} of 600", done=second, total=600)
    assert lines(log) == [
        "eval: 0 of 600, 0:00 elapsed",
        "eval: 60 of 600, 1:00 elapsed, about 9:00 left",
        "eval: 120 of 600, 2:00 elapsed, about 8:00 left",
        "eval: 150 of 600, 2:30 elapsed, about 7:30 left",
        "eval: 210 of 600, 3:30 elapsed, about 6:30 left",
        "eval: 270 of 600, 4:30 elapsed, about 5:30 left",
    ]


def test_what_a_resumed_run_takes_up_at_once_is_not_its_speed(log: Log, clock: Clock) -> None:
    for block in range(1, 11):  # read from the disk
        clock.now += 0.05
        log.at("block", f"block {block}", done=block, total=20, block=True)
    clock.now += 100
    log.at("block", "block 11", done=11, total=20, block=True)
    assert len(lines(log)) == 11
    assert lines(log)[-1].endswith("about 15:00 left")


def test_a_stage_that_reports_nothing_is_named_again_every_minute(log: Log, clock: Clock) -> None:
    log.at("load", "loading the model")
    for second in range(15, 151, 15):
        clock.now = float(second)
        log.beat()
    assert lines(log) == [
        "eval: loading the model, 0:00 elapsed",
        "eval: still loading the model, 1:00 elapsed",
        "eval: still loading the model, 2:00 elapsed",
    ]


def test_a_short_stage_that_is_quiet_writes_nothing(log: Log, clock: Clock) -> None:
    log.at("write", "1 of 2", done=1, total=2, quiet=True)
    clock.now = 1.9
    log.at("write", "2 of 2", done=2, total=2, quiet=True)
    assert lines(log) == []
    clock.now = 2.1
    log.at("write", "2 of 2", done=2, total=2, quiet=True)
    assert lines(log) == ["eval: 2 of 2, 0:02 elapsed, about 0:00 left"]


def test_a_log_that_is_closed_does_not_end_the_work(clock: Clock) -> None:
    stream = io.StringIO()
    stream.close()
    Log("eval", stream=stream, clock=clock).at("a", "a")


def test_the_thread_of_a_log_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    stream = io.StringIO()
    with Log("eval", stream=stream) as log:
        log.at("load", "loading")
        while "still loading" not in stream.getvalue():
            time.sleep(0.005)
    assert not log._thread.is_alive()


@each(("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (750, "12:30"), (10800, "3:00:00")])
def test_durations_are_minutes_and_seconds(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_records_of_training_become_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.quantising() as report:
        report({"step": 1, "steps": 300, "loss": {"8": 0.5, "2": 3.25}, "tok_s": 1200.0, "notice": "slow"})
        report({"step": 2, "steps": 300, "loss": {"8": 0.5, "2": 3.0}, "tok_s": 1200.0, "notice": "slow"})
        report({"step": 1, "steps": 2, "loss": {"8": 0.5}, "block": "model.layers.0", "stage": "2/3"})
        report({"step": 2, "steps": 2, "loss": {"8": 0.5}, "block": "model.layers.1", "stage": "2/3"})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "note: slow",
        "quantize: step 1 of 300, int8 0.5  int2 3.25  1,200 tok/s, 0:00 elapsed",
        "quantize: 2/3, block 1 of 2, int8 0.5  model.layers.0, 0:00 elapsed",
        "quantize: 2/3, block 2 of 2, int8 0.5  model.layers.1, 0:00 elapsed",
    ]


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("progress") / "made", method="rtn", scope="all")


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The command line in this process: what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["matquant", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return capsys.readouterr()


def test_eval_names_the_width_it_is_at_and_its_last_line_stays_json(
    made: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", made, "--text", text_file, "--bits", "8,3", "--max-tokens", "200", "--reference", llama)
    out, err = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert set(json.loads(out.splitlines()[-1])["log_perplexity"]) == {"8", "3"}
    stages = [line.removeprefix("eval: ").split(",")[0] for line in err.splitlines()]
    assert stages == ["the float model", "int8", "int3"]  # the reference is measured first
    assert "eval" not in out.splitlines()[0]


def test_plan_and_report_say_how_far_they_are(
    made: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--text", text_file, "--seq-len", "16", "--samples", "1", "--widths", "4,8", "--evaluations", "1")
    size = ("--bits-per-weight", "7", "-o", tmp_path / "plan.json")
    out, err = run("plan", made, *more, *size, monkeypatch=monkeypatch, capsys=capsys)
    assert json.loads(out.splitlines()[-1])["strategy"] == "search"
    assert err.startswith("plan: plans measured, 1 of ")
    page = ("-o", tmp_path / "page.html", "--max-tokens", "100")
    out, err = run("report", made, "--text", text_file, *page, monkeypatch=monkeypatch, capsys=capsys)
    assert out == f"wrote {tmp_path / 'page.html'}\n"
    assert [line.split(",")[0] for line in err.splitlines()][:2] == [
        "report: int8",
        "report: int6",
    ]


def test_gptq_writes_a_line_for_every_block(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "gptq", "--text", text_file, "--samples", "4", "--seq-len", "16", "--sweeps", "0")
    _, err = run("quantize", llama, "-o", tmp_path / "out", *more, monkeypatch=monkeypatch, capsys=capsys)
    assert [line.split(",")[0] for line in err.splitlines() if "block" in line] == [
        "quantize: block 1 of 3",
        "quantize: block 2 of 3",
        "quantize: block 3 of 3",  # the head
    ]
