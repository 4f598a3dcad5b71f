"""Threads: absurd counts are a sentence, forked children go on, those that wait sleep, full machines are one line."""

import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import conftest
import matquant
from matquant import _native, cli
from matquant.core.planes import load_weight, matmul
from matquant.core.tensor import NestedTensor
from matquant.system import threads as counting
from matquant.system.errors import InputError, InUseError
from matquant.system.startup import REMEDIES, let_threads_sleep, shortage

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("threads") / "out", method="rtn", scope="all")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line here: exit code and stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["matquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def weight(rows: int = 48, columns: int = 64) -> NestedTensor:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (rows, columns), dtype=np.uint8)
    scale = np.full((rows, 1), 0.01, np.float32)
    return NestedTensor(codes=codes, scale=scale, zero=np.full_like(scale, 128), rule="prefix")


TOO_MANY = [17, 1025, 20_000, 70_000, 2**31, 10**30]


@pytest.mark.parametrize("count", TOO_MANY)
def test_more_threads_than_a_few_per_core_are_rejected(
    count: int, checkpoint: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "cores", lambda: 2)
    message = f"={count} is too many for 2 cores; use at most 16, ideally one per core"
    x = np.ones((1, 64), np.float32)
    for use in (
        lambda: matquant.Engine(checkpoint, threads=count),
        lambda: conftest.quantize(llama, tmp_path / "out", method="rtn", threads=count),
        lambda: matmul(load_weight(weight()), x, bits=8, threads=count),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert str(caught.value) == f"threads{message}"
    monkeypatch.setenv("OMP_NUM_THREADS", f"{count},1")
    with pytest.raises(InputError) as caught:
        matquant.Engine(checkpoint)
    assert str(caught.value) == f"OMP_NUM_THREADS{message}"


def test_a_few_threads_per_core_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, most in ((1, 16), (4, 16), (8, 32), (64, 256), (512, 1024)):
        monkeypatch.setattr(counting, "cores", lambda cores=cores: cores)
        assert counting.most_threads() == most
        assert counting.check_threads(most) == most
    for given, found in (("3", 3), ("3,2", 3), ("", 512), ("many", 512), ("0", 512)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert counting.check_threads(None) == found


@pytest.mark.parametrize("verb", ["generate", "bench", "quantize", "verify"])
def test_too_many_threads_end_a_command_with_one_line(
    verb: str, checkpoint: Path, llama: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "cores", lambda: 2)
    where = (llama, "-o", tmp_path / "out", "--method", "rtn") if verb == "quantize" else (checkpoint,)
    if verb != "verify":
        assert command(verb, *where, "--threads", 70000) == (
            2,
            "error: threads=70000 is too many for 2 cores; use at most 16, ideally one per core\n",
        )
    monkeypatch.setenv("OMP_NUM_THREADS", "70000")
    code, told = command(verb, *where)
    assert (code, told.startswith("error: OMP_NUM_THREADS=70000 is too many"), told.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("count", [-1, 0, 1025, 70_000])
def test_the_native_module_is_never_run_with_absurd_threads(count: int, checkpoint: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=1)
    with pytest.raises(ValueError, match="threads must be from 1 to 1024"):
        _native.Workspace(engine.model.native, 8, 16, count)
    with pytest.raises(ValueError, match="threads must be from 1 to 1024"):
        _native.Stream(4096).read(count)
    if count != 0:  # as many as there are
        planes = load_weight(weight()).planes.native
        with pytest.raises(ValueError, match="threads must be from 1 to 1024"):
            planes.matmul(np.ones((1, 64), np.float32), 8, 0, count)


def test_far_more_threads_than_cores_give_the_same_text_in_reasonable_time(checkpoint: Path) -> None:
    one, many = (matquant.Engine(checkpoint, threads=count) for count in (1, counting.ALWAYS))
    expected = one.generate("The cat", max_tokens=8)
    began = time.perf_counter()
    assert many.generate("The cat", max_tokens=8) == expected
    assert time.perf_counter() - began < 20


def test_threads_that_wait_for_work_use_no_processor(checkpoint: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=8)
    engine.generate("The cat", max_tokens=4)
    time.sleep(0.02)  # the spin is over long before
    began = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - began < 0.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_what_its_parent_did(checkpoint: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=3)
    expected = engine.generate("The cat", max_tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks with threads
        child = os.fork()
    if child == 0:
        same = engine.generate("The cat", max_tokens=8) == expected
        fresh = matquant.Engine(checkpoint, threads=2).generate("The cat", max_tokens=8) == expected
        os._exit(0 if same and fresh else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert engine.generate("The cat", max_tokens=8) == expected


# Sessions -------------------------------------------------------------------------------------------------------------


def test_a_session_used_from_two_threads_at_once_raises(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = matquant.Engine(checkpoint, threads=1)
    session, widths = engine.session(), engine.widths(8)
    inside, leave, step = threading.Event(), threading.Event(), _native.step

    def waits(*arguments: object) -> None:
        inside.set()
        assert leave.wait(60)
        step(*arguments)

    monkeypatch.setattr(_native, "step", waits)
    first = threading.Thread(target=session.extend, args=([1, 2], widths))
    first.start()
    assert inside.wait(60)
    for use in (lambda: session.extend([3], widths), lambda: session.rewind(0), lambda: session.begin([1], widths)):
        with pytest.raises(InUseError, match="in use by another thread"):
            use()
    leave.set()
    first.join()
    assert session.ids == [1, 2]
    session.extend([3], widths)
    assert session.ids == [1, 2, 3]


def test_two_completions_do_not_share_a_session(checkpoint: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=1)
    session = engine.session()
    first, second = (iter(engine.stream("The cat", max_tokens=30, session=session)) for _ in range(2))
    next(first)
    next(second)  # the first one was left half-way
    with pytest.raises(InUseError, match="another completion has used this session"):
        list(first)
    alone = engine.generate("The cat", max_tokens=30)
    assert engine.generate("The cat", max_tokens=30, session=session) == alone


def test_a_completion_is_read_once(checkpoint: Path) -> None:
    reply = matquant.Engine(checkpoint, threads=1).stream("The cat", max_tokens=6)
    first = next(iter(reply))
    assert first + "".join(reply)
    with pytest.raises(InUseError, match="read already"):
        list(reply)


@pytest.mark.parametrize("length", [-1, 3, 2**70])
def test_a_session_is_rewound_to_what_it_holds(length: int, checkpoint: Path) -> None:
    engine = matquant.Engine(checkpoint, threads=1)
    session = engine.session()
    session.extend([1, 2], engine.widths(8))
    with pytest.raises(InputError) as caught:
        session.rewind(length)
    assert str(caught.value) == f"cannot rewind a session of 2 tokens to length={length}; use 0 to 2"
    session.rewind(2)
    session.rewind(0)
    assert session.ids == []


# A machine that is full -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (MemoryError("std::bad_alloc"), "memory"),
        (RuntimeError("can't start new thread"), "threads"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.\nmore"), "memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
    ],
)
def test_a_machine_without_memory_or_threads_is_one_line_and_exit_code_2(
    error: Exception, kind: str, checkpoint: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    for verb, place in (
        ("generate", "matquant.engine.engine.load_within"),
        ("verify", "matquant.cli.verify.verify_checkpoint"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            code, told = command(verb, checkpoint)
        assert (code, told.count("\n")) == (2, 1)
        assert told.startswith(f"error: the machine has no {kind} left (")
        assert told.endswith(f"{REMEDIES[kind]}\n")


def test_other_errors_are_not_taken_for_a_full_machine() -> None:
    assert [shortage(error) for error in (ValueError("not enough memory"), RuntimeError("no"), KeyError("x"))] == [
        None
    ] * 3


def test_the_reason_behind_a_failed_import_is_found() -> None:
    hidden = ImportError("numpy could not be imported")
    hidden.__cause__ = ImportError("libblas.so: failed to map segment from shared object")
    assert str(shortage(hidden)).startswith("the machine has no memory left (libblas.so: failed")


def test_torch_threads_sleep_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, found in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        let_threads_sleep()
        assert os.environ.get("GOMP_SPINCOUNT") == found
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
