"""Train the reference model: one small Llama, its tokenizer, its numbers and its model card, from plain text.

Idea. A compression method needs a patient: a language model that is really trained, small enough to live in the
repository, and full enough of information that coarse weights hurt it. This script makes that model on a laptop-size
CPU in a little over an hour, and everything it does is a constant below.

1. **Tokenizer**: byte-level byte-pair encoding (Sennrich et al. 2016, over bytes as in GPT-2). All 256 bytes are in
   the vocabulary, so nothing is ever unknown and ``decode(encode(text)) == text`` for every string. ``encode`` adds no
   special token by itself; the recipe places ``<|endoftext|>`` before each document (it is bos, eos and pad in one).
2. **Model**: Llama (RMSNorm, rotary positions, SwiGLU) with tied embeddings. The loss is the log-perplexity

       L = -1/N * sum_i log p(x_i | x_<i)          [nats per token]

   of next-token prediction over packed windows of 512 tokens.
3. **Optimiser**: AdamW (Loshchilov & Hutter 2019), decay on matrices only, gradient norm clipped at 1.
4. **Schedule**: warm-up, stable, decay (Hu et al. 2024, MiniCPM): the rate is constant until the last ``DECAY_STEPS``
   steps and then falls linearly to zero. Unlike a cosine, the stable part does not depend on the total, so a run can
   be prolonged or shortened before the decay starts without changing anything already done.
5. **Batches without state**: the windows of step ``t`` are a function of ``(SEED, t)`` alone, so resuming needs only
   the weights, the two Adam moments and ``t``, all of which go to one safetensors file.

Cost. About ``6 * parameters * tokens`` floating point operations for the matrices; one bf16 CPU core does about 5,500
tokens a second. Evaluation needs a third of that per token.

Text. TinyStories, a C4 sample, a Wikipedia sample, Shakespeare and public-domain books, read from ``--data``; the last
4 % of every source are held out. The validation half of TinyStories and the WikiText-2 test are only ever measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
MODEL_DIR = HERE / "model"
DEFAULT_DATA = Path(os.environ.get("MATQUANT_DATA", HERE.parents[1] / ".." / "shared" / "data"))
DEFAULT_WORK = Path(tempfile.gettempdir()) / "reference-run"  # checkpoints stay outside the repository

SEED = 20260  # any fixed number; written down so that the run can be repeated
END = "<|endoftext|>"  # bos, eos and pad; also separates the documents of the TinyStories files
VOCAB = 4096  # 1 M embedding parameters: a fifth of the model, and 3 to 4 characters of English per token
CONTEXT = 512  # two average stories
BATCH = 8  # windows per step: 4096 tokens; when tokens are few, more and smaller steps win
STEPS = 5000  # 20.5 M tokens, about four tokens per parameter: what little more than an hour allows
WARMUP = 200  # Adam's second moment (0.95) has settled long before
DECAY_STEPS = 1600  # linear to zero over about the last third
PEAK_LR = 2e-3  # of short runs: 3e-3 beat 2e-3 slightly with 16 windows; 8 windows at 2e-3 beat both by 0.4 nats
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
HELD_OUT = 0.04  # share of each source never trained on
PASSAGE = 2000  # characters; books and plays have no documents, so they are cut at paragraphs into passages like this
SAVE_SECONDS = 120.0  # at most this much work is lost
QUICK_WINDOWS = 24  # windows per source of the evaluations during training: enough for a curve, 1 % of the time
EVAL_BATCH = 8
# How often a token of the source is seen relative to Wikipedia. Stories count most, since the demo tells them;
# the books are five times larger than anything else and would drown the rest.
WEIGHTS = {"tinystories": 2.5, "c4": 1.0, "wiki": 1.0, "shakespeare": 1.0, "books": 0.5}
RTN_BITS = (8, 4, 3, 2)
RTN_LAYERS = {"FFN": ("mlp.",), "FFN + attention": ("mlp.", "self_attn.")}
HARDWARE = "one core of a 2-core x86 server CPU with bf16 matrix units (AMX), shared with other work"  # for the card
LOG_BYTES = 45_000  # of the thinned log that stays with the model

Stream = npt.NDArray[np.int64]  # token ids of packed documents
Streams = dict[str, Stream]  # by source

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# ---------------------------------------------------------------------------------------------------------- files


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(path)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically (safetensors holds tensors only: no code can hide in it, unlike a pickle)."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------- text


def passages(text: str) -> list[str]:
    """Cut a long text at blank lines into passages of at least PASSAGE characters."""
    result: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= PASSAGE:
            result.append(current)
            current = ""
    return [*result, current] if current else result


def stories(path: Path) -> list[str]:
    """Documents of a file in which they are separated by the end-of-text mark."""
    return [document.strip() for document in path.read_text(encoding="utf-8").split(END) if document.strip()]


def articles(path: Path) -> list[str]:
    """Bodies of the <doc ...> ... </doc> elements of a Wikipedia extract; pages that are only a title are left out."""
    found = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [body.strip() for body in found if "\n" in body.strip()]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training documents and the last HELD_OUT of the characters, cut at a document border."""
    budget = HELD_OUT * sum(map(len, documents))
    index = len(documents)
    while index > 0 and budget > 0:
        index -= 1
        budget -= len(documents[index])
    return documents[:index], documents[index:]


def load_text(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out documents per source."""
    folder = data / "text"
    parts = {
        "tinystories": [stories(folder / "tinystories-train.txt")],
        "c4": [[line for line in (folder / "c4-sample.txt").read_text(encoding="utf-8").splitlines() if line.strip()]],
        "wiki": [articles(folder / "wiki-sample.txt")],
        "shakespeare": [passages((folder / "tinyshakespeare.txt").read_text(encoding="utf-8"))],
        "books": [passages(path.read_text(encoding="utf-8")) for path in sorted((folder / "books").glob("*.txt"))],
    }
    halves = {name: [split(documents) for documents in files] for name, files in parts.items()}
    train = {name: [text for pair in pairs for text in pair[0]] for name, pairs in halves.items()}
    held = {name: [text for pair in pairs for text in pair[1]] for name, pairs in halves.items()}
    return train, held


def train_tokenizer(train: dict[str, list[str]], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training documents, saved as a folder that AutoTokenizer loads without a network."""

    def texts() -> Iterator[str]:
        for name, documents in train.items():  # merges follow counts: count each source as often as training sees it
            whole, rest = divmod(WEIGHTS[name], 1.0)
            yield from documents * int(whole)
            yield from documents[: int(len(documents) * rest)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,  # otherwise decoding would turn " ." into "."
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    write_atomic(path, json.dumps(settings, indent=2) + "\n")
    return fast


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Stream:
    """One stream of token ids: the end-of-text token, then a document, and so on, closed by one more."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False):
        ids.append(end)
        ids.extend(encoding.ids)
    ids.append(end)
    return np.asarray(ids, dtype=np.int64)


class Batches:
    """Random windows of the packed streams; batch ``t`` depends on the seed and ``t`` only.

    Half of the windows start at a document, so that position 0 holds the end-of-text token as often as sampling needs
    it; the others start anywhere, so that every part of a long document is reached.
    """

    def __init__(self, streams: Streams, end: int) -> None:
        self.streams = list(streams.values())
        self.starts = [np.flatnonzero(stream[: -CONTEXT - 1] == end) for stream in self.streams]
        mass = np.asarray([WEIGHTS[name] * len(stream) for name, stream in streams.items()])
        self.probabilities = mass / mass.sum()

    def at(self, step: int) -> torch.Tensor:
        """Token ids of one step, (BATCH, CONTEXT + 1): inputs and, shifted by one, targets."""
        random = np.random.default_rng((SEED, step))
        rows = []
        for source in random.choice(len(self.streams), BATCH, p=self.probabilities):
            stream, starts = self.streams[source], self.starts[source]
            whole = random.random() < 0.5
            offset = random.choice(starts) if whole else random.integers(len(stream) - CONTEXT)
            rows.append(stream[offset : offset + CONTEXT + 1])
        return torch.from_numpy(np.stack(rows))


# ------------------------------------------------------------------------------------------------- model and loss


def model_config(end: int) -> LlamaConfig:
    """The architecture; hidden, intermediate and vocabulary are multiples of 256, the block of the packed formats."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.02,
    )


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of ``windows[:, 1:]`` given what stands before, in float32."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))


@torch.inference_mode()
def log_perplexity(
    model: LlamaForCausalLM, stream: Stream, limit: int | None = None, bf16: bool = False
) -> tuple[float, int]:
    """Nats per token over the windows of CONTEXT targets that lie side by side in the stream, and the token count."""
    count = min((len(stream) - 1) // CONTEXT, limit or len(stream))
    windows = np.stack([stream[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for chunk in torch.from_numpy(windows).tensor_split(math.ceil(count / EVAL_BATCH)):
            total += float(next_token_loss(model, chunk)) * len(chunk)
    return total / count, count * CONTEXT


def evaluate(
    model: LlamaForCausalLM,
    streams: Streams,
    limit: int | None = None,
    bf16: bool = False,
) -> dict[str, float]:
    """Log-perplexity of every stream, and of all of them together (weighted by tokens) under ``total``."""
    results = {name: log_perplexity(model, stream, limit, bf16) for name, stream in streams.items()}
    tokens = sum(count for _, count in results.values())
    total = sum(value * count for value, count in results.values()) / tokens
    return {**{name: value for name, (value, _) in results.items()}, "total": total}


@torch.no_grad()
def round_to_nearest(model: LlamaForCausalLM, bits: int, names: tuple[str, ...]) -> None:
    """Quantise the named linear layers in place: symmetric min-max, one scale per output row.

        scale = max|w| / (2^(bits-1) - 1),   w <- scale * round(w / scale)

    so 2 bits leave the three values -scale, 0 and scale.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part in name for part in names):
            weight = module.weight
            scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            weight.copy_(scale * torch.round(weight / scale))


# ------------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, stable, linear decay to zero."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / DECAY_STEPS)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: shrinking a normalisation gain towards zero has no meaning."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def save_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, seconds: float) -> None:
    """Everything a resumed run needs: weights, both Adam moments, the number of steps done and the time they took."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"moment1.{name}"] = state["exp_avg"]
        tensors[f"moment2.{name}"] = state["exp_avg_sq"]
    save_tensors(path, tensors, {"step": str(step), "seconds": str(seconds)})


@torch.no_grad()
def load_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Inverse of save_state; returns the steps done and their seconds."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        step = int(metadata["step"])
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"moment1.{name}"),
                "exp_avg_sq": file.get_tensor(f"moment2.{name}"),
            }
    return step, float(metadata["seconds"])


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, windows: torch.Tensor, lr: float) -> float:
    """One optimiser step over one batch, with bf16 matrix products; returns the loss before it."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, windows)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; empty if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def start_log(path: Path, step: int) -> None:
    """Drop records later than the state that training continues from."""
    kept = [record for record in read_log(path) if record["step"] <= step]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


@dataclass(frozen=True)
class Run:
    """Choices of one training run that the command line may override."""

    work: Path
    steps: int
    peak: float
    resume: bool


def train_model(
    run: Run,
    model: LlamaForCausalLM,
    batches: Batches,
    held: Streams,
) -> float:
    """Train (or continue) to the last step, logging and saving on the way; returns the seconds spent in all."""
    optimizer = make_optimizer(model)
    state, log = run.work / "state.safetensors", run.work / "training.jsonl"
    done, before = load_state(state, model, optimizer) if run.resume and state.exists() else (0, 0.0)
    start_log(log, done)
    started = saved = last = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=run.steps, completed=done)
        with log.open("a") as file:
            for step in range(done, run.steps):
                lr = learning_rate(step, run.steps, run.peak)
                loss = train_step(model, optimizer, batches.at(step), lr)
                now = time.monotonic()
                rate = BATCH * CONTEXT / (now - last)
                record: dict[str, Any] = {
                    "step": step + 1,
                    "loss": round(loss, 4),
                    "lr": round(lr, 7),
                    "tokens_per_s": round(rate),
                }
                if (step + 1) % math.ceil(run.steps / 10) == 0 or step + 1 == run.steps:
                    values = evaluate(model, held, QUICK_WINDOWS, bf16=True)
                    record["held_out"] = {name: round(value, 4) for name, value in values.items()}
                file.write(json.dumps(record) + "\n")
                file.flush()
                progress.update(task, advance=1, description=f"loss {loss:.3f}  {rate:,.0f} tok/s")
                last = time.monotonic()
                if last - saved > SAVE_SECONDS or step + 1 == run.steps:
                    save_state(state, model, optimizer, step + 1, before + last - started)
                    saved = last = time.monotonic()
    return before + time.monotonic() - started


def prepare(data: Path, folder: Path) -> tuple[Batches, Streams, int]:
    """Tokenizer (made here, so it is the same in every run) and the packed streams; returns the id of END, too."""
    train, held = load_text(data)
    tokenizer = train_tokenizer(train, folder)
    end = int(tokenizer.convert_tokens_to_ids(END))
    streams = {name: pack(tokenizer, documents) for name, documents in train.items()}
    for name, documents in train.items():
        characters = sum(map(len, documents))
        console.print(
            f"{name:12} {len(documents):6} documents  {len(streams[name]):9,} tokens"
            f"  {characters / len(streams[name]):.2f} characters/token"
        )
    return Batches(streams, end), {name: pack(tokenizer, documents) for name, documents in held.items()}, end


# ------------------------------------------------------------------------------------------- export, numbers, card


def export(model: LlamaForCausalLM, tokenizer_dir: Path, out: Path) -> None:
    """Write weights in bf16, configuration and tokenizer; every file appears whole or not at all."""
    end = int(model.config.eos_token_id)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        for path in [*Path(scratch).iterdir(), *tokenizer_dir.iterdir()]:
            write_atomic(out / path.name, path.read_bytes())
            (out / path.name).chmod(0o644)


def load(out: Path) -> LlamaForCausalLM:
    """The exported bf16 weights, computed with in float32 so that the numbers have no rounding of their own."""
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def measure(data: Path, out: Path, held: Streams) -> dict[str, dict[str, float]]:
    """All numbers of the card: held-out parts, the two test texts, and round-to-nearest on the held-out parts."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = data / "text"
    others = {
        "tinystories-valid": pack(tokenizer, stories(text / "tinystories-valid.txt")),
        "wikitext2-test": pack(tokenizer, [(text / "wikitext2-test.raw.txt").read_text(encoding="utf-8")]),
    }
    model = load(out)
    numbers = {"held_out": evaluate(model, held)}
    numbers["tests"] = {name: log_perplexity(model, stream)[0] for name, stream in others.items()}
    for title, names in RTN_LAYERS.items():
        numbers[title] = {}
        for bits in RTN_BITS:
            model = load(out)
            round_to_nearest(model, bits, names)
            numbers[title][str(bits)] = evaluate(model, held)["total"]
            console.print(f"{title}, {bits} bits: {numbers[title][str(bits)]:.4f}")
    return numbers


def thin_log(log: Path, out: Path) -> None:
    """Copy the training log, keeping every k-th step and all evaluations, within LOG_BYTES."""
    records = read_log(log)
    every = math.ceil(log.stat().st_size / LOG_BYTES)
    kept = [record for record in records if record["step"] % every == 0 or "held_out" in record]
    write_atomic(out, "".join(json.dumps(record) + "\n" for record in kept))


def draw_loss(log: Path, out: Path) -> None:
    """Picture of the loss curve: every step, a running mean, and the held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib import pyplot as plt

    records = read_log(log)
    steps, losses = [r["step"] for r in records], np.asarray([r["loss"] for r in records])
    width = min(50, len(losses))
    figure, axes = plt.subplots(figsize=(7, 4), dpi=90)
    axes.plot(steps, losses, color="#c5d3e8", linewidth=0.6, label="training loss, each step")
    axes.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label=f"mean of {width} steps")
    held = [(r["step"], r["held_out"]) for r in records if "held_out" in r]
    for name in ("tinystories", "total"):
        axes.plot([s for s, _ in held], [v[name] for _, v in held], "o--", markersize=4, label=f"held out: {name}")
    low = min(v["tinystories"] for _, v in held)
    axes.set(xlabel="step", ylabel="nats per token", ylim=(min(low, float(losses.min())) - 0.2, 6.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    temporary = out.with_name("loss.tmp.png")
    figure.savefig(temporary)
    temporary.replace(out)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Reference model

A Llama-style language model of 5.3 million parameters, trained by `examples/reference/train.py` to be compressed: small
enough to live in a repository, trained far enough that coarse weights hurt it. It tells children's stories and imitates
the surface of encyclopaedia, web, and nineteenth-century prose. It knows nothing; use it for experiments only.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("examples/reference/model")
model = AutoModelForCausalLM.from_pretrained("examples/reference/model")
inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=150)[0]))
```

## Architecture

`LlamaForCausalLM`: hidden 256, intermediate 768, 5 layers, 4 heads of 64 (4 key/value heads), context {context}, rotary
base 10000, vocabulary 4096, tied embeddings, bf16 weights. Every dimension is a multiple of 256.

The tokenizer is a byte-level BPE: nothing is unknown, and decoding an encoded text gives the text back. Encoding adds
**no** special token. Documents began with `<|endoftext|>` (bos, eos and pad in one, id 0) in training, so put it
in front of a prompt that is to be the start of a document.

## Data

| source | seen relative to Wikipedia | licence |
| --- | --- | --- |
| TinyStories (2.1 MB) | 2.5 | CDLA-Sharing-1.0 |
| C4 sample (1.3 MB) | 1 | the texts keep their own terms |
| Wikipedia sample (2.1 MB) | 1 | the texts keep their own terms (CC BY-SA) |
| Shakespeare (1.1 MB) | 1 | public domain |
| books by Bronte, Darwin, Du Bois (10 MB) | 0.5 | public domain |

None of these texts is part of the repository. The last 4 % of every source were held out (of tokenizer and training),
cut at a document or passage border. The validation part of TinyStories and the WikiText-2 test were only measured.

## Training

{steps} steps of {batch} windows of {context} tokens: {tokens} tokens. AdamW (betas 0.9, 0.95; weight decay 0.1 on
matrices), gradient norm clipped at 1, peak learning rate {peak} after {warmup} steps of warm-up, constant, then linear
to zero over the last {decay} steps; bf16 autocast over float32 weights; seed {seed}. It took {minutes} minutes ({rate}
tokens/s) on {hardware}.

    python examples/reference/train.py --data FOLDER

![loss](loss.png)

`training.jsonl` is the thinned log; its held-out values are of the first {quick} windows of each source, in bf16.

## Log-perplexity

Nats per token (natural logarithm), windows of {context} tokens side by side, each document preceded by `<|endoftext|>`;
bf16 weights, float32 arithmetic. `total` is over all held-out tokens. Tokens are of this tokenizer, so the numbers do
not compare with other models'.

{perplexity}

## Round-to-nearest

Held-out log-perplexity (`total`) after symmetric min-max rounding of the linear layers, one scale per output row:
`scale = max|w| / (2^(bits-1) - 1)`. Embeddings stay as they are.

{rtn}
"""


def card(run: Run, seconds: float, numbers: dict[str, dict[str, float]]) -> str:
    """The model card, filled in with the numbers of this run."""
    held, tests = numbers["held_out"], numbers["tests"]
    perplexity = [[name, f"{value:.4f}", f"{math.exp(value):.2f}"] for name, value in {**held, **tests}.items()]
    rtn = [
        [title, f"{held['total']:.4f}", *(f"{numbers[title][str(bits)]:.4f}" for bits in RTN_BITS)]
        for title in RTN_LAYERS
    ]
    tokens = run.steps * BATCH * CONTEXT
    return CARD.format(
        steps=f"{run.steps:,}",
        tokens=f"{tokens / 1e6:.1f} M",
        minutes=f"{seconds / 60:.0f}",
        rate=f"{tokens / seconds:,.0f}",
        seed=SEED,
        peak=run.peak,
        warmup=WARMUP,
        decay=DECAY_STEPS,
        batch=BATCH,
        context=CONTEXT,
        quick=QUICK_WINDOWS,
        hardware=HARDWARE,
        perplexity=table(["text", "log-perplexity", "perplexity per token"], perplexity),
        rtn=table(["layers", "bf16", *(f"{bits} bits" for bits in RTN_BITS)], rtn),
    )


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder that holds text/.")] = DEFAULT_DATA,
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = MODEL_DIR,
    work: Annotated[Path, typer.Option(help="Where the state and the full log go.")] = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(help="Optimiser steps, decay included.")] = STEPS,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = PEAK_LR,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the state in the work folder.")] = False,
) -> None:
    """Train the reference model, measure it and write its folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    run = Run(work, steps, lr, resume)
    batches, held, end = prepare(data, work / "tokenizer")
    model = LlamaForCausalLM(model_config(end))
    seconds = train_model(run, model, batches, held)
    export(model, work / "tokenizer", out)
    console.print(f"trained in {seconds:.0f} s; weights are in {out}")
    numbers = measure(data, out, held)
    thin_log(work / "training.jsonl", out / "training.jsonl")
    draw_loss(work / "training.jsonl", out / "loss.png")
    write_atomic(out / "README.md", card(run, seconds, numbers))
    console.print_json(data=numbers)


if __name__ == "__main__":
    app()
