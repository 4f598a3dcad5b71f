"""Other quantisers on the same model, the same text, with all bits per weight counted.

    python experiments/peers.py setup [NAME]...         an environment per tool under MATQUANT_PEERS (default .peers/)
    python experiments/peers.py run [--only NAME]...    quantise and evaluate what is not yet in experiments/peers.jsonl
    python experiments/peers.py tasks DATA [--only NAME]...  zero-shot accuracy, into experiments/peer_tasks.jsonl
    python experiments/peers.py report                  print the tables

All are one-shot: a float model, 128 calibration sequences of 512 tokens, no training of the model. Every linear layer
of the decoder is quantised, the rest stays float. Each tool runs in a separate process and environment
(experiments/peers/with_*.py) and writes the dequantised weights and the bytes of its stored form. All are evaluated
here in the same way: in the float model, float32, with our log-perplexity, KL divergence and top-1 agreement. The model
smollm2 is what ``make smollm2`` converts, matquant the nested checkpoints that it makes; smollm2-c4 is the same on
another text. What is compared is in experiments/peer_settings.py.

    bits per weight = 8 * bytes stored for these layers (codes, scales, zeros, g_idx, block headers) / their weights

g_idx, which GPTQModel stores though nothing needs it without reordering, is also listed apart. ``bits`` of a record is
the nominal width. A finished job under MATQUANT_PEERS/jobs is not run again: remove its folder to do so. Another build
of llama.cpp serves if its tools are in MATQUANT_PEERS/llamacpp/build/bin and llamacpp/ready says what it is.
"""

import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file

from matquant.calibration import calibration_text
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.measure import kept
from matquant.measure.likelihood import keep, measure
from matquant.measure.tasks import TASKS, find_harness, open_tasks
from matquant.measure.windows import Windows, cut

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from environments import make_environment
from origin import ROOT, origin
from peer_settings import CMAKE, CONTEXT, ENVIRONMENT, LLAMACPP, MODELS, PACKAGES, SETTINGS

RECORDS = ROOT / "experiments" / "peers.jsonl"
TASK_RECORDS = ROOT / "experiments" / "peer_tasks.jsonl"
WORKERS = ROOT / "experiments" / "peers"
SHARED = ROOT / "bench" / "peers"  # llama_gguf.py
CACHE = Path(os.environ.get("MATQUANT_PEERS", ROOT / ".peers")).resolve()
CALIBRATION = 128  # windows of CONTEXT tokens, the first of the training text
TOLERANCE = 1e-3  # at 8 bits, relative to the float model's log-perplexity: more means a wrong read-back

app = typer.Typer(add_completion=False)
Only = Annotated[list[str] | None, typer.Option(help="Tools to run.")]
Setting = Annotated[list[str] | None, typer.Option(help="Settings to run, by name.")]
Width = Annotated[list[int] | None, typer.Option(help="Nominal widths to run.")]
Threads = Annotated[int, typer.Option(help="CPU threads of a tool and of the evaluation.")]
Row = tuple[str, str, dict[str, Any], int]  # tool, setting, its options, nominal width


@app.command()
def setup(names: Annotated[list[str] | None, typer.Argument(help="Tools; all by default.")] = None) -> None:
    """Make the environments that are not there yet."""
    for name in names or PACKAGES:
        folder = CACHE / name
        ready = folder / "ready"
        if ready.is_file():
            continue
        make_environment(folder, PACKAGES[name])
        if name == "llamacpp":
            _build_llamacpp(folder)
        ready.write_text(LLAMACPP if name == "llamacpp" else "")


def _build_llamacpp(folder: Path) -> None:
    """llama-quantize and llama-imatrix, for this processor, from the sources inside the archive."""
    fetch: list[str | Path] = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, LLAMACPP]
    subprocess.run([folder / "venv" / "bin" / "pip", *fetch], check=True)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", *CMAKE], check=True)
    targets = ["--target", "llama-quantize", "llama-imatrix"]
    subprocess.run(["cmake", "--build", folder / "build", "-j", "2", *targets], check=True)


@app.command()
def run(
    only: Only = None,
    model: Annotated[list[str] | None, typer.Option(help="Models to run.")] = None,
    setting: Setting = None,
    width: Width = None,
    threads: Threads = 1,
) -> None:
    """Run what has no record yet."""
    torch.set_num_threads(threads)
    for name in model or MODELS:
        rows = _rows(name, only, setting, width, known=_records(RECORDS))
        if not rows:
            continue
        float_model, windows = _load(name)
        stem = MODELS[name].jobs or name
        original = _original(stem, float_model)
        reference = _keep(name, float_model, windows)
        for peer, row, options, bits in rows:
            weights, outcome = _quantise(stem, peer, row, options, bits, original, threads)
            if weights is not None:
                _install(float_model, weights)
                outcome = {**outcome, **_measure(float_model, windows, reference, original, outcome["bytes_by_part"])}
                if peer != "matquant":  # whose int8 shares its codes with int2
                    _check_read_back(outcome["log_perplexity"], reference.log_perplexity, bits, f"{peer}, {row}")
            _append(RECORDS, {"model": name, "peer": peer, "setting": row, "bits": bits, **outcome})


@app.command()
def tasks(
    data: Annotated[Path, typer.Argument(help="A directory with a .jsonl file for every task.")],
    only: Only = None,
    setting: Setting = None,
    width: Width = None,
    limit: Annotated[int, typer.Option(help="Questions of each task.")] = 500,
    threads: Threads = 1,
) -> None:
    """Answer the six zero-shot tasks with smollm2 as each tool quantised it, in float32 on torch."""
    torch.set_num_threads(threads)
    name, harness = "smollm2", find_harness()
    model, _ = _load(name)
    served = harness.wrap(model, load_tokenizer(MODELS[name].model), batch_size=16)
    original = _original(name, model)
    known = [record for record in _records(TASK_RECORDS) if record["limit"] == limit]
    with open_tasks(harness, list(TASKS), data) as opened:
        for peer, row, options, bits in _rows(name, only, setting, width, known=known):
            weights, outcome = _quantise(name, peer, row, options, bits, original, threads)
            if weights is not None:
                _install(model, weights)
                found = {one: harness.score(served, task, limit=limit) for one, task in opened.items()}
                outcome = {"accuracy": {one: found[one][f"{TASKS[one].metric},none"] for one in TASKS}}
            about = {"limit": limit, "harness": harness.VERSION}
            _append(TASK_RECORDS, {"model": name, "peer": peer, "setting": row, "bits": bits, **about, **outcome})


def _rows(
    model: str,
    only: list[str] | None,
    setting: list[str] | None,
    width: list[int] | None,
    *,
    known: list[dict[str, Any]],
) -> list[Row]:
    """The rows asked for that have no record among those known."""
    done = {(record["model"], record["peer"], record["setting"], record["bits"]) for record in known}
    return [
        (peer, row, options, bits)
        for peer in only or SETTINGS
        for row, options, widths in SETTINGS[peer]
        if row in (setting or [row])
        for bits in widths
        if bits in (width or [bits])
        if not (peer == "matquant" and MODELS[model].nested is None)
        if (model, peer, row, bits) not in done
    ]


def _original(stem: str, model: Any) -> dict[str, torch.Tensor]:
    """The float weights by path, mapped from the cache, so that memory holds one model only."""
    stored = load_weights(CACHE / f"{stem}.safetensors")
    return {path: stored[f"{path}.weight"] for path in decoder_linears(model)}


def decoder_linears(model: Any) -> list[str]:
    """Return the paths of all linear layers of the decoder."""
    return [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in n]


def _load(name: str) -> tuple[Any, Windows]:
    """The float32 model and the windows evaluated; its weights and calibration sequences go to the cache."""
    case, stem = MODELS[name], MODELS[name].jobs or name
    model, tokenizer = load_float(case.model, dtype=torch.float32), load_tokenizer(case.model)
    CACHE.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, CACHE / f"{stem}.safetensors")
    documents = calibration_text() if case.train is None else read_documents([case.train])
    calibration = token_stream(documents, tokenizer)[: CALIBRATION * CONTEXT]
    np.save(CACHE / f"{stem}.npy", calibration.reshape(CALIBRATION, CONTEXT))
    stream = token_stream(read_documents([case.valid])[case.dropped :], tokenizer)
    return model, cut(stream[: case.windows * case.context + 1], context=case.context)


def _keep(name: str, model: Any, windows: Windows) -> kept.Kept:
    """The float model's predictions, which the cache keeps."""
    file = CACHE / f"{name}-predictions.safetensors"
    facts = kept.describe(windows, reference=kept.identity(MODELS[name].model))
    size = {"tokens": windows.predicted, "vocab": model.config.vocab_size}
    if not file.is_file():
        with kept.writing(file, facts, **size) as writer:
            keep(model, windows, writer, report=_silent)
    return kept.open_kept(file, facts, **size)


def _silent(done: int, total: int) -> None:
    """Report nothing: a line per record is enough."""


def _quantise(
    model: str,
    peer: str,
    setting: str,
    options: dict[str, Any],
    bits: int,
    original: dict[str, torch.Tensor],
    threads: int,
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
    """The weights [N, K] by path and what to record of how they were made; no weights: {"error": reason}."""
    arrays = {path: weight.numpy() for path, weight in original.items()}
    if peer == "float":
        return arrays, {"bytes_by_part": {"float": sum(array.nbytes for array in arrays.values())}, "seconds": 0.0}
    if peer == "rtn":
        return round_to_nearest(arrays, bits=bits, **options)
    folder = CACHE / "jobs" / re.sub(r"\W+", "-", f"{model}-{peer}-{setting}-{bits}")
    job = {
        "model": str(MODELS[model].model),
        "nested": str(MODELS[model].nested),
        "weights": str(CACHE / f"{model}.safetensors"),
        "calibration": str(CACHE / f"{model}.npy"),
        "tools": str(CACHE / "llamacpp" / "build" / "bin"),
        "shapes": {path: list(weight.shape) for path, weight in original.items()},
        "options": options,
        "bits": bits,
        "threads": threads,
    }
    return _run_worker(peer, folder, job)


def _run_worker(peer: str, folder: Path, job: dict[str, Any]) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        command: list[str | Path] = [_python(peer), WORKERS / f"with_{peer}.py", folder]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": str(SHARED)}
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        if code != 0:
            return None, {"error": _reason(folder / "log.txt")}
    outcome = json.loads(result.read_text())
    record = {"bytes_by_part": outcome["bytes"], "seconds": round(outcome["seconds"], 1)}
    if "types" in outcome:
        record["types"] = outcome["types"]
    return load_file(folder / "weights.safetensors"), record


def _python(peer: str) -> str:
    """The interpreter of a tool; ours for what runs here."""
    return str(CACHE / peer / "venv" / "bin" / "python") if peer in PACKAGES else sys.executable


def _reason(log: Path) -> str:
    """The last exception of a worker's log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (raised or lines or ["no output"])[-1][:300]


def round_to_nearest(
    arrays: dict[str, np.ndarray], *, bits: int, group_size: int | None
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
    """Asymmetric min-max: weight = low + scale * code, fp16 low and scale per group, dense codes of ``bits`` bits."""
    began = time.perf_counter()
    weights, stored = {}, {"codes": 0, "scales": 0, "zeros": 0}
    for path, weight_NK in arrays.items():
        size = group_size or weight_NK.shape[1]
        if weight_NK.shape[1] % size:
            return None, {"error": f"group_size={size} does not divide in_features={weight_NK.shape[1]} of {path}"}
        groups_GS = weight_NK.reshape(-1, size)
        low_G1 = groups_GS.min(1, keepdims=True).astype(np.float16)
        span_G1 = groups_GS.max(1, keepdims=True) - low_G1
        scale_G1 = np.maximum(span_G1 / (2**bits - 1), np.finfo(np.float16).tiny).astype(np.float16)
        low, scale = low_G1.astype(np.float32), scale_G1.astype(np.float32)
        code_GS = np.clip(np.rint((groups_GS - low) / scale), 0, 2**bits - 1)
        weights[path] = (low + scale * code_GS).reshape(weight_NK.shape)
        stored["codes"] += math.ceil(weight_NK.size * bits / 8)
        stored["scales"] += scale_G1.nbytes
        stored["zeros"] += low_G1.nbytes
    return weights, {"bytes_by_part": stored, "seconds": round(time.perf_counter() - began, 2)}


def _install(model: Any, weights: dict[str, np.ndarray]) -> None:
    for path, weight in weights.items():
        parameter = model.get_submodule(path).weight
        assert parameter.shape == weight.shape, f"{path}: {weight.shape} for {tuple(parameter.shape)}"
        parameter.data.copy_(torch.from_numpy(weight))


def _measure(
    model: Any, windows: Windows, reference: kept.Kept, original: dict[str, torch.Tensor], parts: dict[str, int]
) -> dict[str, Any]:
    """Quality, size and how far the weights moved: |W' - W| / |W| over all layers."""
    moved = sum(float((model.get_submodule(p).weight.detach() - w).square().sum()) for p, w in original.items())
    norm = sum(float(w.square().sum()) for w in original.values())
    count = sum(weight.numel() for weight in original.values())
    stored = sum(parts.values())
    if moved == 0:  # the float model, whose predictions are kept already
        found = {"ppl": reference.log_perplexity, "kld": 0.0, "top1": 1.0}
    else:
        found = measure(model, windows, kept=reference, report=_silent)
    return {
        "log_perplexity": found["ppl"],
        "kl_divergence": found["kld"],
        "top1_agreement": found["top1"],
        "weight_error": math.sqrt(moved / norm),
        "bytes": stored,
        "bits_per_weight": 8 * stored / count,
        "bits_per_weight_without_g_idx": 8 * (stored - parts.get("g_idx", 0)) / count,
    }


def _check_read_back(value: float, reference: float, bits: int, what: str) -> None:
    if bits >= 8 and abs(value / reference - 1) > TOLERANCE:
        raise ValueError(
            f"{what} at {bits} bits has log-perplexity {value:.4f}, the float model {reference:.4f}; "
            f"at 8 bits they agree within {TOLERANCE:.1%}: mend how its weights are read back"
        )


def _origin(peer: str) -> dict[str, Any]:
    return {**origin(), "versions": _versions(peer)}


def _versions(peer: str) -> dict[str, str]:
    """Of the tool's packages in its own environment; ours for what runs here."""
    wanted = [re.split("==", item)[0] for item in PACKAGES.get(peer, ("torch", "transformers", "numpy"))]
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run([_python(peer), "-c", code, *wanted], capture_output=True, text=True, check=True).stdout
    extra = {"llama.cpp": (CACHE / peer / "ready").read_text()} if peer == "llamacpp" else {}
    return {**json.loads(found), **extra}


def _append(records: Path, record: dict[str, Any]) -> None:
    line = json.dumps({**record, **_origin(record["peer"])}, sort_keys=True)
    with records.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@app.command()
def report() -> None:
    """Print a table per model, narrow widths first."""
    for name in MODELS:
        mine = [record for record in _records(RECORDS) if record["model"] == name]
        reference = next((r["log_perplexity"] for r in mine if r["peer"] == "float"), math.nan)
        print(f"\n## {name}\n")
        print(
            "| peer | setting | bits | log-perplexity | over float | KL | top-1 | bits per weight | without g_idx | s |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for record in sorted(mine, key=lambda r: (r["bits"], r.get("bits_per_weight", math.inf))):
            print(_row(record, reference))


def _row(record: dict[str, Any], reference: float) -> str:
    head = f"| {record['peer']} | {record['setting']} | {record['bits']} |"
    if "error" in record:
        return f"{head} failed: {record['error']} | | | | | | |"
    value, apart = record["log_perplexity"], record["bits_per_weight_without_g_idx"]
    apart_cell = f"{apart:.3f}" if apart != record["bits_per_weight"] else ""
    compared = (f"{record[key]:.3f}" if key in record else "" for key in ("kl_divergence", "top1_agreement"))
    return (
        f"{head} {value:.4f} | {value - reference:+.4f} | {' | '.join(compared)} "
        f"| {record['bits_per_weight']:.3f} | {apart_cell} "
        f"| {record['seconds']} |"
    )


if __name__ == "__main__":
    app()
