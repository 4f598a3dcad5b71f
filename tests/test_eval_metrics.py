"""KL divergence and top-1 agreement against formulas written out in float64, and what a reference's file accepts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
import matquant
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.measure import kept, likelihood, pieces, with_torch
from matquant.measure.metrics import METRICS, Totals, Truth, add_logits, check_metrics
from matquant.measure.run import evaluate_checkpoint
from matquant.measure.windows import cut
from matquant.report.page import read_record, write_report
from matquant.system.errors import InputError


def oracle(reference: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """One token at a time, in float64."""
    losses, divergences, agreed = [], [], []
    for p_logits, q_logits, target in zip(reference.astype(float), logits.astype(float), targets, strict=True):
        p, q = np.exp(p_logits - p_logits.max()), np.exp(q_logits - q_logits.max())
        p, q = p / p.sum(), q / q.sum()
        losses.append(-np.log(q[target]))
        divergences.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
        agreed.append(p.argmax() == q.argmax())
    return {name: float(np.mean(x)) for name, x in zip(METRICS, (losses, divergences, agreed), strict=True)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(axis=1, keepdims=True)
    found: np.ndarray = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
    return found


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a reference and of a model that is close to it, and the targets."""
    generator = np.random.default_rng(0)
    reference = generator.normal(scale=3, size=(40, 3000)).astype(np.float32)
    return reference, reference + generator.normal(scale=0.3, size=reference.shape).astype(np.float32), np.arange(40)


def test_metrics_are_those_of_the_formulas(predictions: tuple[np.ndarray, ...]) -> None:
    reference, logits, targets = predictions
    expected = oracle(reference, logits, targets)
    assert 0 < expected["top1"] < 1
    truth = Truth(log_probabilities=log_softmax(reference), best=reference.argmax(axis=1).astype(np.int32))
    totals = Totals()
    add_logits(totals, logits.copy(), targets, truth)
    assert totals.mean() == pytest.approx(expected, abs=1e-6)
    in_torch = torch.from_numpy(logits.copy())
    sums = likelihood._normalise(in_torch)
    found = likelihood._compare(in_torch, sums, truth)
    loss = float(likelihood._losses(in_torch, sums, torch.from_numpy(targets)).mean())
    assert {"ppl": loss, "kld": found["kld"] / 40, "top1": found["agreed"] / 40} == pytest.approx(expected, abs=1e-6)


def test_a_large_vocabulary_costs_no_accuracy() -> None:
    generator = np.random.default_rng(1)
    logits, targets = generator.normal(scale=2, size=(8, 200_000)).astype(np.float32), np.arange(8)
    totals = Totals()
    add_logits(totals, logits.copy(), targets, None)
    expected = oracle(logits[:, :1], logits[:, :1], np.zeros(8, dtype=int)) | {
        "ppl": -log_softmax(logits)[range(8), targets].mean()
    }
    assert totals.mean()["ppl"] == pytest.approx(expected["ppl"], abs=1e-6)
    in_torch = torch.from_numpy(logits)
    losses = likelihood._losses(in_torch, likelihood._normalise(in_torch), torch.from_numpy(targets))
    assert float(losses.mean()) == pytest.approx(expected["ppl"], abs=1e-6)


def test_sixteen_bits_cost_the_divergence_a_millionth_of_a_nat(predictions: tuple[np.ndarray, ...]) -> None:
    reference, logits, targets = predictions
    reference[:, 2999] = -np.inf  # a token that the model never gives
    codes = kept.encode(reference)
    in_torch = torch.from_numpy(reference - reference.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(codes, likelihood._encode(in_torch))
    decoded = kept.decode(codes)
    assert np.isneginf(decoded[:, 2999]).all()
    np.testing.assert_allclose(np.exp(decoded.astype(float)).sum(axis=1), 1, atol=1e-6)
    seen = np.delete(decoded, 2999, axis=1) - np.delete(log_softmax(reference), 2999, axis=1)
    assert np.abs(seen).max() < 2**-11
    logits[:20, 2999] = -np.inf  # nor the other one, for some tokens
    truth = Truth(log_probabilities=decoded, best=reference.argmax(axis=1).astype(np.int32))
    totals = Totals()
    add_logits(totals, logits.copy(), targets, truth)
    assert totals.mean()["kld"] == pytest.approx(oracle(reference, logits, targets)["kld"], abs=1e-6)


# Logits in pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt", "gpt_neox", "qwen3_moe", "bloom", "gptj"])
def test_logits_in_pieces_are_the_models_own(
    family: str, family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_VALUES", 7 * 300 + 1)
    model = load_float(family_model(family))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(3, 20)))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert pieces.can_split(model, ids)
        for split in (True, False):
            found = list(pieces.logits_in_pieces(model, ids, [0, 16, 16], split=split))
            assert [(one, start, len(logits)) for one, start, logits in found] == [
                (0, 0, 7), (0, 7, 7), (0, 14, 6), (1, 16, 4), (2, 16, 4)
            ]  # fmt: skip
            for one, start, logits in found:
                torch.testing.assert_close(logits, expected[one, start : start + len(logits)], rtol=0, atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, expected), "the model is as it was"


def test_a_model_that_goes_on_after_its_decoder_is_not_split(llama: Path) -> None:
    model = load_float(llama)
    usual = model.forward
    ids = torch.arange(16)[None]

    def forward(**options: Any) -> Any:
        output = usual(**options)
        output.logits = output.logits + options["input_ids"][..., None]  # depends on the tokens
        return output

    model.forward = forward
    with torch.inference_mode():
        assert not pieces.can_split(model, ids)


# The file -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("metrics") / "checkpoint", method="rtn", scope="all")


def test_a_reference_is_read_once_and_its_file_reused(
    checkpoint: Path, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "reference.safetensors"
    options: dict[str, Any] = {
        "bits": (8, 2), "text": [text_file], "max_tokens": 320, "metrics": ["ppl", "kld", "top1"],
        "reference_logits": file, "device": "cpu",
    }  # fmt: skip
    record = evaluate_checkpoint(checkpoint, reference=llama, stride=32, **options)
    model, stream = load_float(llama), token_stream(read_documents([text_file]), load_tokenizer(llama))[:321]
    windows = cut(stream, context=64, stride=32)
    for bits in (8, 2):
        logits, wanted, targets = [], [], []
        served = matquant.load(checkpoint, bits, kernels="none")
        for index in range(windows.count):
            row = torch.from_numpy(windows.row(index))
            first = windows.first(index)
            with torch.no_grad():
                logits.append(served(row[None, :-1]).logits[0, first:].numpy())
                wanted.append(model(row[None, :-1]).logits[0, first:].numpy())
            targets.append(row[1:][first:].numpy())
        expected = oracle(*map(np.concatenate, (wanted, logits, targets)))
        found = {"ppl": record["log_perplexity"], "kld": record["kld"], "top1": record["top1"]}
        assert {name: values[str(bits)] for name, values in found.items()} == pytest.approx(expected, abs=2e-6)
    assert record["kld"]["8"] < record["kld"]["2"]
    assert record["top1"]["8"] > record["top1"]["2"]

    monkeypatch.setattr(with_torch, "load_float", lambda *a, **k: pytest.fail("read the reference again"))
    assert evaluate_checkpoint(checkpoint, stride=32, **options) == record
    assert evaluate_checkpoint(checkpoint, reference=llama, stride=32, **options) == record
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    other = shutil.copytree(llama, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    again = "delete it, or give --reference-logits another name"
    for more, message in (
        ({"stride": 16}, f"was made with stride 32; {again}"),
        ({"stride": 32, "seq_len": 48}, f"was made with another text; {again}"),
        ({"stride": 32, "reference": other}, f"was made with another model; {again}"),
    ):
        with pytest.raises(InputError) as caught:
            evaluate_checkpoint(checkpoint, **options, **more)
        assert str(caught.value) == f"--reference-logits {file} {message}"


def test_a_file_that_is_cut_short_or_another_is_refused(tmp_path: Path) -> None:
    windows, file = cut(np.arange(33), context=16), tmp_path / "file"
    facts = kept.describe(windows, reference="a")
    with kept.writing(file, facts, tokens=32, vocab=5) as writer:
        writer.add(np.zeros((32, 5), dtype=np.uint16), np.zeros(32, dtype=np.int32), np.full(32, np.log(5)))
    found = kept.open_kept(file, facts, tokens=32, vocab=5)
    assert found.log_perplexity == pytest.approx(np.log(5))
    np.testing.assert_allclose(found.read(3, 4).log_probabilities, -np.log(5), rtol=1e-6)
    content = file.read_bytes()
    for wrong, part in (
        (content[:-1], "is cut short"),
        (content[:50], "is not a file of reference logits"),
        (b"", "is not a file of reference logits"),
        (b"\xff" * 200, "is not a file of reference logits"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match=f"--reference-logits {file} {part}; delete it, or give"):
            kept.open_kept(file, facts, tokens=32, vocab=5)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"has the shape \[32, 5\], not \[32, 6\]"):
        kept.open_kept(file, facts, tokens=32, vocab=6)


def test_metrics_and_engines_that_do_not_fit_are_refused(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(InputError) as caught:
            evaluate_checkpoint(checkpoint, bits=(8,), **{"text": [text_file], **options})
        return str(caught.value)

    assert refused(metrics=["kld", "top1"]) == (
        "--metrics kld,top1 compares with a reference model and none was given; give --reference MODEL"
    )
    assert refused(metrics=["pll"]) == "--metrics 'pll' is not one of ppl, kld, top1; nearest: 'ppl'"
    assert refused(reference_logits=tmp_path / "f") == (
        "--reference-logits needs a metric that compares; give --metrics ppl,kld,top1"
    )
    assert refused(engine="jax") == "--engine 'jax' is not known; use torch or native"
    assert refused(engine="native", device="cuda") == (
        "--engine native runs on the CPU, not on 'cuda'; drop --device, or use --engine torch"
    )
    assert refused(engine="native", seq_len=65) == (
        "seq_len=65 is longer than the model's context of 64 tokens; use at most 64, or --engine torch"
    )
    with pytest.raises(InputError, match="--metrics names no metric; give one or more of ppl,kld,top1"):
        check_metrics([], has_reference=True)


# The native engine ----------------------------------------------------------------------------------------------------


def test_the_native_engine_scores_the_same_windows_as_its_own_scores(checkpoint: Path, text_file: Path) -> None:
    stream = token_stream(read_documents([text_file]), load_tokenizer(checkpoint))[:321]
    options: dict[str, Any] = {"text": [text_file], "max_tokens": 320, "stride": 16}
    native = evaluate_checkpoint(checkpoint, bits=(8, 3), engine="native", **options)
    exact = evaluate_checkpoint(checkpoint, bits=(8, 3), device="cpu", **options)
    assert (native.pop("engine"), exact.pop("engine")) == ("native", "torch")
    engine, windows = matquant.Engine(checkpoint), cut(stream, context=64, stride=16)
    for bits in (8, 3):
        scores = [engine.score(windows.row(i), bits=bits)[windows.first(i) :] for i in range(windows.count)]
        value = native["log_perplexity"][str(bits)]
        assert value == pytest.approx(-np.concatenate(scores).mean(), abs=1e-6)
        assert value == pytest.approx(exact["log_perplexity"][str(bits)], abs=0.01)
    assert {**native, "log_perplexity": {}} == {**exact, "log_perplexity": {}}


def test_the_native_engine_needs_no_torch(
    checkpoint: Path, llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, record = tmp_path / "reference", tmp_path / "record.json"
    words = [
        "eval",
        checkpoint,
        "--text",
        text_file,
        "--max-tokens",
        "128",
        "--bits",
        "8,2",
        "--metrics",
        "ppl,kld,top1",
    ]
    words += ["--reference-logits", file, "--json", record]
    evaluate_checkpoint(
        checkpoint, bits=(8,), text=[text_file], max_tokens=128, reference=llama, reference_logits=file, metrics=["kld"]
    )
    code = (
        "import sys; from matquant import cli\n"
        "for name in ('torch', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
        f"sys.argv = {['matquant', *map(str, words), '--engine', 'native']!r}\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == read_record(record)
    assert found["kld"]["8"] < found["kld"]["2"]
    assert found["reference"] == pytest.approx(found["log_perplexity"]["8"], abs=0.01)
    write_report(checkpoint, tmp_path / "page.html", records={"mine": found})
    page = (tmp_path / "page.html").read_text()
    assert "KL divergence from the reference" in page
    assert f"<td>{found['kld']['2']:.5f}</td>" in page
    assert f"{100 * found['top1']['2']:.2f}" in page


def test_progress_of_an_evaluation_counts_its_sequences(checkpoint: Path, text_file: Path) -> None:
    for engine in ("torch", "native"):
        seen: list[tuple[str, int, int]] = []
        evaluate_checkpoint(
            checkpoint, bits=(8, 2), text=[text_file], max_tokens=256, engine=engine,
            report=lambda *state, seen=seen: seen.append(state),
        )  # fmt: skip
        counted = [state for state in seen if state[2]]
        assert counted[0] == ("int8", 0, 8)
        assert counted[-1] == ("int2", 8, 8)
        assert [done for _, done, _ in counted] == sorted(done for _, done, _ in counted)
