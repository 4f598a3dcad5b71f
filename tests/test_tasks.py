"""Zero-shot tasks: equal to lm-evaluation-harness on the dense slice, resumed without repeating, refused with reasons.

What needs the harness itself (extra ``eval``, not part of ``dev``) runs with ``make test-tasks``; the rest uses a
stand-in that counts what it is asked.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conftest
import matquant
from matquant import cli
from matquant.export import export
from matquant.format.read import manifest_sha256
from matquant.hf_torch.loading import load_tokenizer
from matquant.measure import run as runs
from matquant.measure.run import evaluate_checkpoint
from matquant.measure.tasks import TASKS, check_tasks, find_harness, open_tasks
from matquant.system.errors import InputError

QUESTIONS = {
    "arc_easy": {"id": "a", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
    "winogrande": {"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "1"},
}


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("tasks") / "checkpoint", method="rtn")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    directory = tmp_path / "zeroshot"
    directory.mkdir()
    for name, question in QUESTIONS.items():
        (directory / f"{name}.jsonl").write_text(json.dumps(question) + "\n")
    return directory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(task, width of the first linear) of every result computed, by a harness that only pretends."""
    done: list[tuple[str, int]] = []

    def score(model: Any, task: str, *, limit: int | None) -> dict[str, Any]:
        width = next(iter(model.bits_by_path.values()))
        done.append((task, width))
        return {"alias": task, "acc,none": width / 10, "acc_norm,none": width / 20, "sample_len": limit}

    harness = SimpleNamespace(
        VERSION="0",
        TEMPLATES=Path("templates"),
        load_task=lambda file: file.stem,
        wrap=lambda model, tokenizer, batch_size: model,
        score=score,
    )
    monkeypatch.setattr(runs, "find_harness", lambda engine: harness)
    return done


def test_every_task_is_scored_at_every_width_of_one_model(
    checkpoint: Path, questions: Path, asked: list[tuple[str, int]], tmp_path: Path, text_file: Path
) -> None:
    plan = tmp_path / "mine.json"
    plan.write_text('{"default": 3}')
    record = evaluate_checkpoint(
        checkpoint, bits=(8, 2), plan_file=plan, text=[text_file], max_tokens=200, tasks=["arc_easy", "boolq"],
        tasks_data=questions, limit=7,
    )  # fmt: skip
    assert asked == [(task, width) for width in (8, 2, 3) for task in ("arc_easy", "boolq")]
    assert record["checkpoint"] == manifest_sha256(checkpoint)
    assert record["plan"]["name"] == "mine"
    assert set(record["plan"]["bits"].values()) == {3}
    assert set(record["log_perplexity"]) == set(record["tasks"]) == set(record["task_average"]) == {"8", "2", "plan"}
    result = record["tasks"]["2"]["arc_easy"]
    assert result.pop("fingerprint")
    assert result == {"metric": "acc_norm", "metrics": {"acc": 0.2, "acc_norm": 0.1}, "questions": 7}
    # normalised accuracy for ARC, plain for BoolQ
    assert record["task_average"] == pytest.approx({"8": 0.6, "2": 0.15, "plan": 0.225})


def test_a_killed_run_continues_and_a_changed_one_does_not(
    checkpoint: Path, questions: Path, asked: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record.json"

    def evaluate(bits: tuple[int, ...], limit: int = 5, kill_at: str = "") -> dict[str, Any]:
        def progress(line: str) -> None:
            if kill_at and line.startswith(kill_at):
                raise KeyboardInterrupt

        options: dict[str, Any] = {"tasks": ["arc_easy", "boolq"], "tasks_data": questions, "limit": limit}
        return evaluate_checkpoint(checkpoint, bits=bits, json_file=file, progress=progress, **options)

    with pytest.raises(KeyboardInterrupt):
        evaluate((8, 2), kill_at="4 of 4")
    assert len(asked) == 3
    assert list(json.loads(file.read_text())["tasks"]["2"]) == ["arc_easy"]
    whole = evaluate((8, 2))
    assert asked[3:] == [("boolq", 2)]
    assert json.loads(file.read_text()) == whole
    evaluate((8, 2, 4))
    assert asked[4:] == [("arc_easy", 4), ("boolq", 4)]
    evaluate((8,), limit=6)
    assert asked[6:] == [("arc_easy", 8), ("boolq", 8)]
    (questions / "boolq.jsonl").write_text(json.dumps(QUESTIONS["boolq"] | {"label": 0}) + "\n")
    evaluate((8,), limit=6)
    assert asked[8:] == [("boolq", 8)]
    file.write_text('{"tasks": 3}')
    evaluate((8,), limit=6)
    assert asked[9:] == [("arc_easy", 8), ("boolq", 8)]


def test_an_unknown_task_names_the_nearest() -> None:
    for wrong, nearest in (("arc", "arc_easy"), ("hellswag", "hellaswag"), ("PIQA", "piqa")):
        with pytest.raises(InputError) as caught:
            check_tasks(["boolq", wrong], None)
        text = str(caught.value)
        assert text.startswith(f"--tasks {wrong!r} is not one of arc_challenge, arc_easy, boolq, ")
        if wrong != "PIQA":
            assert text.endswith(f"nearest: {nearest!r}")
    with pytest.raises(InputError, match="--tasks names no task; give one or more of arc_challenge,arc_easy,"):
        check_tasks([], None)


def test_unusable_data_are_named(questions: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_tasks(["arc_easy", "piqa"], questions)
    assert str(caught.value) == (
        f"--tasks-data {questions / 'piqa.jsonl'}: no such file; give a directory with a .jsonl file for "
        "every task, or drop --tasks-data to use the hub"
    )
    file = questions / "boolq.jsonl"
    file.write_text(json.dumps(QUESTIONS["boolq"]) + '\n{"question": "q", "passage": "p"}\n')
    with pytest.raises(InputError) as caught:
        check_tasks(["boolq"], questions)
    assert str(caught.value) == f"{file}, line 2 has no 'label'; give objects with passage, question, label"
    file.write_text("{")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        check_tasks(["boolq"], questions)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        check_tasks(["boolq"], questions)
    file.write_text("")
    with pytest.raises(InputError, match="is empty; give one object with passage, question, label per line"):
        check_tasks(["boolq"], questions)


def test_a_missing_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matquant.integrations.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError) as caught:
        find_harness()
    assert str(caught.value) == "--tasks needs lm_eval, which is not installed; pip install 'matquant[eval]'"


def test_a_hub_that_cannot_be_reached_says_what_would_do() -> None:
    def refuse(file: Path) -> None:
        assert file == Path("templates") / TASKS["piqa"].template
        raise ConnectionError("no route\nand more")

    harness = SimpleNamespace(TEMPLATES=Path("templates"), load_task=refuse)
    with pytest.raises(InputError) as caught, open_tasks(harness, ["piqa"], None):
        pass
    assert str(caught.value) == ("cannot download the data of piqa (no route); give --tasks-data DIR with piqa.jsonl")


def test_a_reference_or_a_picture_needs_text(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    for more in ({"reference": "x"}, {"plot_file": tmp_path / "x.png"}):
        with pytest.raises(InputError) as caught:
            evaluate_checkpoint(checkpoint, bits=(8,), tasks=["boolq"], tasks_data=questions, **more)  # type: ignore[arg-type]
        assert str(caught.value) == "--reference, --metrics and --plot need log-perplexity; give --text FILE"


def test_options_of_tasks_need_tasks(checkpoint: Path, text_file: Path, questions: Path) -> None:
    for more in ({"limit": 3}, {"tasks_data": questions}):
        with pytest.raises(InputError) as caught:
            evaluate_checkpoint(checkpoint, bits=(8,), text=[text_file], **more)  # type: ignore[arg-type]
        assert str(caught.value) == ("--tasks-data and --limit need --tasks; give --tasks arc_easy,boolq")


def test_the_command_line_scores_tasks(
    checkpoint: Path,
    questions: Path,
    asked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["eval", checkpoint, "--bits", "4,2", "--tasks", "boolq, winogrande", "--tasks-data", questions]
    monkeypatch.setattr("sys.argv", ["matquant", *map(str, words), "--limit", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    out, err = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert record["task_average"] == pytest.approx({"4": 0.4, "2": 0.2})
    assert "40.00" in out
    assert "4 of 4: winogrande at int2" in err
    assert asked == [("boolq", 4), ("winogrande", 4), ("boolq", 2), ("winogrande", 2)]


# With the harness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; make test-tasks")


@pytest.fixture
def by_hand(harness: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """by_hand(directory, tasks, data, limit): the harness on a plain float model, tasks written out by hand."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # a minute of asking the machine what it is

    def evaluate(directory: Path, tasks: list[str], data: Path, limit: int, scratch: Path) -> dict[str, Any]:
        templates = Path(harness.__file__).parent / "tasks"
        files = []
        for name in tasks:
            split = {"arc_easy": "test"}.get(name, "validation")
            template = {"arc_easy": "arc/arc_easy.yaml", "winogrande": "winogrande/default.yaml"}[name]
            file = scratch / f"hand_{name}.yaml"
            file.write_text(
                f"include: {templates / template}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
                f"dataset_kwargs:\n  cache_dir: {scratch}\n  data_files:\n    {split}: {data / name}.jsonl\n"
                f"training_split: null\nvalidation_split: {'null' if split == 'test' else split}\n"
                f"test_split: {split if split == 'test' else 'null'}\nfewshot_split: {split}\n"
            )
            files.append(str(file))
        model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=8)
        manager = TaskManager(include_defaults=False)
        found = harness.simple_evaluate(model=model, tasks=files, task_manager=manager, num_fewshot=0, limit=limit)
        return dict(found["results"])

    return evaluate


@pytest.mark.filterwarnings("ignore")  # theirs
def test_results_equal_the_harness_on_the_dense_slice(
    by_hand: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Exactly, on a real model: every metric at two widths; and the other width's results differ."""
    model, tasks = data / "models" / "stories260K", ["arc_easy", "winogrande"]
    out = conftest.quantize(model, tmp_path / "out", method="rtn", scope="all")
    found = evaluate_checkpoint(out, bits=(4, 2), tasks=tasks, tasks_data=data / "zeroshot", limit=20, device="cpu")
    for bits in (4, 2):
        dense = tmp_path / f"dense{bits}"
        export(out, dense, to="dense", bits=bits)
        expected = by_hand(dense, tasks, data / "zeroshot", 20, tmp_path)
        for task in tasks:
            metrics = {name.removesuffix(",none"): value for name, value in expected[task].items() if "," in name}
            assert metrics
            assert found["tasks"][str(bits)][task]["metrics"] == metrics
            assert found["tasks"][str(bits)][task]["questions"] == 20
    first, second = ([r["metrics"] for r in found["tasks"][bits].values()] for bits in ("4", "2"))
    assert first != second, "two widths gave the same numbers"


@pytest.mark.filterwarnings("ignore")
def test_the_harness_command_line_knows_matquant(
    harness: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import evaluator

    ours = find_harness()
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: "")
    monkeypatch.setattr(ours.NestedLM, "get_model_info", lambda self: {})  # it asks the hub
    out = conftest.quantize(data / "models" / "stories260K", tmp_path / "out", method="rtn", scope="all")
    expected = evaluate_checkpoint(out, bits=(2,), tasks=["arc_easy"], tasks_data=data / "zeroshot", limit=20)
    task = tmp_path / "tasks" / "mine.yaml"
    task.parent.mkdir()
    task.write_text(
        f"include: {ours.TEMPLATES / 'arc/arc_easy.yaml'}\ntask: mine\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  cache_dir: {tmp_path}\n  data_files:\n    test: {data / 'zeroshot' / 'arc_easy.jsonl'}\n"
        "training_split: null\nvalidation_split: null\nfewshot_split: test\n"
    )
    arguments = ["run", "--model", "matquant", "--model_args", f"pretrained={out},bits=2", "--tasks", str(task)]
    arguments += ["--limit", "20", "--batch_size", "8", "--output_path", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["lm-eval", *arguments])
    ours.main()
    (written,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["mine"]
    metrics = {name.removesuffix(",none"): value for name, value in results.items() if "," in name}
    assert metrics == expected["tasks"]["2"]["arc_easy"]["metrics"]
    monkeypatch.setattr("sys.argv", ["lm-eval", *(a.replace("bits=2", "bits=9") for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        ours.main()
    assert ended.value.code == 2
    assert "error: bits=9 is not a width" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_native_engine_answers_as_torch_does_without_it(harness: Any, data: Path, tmp_path: Path) -> None:
    """In float arithmetic every metric of the dense model; in int8 without importing torch."""
    from lm_eval.api.instance import Instance

    torch_side, native_side = find_harness(), find_harness("native")
    out = conftest.quantize(data / "models" / "stories260K", tmp_path / "out", method="rtn", scope="all")
    questions = [json.loads(line) for line in (data / "zeroshot" / "arc_easy.jsonl").read_text().splitlines()[:4]]
    pairs = [(f"Question: {q['question']}\nAnswer:", f" {text}") for q in questions for text in q["choices"]["text"]]
    pairs += [("", "Once upon a time"), ("long " * 600, " end"), ("a ", "b")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    engine = matquant.Engine(out, activations="float", threads=1)
    native = native_side.wrap_engine(engine)
    counted: list[tuple[int, int]] = []
    native.report = lambda *state: counted.append(state)
    dense = torch_side.wrap(matquant.load(out, 3, kernels="none"), load_tokenizer(out), batch_size=4)
    expected = dense.loglikelihood(asked, disable_tqdm=True)
    wider = native.loglikelihood(asked)
    native.set_widths(engine.widths(3))
    found = native.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [score for score, _ in wider] != pytest.approx([score for score, _ in expected], abs=2e-3)
    assert counted[: len(pairs)] == [(done, len(pairs)) for done in range(len(pairs))]

    words = ["eval", out, "--engine", "native", "--bits", "8,2", "--tasks", "arc_easy", "--limit", "10"]
    words += ["--tasks-data", data / "zeroshot"]
    code = (
        "import sys; from matquant import cli\n"
        f"sys.argv = {['matquant', *map(str, words)]!r}\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["tasks"]["8"]["arc_easy"]["questions"] == 10
    assert "eval: 2 of 2: arc_easy at int2" in done.stderr
