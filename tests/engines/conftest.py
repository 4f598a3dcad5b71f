"""Exports in the engines they are for, each in an environment of its own that is made once.

ENGINE.txt lists what pip installs, ENGINE_worker.py runs there: ``python ENGINE_worker.py FOLDER`` reads
FOLDER/job.json,

    {"exports": {name: directory or file}, "prompt": [token, ...], "new_tokens": 40, "windows": file.npy [W, T + 1]}

and writes FOLDER/NAME.safetensors, the float32 weights [N, K] by path as the engine computes with them, and
FOLDER/result.json, {name: {"tokens": the greedy continuation, "log_perplexity": mean nats over the windows, ...}}.
Environments lie under MATQUANT_ENGINES (default .engines/), what was measured in out/engines/.
"""

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import matquant
from environments import make_environment
from matquant.core.spec import Plan
from matquant.export import export
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.loading import load_tokenizer
from matquant.measure.likelihood import log_perplexity
from origin import ROOT

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("MATQUANT_ENGINES", ROOT / ".engines")).resolve()
RESULTS = ROOT / "out" / "engines"
REFERENCE = ROOT / "examples" / "reference"
NEW_TOKENS = 40
CONTEXT, WINDOWS = 256, 8
PROMPTS = {"stories260K": "Once upon a time", "reference": "The"}
WIDTHS = ("8", "6", "4", "3", "2")

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A nested checkpoint, made by one pass of gptq, with a plan, a prompt and token windows [W, T + 1]."""

    name: str
    directory: Path
    plan: Plan
    prompt: list[int]
    windows: np.ndarray

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    def bits(self, name: str) -> dict[str, int]:
        """The width of every path in the export called ``name``, a width or "plan"."""
        plan = self.plan if name == "plan" else Plan(default=int(name))
        return plan.resolve(self.checkpoint.shapes)

    def export(self, name: str, out: Path, **options: Any) -> dict[str, Any]:
        """Export a width or the plan."""
        asked: dict[str, Any] = {"plan": self.plan} if name == "plan" else {"bits": int(name)}
        return export(self.directory, out, **asked, **options)

    def ours(self, dense: Path, dtype: torch.dtype) -> dict[str, Any]:
        """What a worker returns, of a dense export in the transformers of this environment, and logits [T, vocabulary].

        They are those from which each token was chosen.
        """
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
        ids = torch.tensor([self.prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        losses = [log_perplexity(model, window, context=len(window) - 1) for window in self.windows]
        with torch.inference_mode():
            logits = model(input_ids=found[:, :-1]).logits[0, len(self.prompt) - 1 :].float()
        return {
            "tokens": found[0, len(self.prompt) :].tolist(),
            "logits": logits,
            "log_perplexity": sum(losses) / len(losses),
        }


def spread(paths: Iterable[str]) -> Plan:
    """A plan that has every width."""
    return Plan(default=None, bits={path: (2, 4, 8, 3, 6)[number % 5] for number, path in enumerate(paths)})


@pytest.fixture(scope="session", params=PROMPTS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name = request.param
    if name == "reference":
        model, texts, skipped = REFERENCE / "model", REFERENCE / "text" / "{}.txt", 0
    else:
        data = request.getfixturevalue("data")
        model, texts, skipped = data / "models" / name, data / "text" / "tinystories-{}.txt", 1
    train, valid = (Path(str(texts).format(part)) for part in ("train", "valid"))
    out = tmp_path_factory.mktemp(name) / "nested"
    matquant.quantize(model, out, method="gptq", scope="linears", text=[train], samples=32, seq_len=CONTEXT)
    tokenizer = load_tokenizer(model)
    stream = token_stream(read_documents([valid])[skipped:], tokenizer)[: WINDOWS * CONTEXT + 1]
    starts = np.arange(WINDOWS)[:, None] * CONTEXT
    return Subject(
        name=name,
        directory=out,
        plan=spread(open_checkpoint(out).shapes),
        prompt=tokenizer(PROMPTS[name])["input_ids"],
        windows=stream[starts + np.arange(CONTEXT + 1)],
    )


def work(engine: str, worker: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What ``worker`` returns in the environment of ``engine``, and the weights by path it writes as "weights"."""
    python = make_environment(CACHE / engine, (HERE / f"{engine}.txt").read_text().split())
    (folder / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, HERE / worker, folder], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {name: {**result, "weights": load_file(folder / f"{name}.safetensors")} for name, result in found.items()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(engine, subject, {name: export}): what ``work`` returns."""

    def call(engine: str, subject: Subject, exports: Mapping[str, Path]) -> dict[str, Any]:
        folder = tmp_path / f"{engine}-{subject.name}"
        folder.mkdir()
        np.save(folder / "windows.npy", subject.windows)
        job = {
            "exports": {name: str(path) for name, path in exports.items()},
            "prompt": subject.prompt,
            "new_tokens": NEW_TOKENS,
            "windows": str(folder / "windows.npy"),
        }
        return work(engine, f"{engine}_worker.py", folder, job)

    return call


@pytest.fixture
def keep() -> Iterator[Callable[..., None]]:
    """keep(**record): print a line of JSON; all of a test's go to out/engines/FORMAT-MODEL.jsonl."""
    lines: dict[str, list[str]] = {}

    def add(**record: Any) -> None:
        line = json.dumps(record)
        print(line)
        lines.setdefault(f"{record['format']}-{record['model']}.jsonl", []).append(line)

    yield add
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, found in lines.items():
        (RESULTS / name).write_text("\n".join(found) + "\n")
