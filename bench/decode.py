"""Tokens per second of a model at every width, compared with the streaming limit, its int8 and llama.cpp.

    python bench/decode.py setup      llama.cpp for this processor and ik_llama.cpp, in environments under
                                      MATQUANT_PEERS (.peers/)
    python bench/decode.py run        measure: a record per shape, thread count and group size in bench/decode.jsonl
    python bench/decode.py report     the newest records against their targets
    python bench/decode.py plot       docs/roofline.png

Models have the shapes of released ones, vocabulary included, and random weights. All matrices are nested, the tied
head is read at HEAD_BITS or wider, and every figure is of a whole token. Shapes without experts run as a Llama: norms
of queries and keys are left out. llama.cpp gets random blocks of the type of the same nominal width for every matrix
but the head, which has Q6_K or wider as in every file that llama-quantize writes; where its K types do not fit, because
256 does not divide the inputs, the type that it falls back to (SmolLM2, Gemma 3). ik_llama.cpp gets the same files and
interleaves their rows as it loads them. --shape tiny only shows that everything runs.

qwen3-30b-a3b-8 is eight layers of that model, up to int4, with routers that use all experts about equally. In the last
layer both sides compute the experts for the last token of a prompt only.

The limit is the speed of reading as many bytes as a token reads, 256 MiB at most, again and again: a small model may
stay in part in the last-level cache, and so does what it is compared with.

Correctness first: products of the last layer and of the head against the definition, a prompt at once against token by
token. Then, in every round, everything takes turns in bursts: the stream of memory and our decoding at each width,
two widths in turn, a plan, the peers' decoding, prefills of all. A burst is as many stretches of 2 tokens after 16,
or prompts of 128, as fill its time. One counts as undisturbed if its process had its cores for at least 97 % of it;
medians are over those if there are three (matquant.engine.bench), and ratios are medians of those of each round. Both
sides read the same random tokens, compute the logits of the last one and choose nothing. Ratios of samples that were
mostly disturbed show little: look at "undisturbed" first. On a busy machine --cpu-time compares by the processor time
of one thread; then the shares of a step's parts and the time to the first token are left out.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

from environments import make_environment
from linear import WIDTHS, check_products
from matquant import _native
from matquant.core.nest import KERNEL_GRIDS, UNIFORM
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.engine.bench import LINEARS, STREAM_BYTES, Sample, median, sample_of, timed
from matquant.engine.engine import Engine
from matquant.engine.model import HEAD, NORM
from matquant.engine.session import Session
from matquant.format.read import open_checkpoint
from matquant.format.write import Item, write_checkpoint
from matquant.hf.architecture import EMBEDDING, read_architecture
from matquant.hf.experts import router_path
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "decode.jsonl"
PICTURE = ROOT / "docs" / "roofline.png"
CACHE = Path(os.environ.get("MATQUANT_PEERS", ROOT / ".peers")).resolve()
WORKER = ROOT / "bench" / "peers" / "decode_llamacpp.py"
# key in records -> packages of its environment; the first is built from its sources, the second's wheel has AVX2
PEER_PACKAGES = {
    "peer": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"),
    "ik": ("ik-llama-cpp-python==0.1.5", "gguf==0.19.0", "numpy"),
}
CMAKE = ("GGML_NATIVE=ON", "LLAVA_BUILD=OFF", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF")

HEADS = ("num_attention_heads", "num_key_value_heads")
LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    **{"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False},
    "dtype": "bfloat16",
}
SIZES = (*("hidden_size", "intermediate_size", "num_hidden_layers"), *HEADS, "head_dim", "vocab_size")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA,
    "qwen3-0.6b": LLAMA | dict(zip(SIZES, (1024, 3072, 28, 16, 8, 128, 151936), strict=True)),
    "gemma-3-1b": LLAMA | dict(zip(SIZES, (1152, 6912, 26, 4, 1, 256, 262144), strict=True)),
    "smollm2-135m": LLAMA | dict(zip(SIZES, (576, 1536, 30, 9, 3, 64, 49152), strict=True)),
    "qwen3-30b-a3b-8": QWEN3_MOE | {"num_hidden_layers": 8},
    "tiny": LLAMA | dict(zip(SIZES, (256, 512, 2, 4, 2, 64, 512), strict=True)),
}
MAX_BITS = {"qwen3-30b-a3b-8": 4}  # int8 and llama.cpp's Q8_0 would need too much memory
HEAD_BITS = 6  # the least of the head, as the recipes have it
CHECKED = 8  # matrices, the last ones: those of the last layer of a Llama, and the head

PEERS = {8: "Q8_0", 6: "Q6_K", 4: "Q4_K", 3: "Q3_K", 2: "Q2_K"}
CONTEXT, STRETCH, PROMPT = 16, 2, 128  # tokens; a short stretch is more often undisturbed
MIX, MIX_MEAN = (2, 6), 4  # layers in turn
LOADS = 3
PARTS = ("linears", "outside", "wait")  # of a step

# What whole tokens are to reach: a fraction of the streaming limit, factors over our int8 and over llama.cpp.
LIMIT_TARGET = 0.85
STEP_TARGETS = {2: 2.7}
DECODE_TARGETS = {8: 1.3, 6: 1.5, 4: 1.5, 3: 2.0, 2: 2.0}
PREFILL_TARGET = 1.5
SHAPE_TARGETS: dict[str, dict[str, dict[int, float]]] = {  # instead of these, by key and width
    "smollm2-135m": {"fraction": dict.fromkeys(WIDTHS, 0.8)},
    "qwen3-30b-a3b-8": {
        "fraction": dict.fromkeys(WIDTHS, 0.8),
        "over_peer": {4: 1.4, 2: 2.0},
        "prefill_over_peer": dict.fromkeys(WIDTHS, 1.3),
    },
}
SAME = 0.98  # a speed ratio from which on nothing is to be seen of the difference
LOAD_TARGET_S = 3.0
FIRST_TOKEN = """
import sys
from matquant import Engine
directory, threads, kind, bits = sys.argv[1:]
engine = Engine(directory, threads=int(threads), check_hashes=kind == "checked", max_bits=int(bits))
engine.session(16).extend([1], engine.widths())
"""

Record = dict[str, Any]
Samples = dict[str, list[list[Sample]]]  # by kind, of each round
app = typer.Typer(add_completion=False)


@app.command()
def setup() -> None:
    """Make the environments of llama-cpp-python, built from its sources, and of ik-llama-cpp-python."""
    flags = {"CMAKE_ARGS": " ".join(f"-D{flag}" for flag in CMAKE)}
    for key, packages in PEER_PACKAGES.items():
        folder = environment(key)
        if not (folder / "ready").is_file():
            pip = ("--no-binary", "llama-cpp-python") if key == "peer" else ()
            make_environment(folder, packages, pip=pip, environ=flags)
            (folder / "ready").touch()


def environment(key: str) -> Path:
    """Return the folder of a peer's environment."""
    return CACHE / PEER_PACKAGES[key][0].split("=")[0]


@app.command()
def run(
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; 1 and 2 by default.")] = None,
    group: Annotated[
        list[int] | None, typer.Option(help="Group sizes, 0 for one group per row; 64 by default, as in recipes.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    rounds: Annotated[int, typer.Option(help="Bursts of each kind.")] = 7,
    burst_s: Annotated[float, typer.Option(help="Seconds of a burst.")] = 1.0,
    keep: Annotated[bool, typer.Option(help="Append to bench/decode.jsonl.")] = True,
    peer: Annotated[bool, typer.Option(help="Measure llama.cpp and ik_llama.cpp as well.")] = True,
    grid: Annotated[str, typer.Option(help=f"One of {', '.join(KERNEL_GRIDS)}.")] = UNIFORM,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; 0: no prompt is timed.")] = PROMPT,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Compare by processor time.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="One of this shape, instead of random weights.")] = None,
) -> None:
    """Measure and print."""
    if shape not in SHAPES:
        raise SystemExit(f"--shape {shape}: give one of {', '.join(SHAPES)}")
    if cpu_time and threads != [1]:
        raise SystemExit("--cpu-time is the processor time of one thread; add --threads 1")
    folder = CACHE / "decode" / shape
    folder.mkdir(parents=True, exist_ok=True)
    served = tuple(bits for bits in WIDTHS if bits <= MAX_BITS.get(shape, max(WIDTHS)))
    with ExitStack() as running:
        keys = PEER_PACKAGES if peer else ()
        others = [running.enter_context(LlamaCpp(key, folder, SHAPES[shape], served)) for key in keys]
        for group_size in group or (64,):
            directory = checkpoint or folder / f"{grid}-{group_size}"
            if not directory.exists():
                write_random(directory, SHAPES[shape], group_size or None, grid=grid)
            for count in threads or (1, 2):
                asked: Record = {"threads": count, "rounds": rounds, "burst_s": burst_s}
                asked |= {"prompt": prompt, "cpu_time": cpu_time}
                record = {**asked, **measure(directory, others, served, **asked)}
                versions = {name: number for other in others for name, number in other.versions.items()}
                made = {**origin(), "matquant": version("matquant"), "versions": versions}
                name = {"checkpoint": checkpoint.name} if checkpoint else {}
                record = {"shape": shape, "group": group_size, "grid": grid, **name, **record, **made}
                show(record)
                line = json.dumps(record, sort_keys=True)
                if keep:
                    append_record(RECORDS, line)
                print(line, flush=True)


# ------------------------------------------------------------------------------------------------------- the models


def write_random(
    directory: Path,
    shape: Record,
    group_size: int | None,
    *,
    grid: str = UNIFORM,
    files: Mapping[str, bytes] | None = None,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, values: values,
) -> None:
    """A nested checkpoint of ``shape`` with random codes, written a matrix at a time; an untied embedding is bf16.

    files: further files by name, such as a tokenizer. change: of the name and the values of an embedding or a router,
    returns those to write.
    """
    generator = np.random.default_rng(0)
    architecture = read_architecture(shape, where=directory)
    hidden = architecture.hidden

    def nested(rows: int, columns: int) -> NestedTensor:
        codes = np.frombuffer(generator.bytes(rows * columns), np.uint8).reshape(rows, columns)
        deviation = generator.uniform(0.5, 1.5, (rows, columns // (group_size or columns))) / columns**0.5
        scale = (deviation / 74).astype(ml_dtypes.bfloat16).astype(np.float32)  # 74: of uniform codes
        return NestedTensor(codes=codes, scale=scale, zero=np.full_like(scale, 128), rule="prefix", grid=grid)

    def plain(path: str, rows: int, columns: int) -> Item:
        name, values = f"{path}.weight", generator.standard_normal((rows, columns), np.float32)
        if path != EMBEDDING:  # logits of a router of about 1: larger ones leave most experts without a weight
            values /= columns**0.5
        return name, change(name, values).astype(ml_dtypes.bfloat16)

    def ones(count: int) -> np.ndarray:
        return np.ones(count, ml_dtypes.bfloat16)

    def items() -> Iterator[Item]:
        if architecture.tied:
            yield EMBEDDING, nested(architecture.vocab, hidden)
        else:
            yield plain(EMBEDDING, architecture.vocab, hidden)
        for layer in range(architecture.layers):
            experts = architecture.experts_at(layer)
            router = None if experts is None else router_path(experts, layer)
            for name, size in architecture.matrices(layer):
                path = f"model.layers.{layer}.{name}"
                yield plain(path, *size) if path == router else (path, nested(*size))
            for place, name in architecture.family.norms.items():
                count = architecture.head_dim if place in ("query", "key") else hidden
                yield f"model.layers.{layer}.{name}.weight", ones(count)
        yield f"{NORM}.weight", ones(hidden)
        if not architecture.tied:
            yield HEAD, nested(architecture.vocab, hidden)

    tied = architecture.tied
    scope, head_bits = ("all", HEAD_BITS) if tied else ("linears", None)
    spec = Spec(rule="prefix", widths=WIDTHS, group_size=group_size, scope=scope, grid=grid, head_bits=head_bits)
    write_checkpoint(directory, items(), spec=spec, config=shape, ignore=(HEAD,) if tied else (), files=files or {})


class LlamaCpp:
    """The worker in the environment of ``key``, with a model of each of the widths ``served`` loaded."""

    def __init__(self, key: str, folder: Path, shape: Record, served: Sequence[int]) -> None:
        self.key = key
        python = environment(key) / "venv" / "bin" / "python"
        if not python.is_file():
            raise SystemExit(f"{python} is missing; first: python bench/decode.py setup")
        (folder / "shape.json").write_text(json.dumps(shape))
        self._log = (folder / f"{key}.log").open("w")
        command: list[str | Path] = [python, WORKER, folder, *(PEERS[bits] for bits in served)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        ready = self._answer()
        self.versions: dict[str, str] = ready["versions"]
        self.mb_per_token: dict[str, float] = ready["mb_per_token"]

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def burst(self, bits: int, work: str, *, tokens: int, threads: int, seconds: float) -> list[Sample]:
        """Samples of tokens/s of the type of ``bits`` bits; work: decode or prefill."""
        request = {"type": PEERS[bits], "work": work, "tokens": tokens, "context": CONTEXT}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "threads": threads, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return [sample_of(tokens, wall, cpu, threads) for wall, cpu in self._answer()]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's worker ended; see {self._log.name}")
        return json.loads(line)


# -------------------------------------------------------------------------------------------------------- measuring


def measure(
    directory: Path,
    peers: Sequence[LlamaCpp],
    served: Sequence[int],
    *,
    threads: int,
    rounds: int,
    burst_s: float,
    prompt: int,
    cpu_time: bool,
) -> Record:
    """The record of an engine at the widths ``served``, and of the peers that take part, with ``threads`` threads."""
    loads = () if cpu_time else ("checked", "unchecked")
    load_s = {kind: first_token_s(directory, threads, kind, max(served)) for kind in loads}
    engine = Engine(directory, threads=threads, check_hashes=False, max_bits=max(served))
    session = engine.session(CONTEXT + max(prompt, STRETCH))
    check(engine, session, served)
    schedules = {str(bits): [engine.widths(bits)] * STRETCH for bits in served}
    schedules["switch"] = [engine.widths(min(served)), engine.widths(max(served))]
    if max(MIX) <= max(served):
        schedules["mix"] = [mixed(engine)] * STRETCH
    sizes = {name: min(STREAM_BYTES, engine.model.bytes_per_token(steps[0])) for name, steps in schedules.items()}
    of_size = {size: _native.Stream(size) for size in set(sizes.values())}
    streams = {name: of_size[size] for name, size in sizes.items()}
    samples: Samples = {}

    def note(name: str, burst: list[Sample]) -> None:
        samples.setdefault(name, []).append(burst)

    def prefills(tokens: int, seconds: float) -> None:
        for bits in served:
            note(f"prefill {bits}", burst(partial(prefill, session, engine.widths(bits), tokens), seconds))
            for peer in peers:
                answer = peer.burst(bits, "prefill", tokens=tokens, threads=threads, seconds=seconds)
                note(f"{peer.key} prefill {bits}", answer)

    def decodes(seconds: float) -> None:
        for name, schedule in schedules.items():
            read = partial(streams[name].read, threads)
            note(f"stream {name}", burst(partial(timed, read, streams[name].bytes, threads), seconds / 5))
            for kind, values in decode_burst(session, schedule, seconds).items():
                note(f"{kind} {name}", values)
            for peer in peers if name.isdigit() else ():
                answer = peer.burst(int(name), "decode", tokens=STRETCH, threads=threads, seconds=seconds)
                note(f"{peer.key} decode {name}", answer)

    prefills(CONTEXT, 0.0)  # both touch everything once
    decodes(0.0)
    samples.clear()
    for _ in range(rounds):
        if prompt:
            prefills(prompt, burst_s)
        decodes(burst_s)
    return {"load_s": load_s, **summary(engine, peers, served, by_processor_time(samples) if cpu_time else samples)}


def by_processor_time(samples: Samples) -> Samples:
    """The same per second of processor time, which nothing disturbs; without the parts, which the wall clock timed."""
    return {
        name: [
            [dataclasses.replace(sample, value=sample.per_cpu_s, undisturbed=True) for sample in burst]
            for burst in bursts
        ]
        for name, bursts in samples.items()
        if name.split()[0] not in PARTS
    }


def summary(engine: Engine, peers: Sequence[LlamaCpp], served: Sequence[int], samples: Samples) -> Record:
    """Medians as rates, and medians over rounds of ratios: the memory's speed may differ from round to round."""
    every = {name: [sample for burst in bursts for sample in burst] for name, bursts in samples.items()}
    rate = {name: median(values) for name, values in every.items()}
    by_round = {name: [median(burst) for burst in bursts] for name, bursts in samples.items()}

    def ratio(over: str, *under: str) -> float:
        """Of the rates; several of ``under`` take turns."""
        means = map(statistics.harmonic_mean, zip(*(by_round[name] for name in under), strict=True))
        return float(statistics.median(value / mean for value, mean in zip(by_round[over], means, strict=True)))

    rows: dict[str, Record] = {}
    for bits in served:
        read = engine.model.bytes_per_token(engine.widths(bits))
        rows[str(bits)] = {
            "mb_per_token": read / 1e6,
            "tok_s": rate[f"decode {bits}"],
            "fraction": ratio(f"decode {bits}", f"stream {bits}") * read,
        }
        if 8 in served:
            rows[str(bits)]["over_int8"] = ratio(f"decode {bits}", "decode 8")
        if f"linears {bits}" in rate:
            rows[str(bits)] |= {
                "linear_fraction": ratio(f"linears {bits}", f"stream {bits}") * read,
                "outside": rate[f"outside {bits}"],
                "wait": rate[f"wait {bits}"],
            }
        if f"prefill {bits}" in rate:
            rows[str(bits)]["prefill_tok_s"] = rate[f"prefill {bits}"]
        for peer in peers:
            key, theirs = peer.key, f"{peer.key} prefill {bits}"
            rows[str(bits)] |= {
                key: PEERS[bits],
                f"{key}_mb_per_token": peer.mb_per_token[PEERS[bits]],
                f"{key}_tok_s": rate[f"{key} decode {bits}"],
                f"over_{key}": ratio(f"decode {bits}", f"{key} decode {bits}"),
            }
            if theirs in rate:
                rows[str(bits)] |= {
                    f"{key}_prefill_tok_s": rate[theirs],
                    f"prefill_over_{key}": ratio(f"prefill {bits}", theirs),
                }
    streams = [sample for name, values in every.items() if name.startswith("stream") for sample in values]
    timed_samples = [sample for name, values in every.items() if not name.startswith("stream") for sample in values]
    mixes: Record = {}
    if "decode mix" in rate:
        mixes["mix"] = ratio("decode mix", f"decode {MIX_MEAN}")
        mixes["mix_of_parts"] = ratio("decode mix", *(f"decode {bits}" for bits in MIX))
    return {
        "stream_gb_s": median(streams) / 1e9,
        "stream_gb_s_by_round": [value / 1e9 for value in by_round[f"stream {MIX_MEAN}"]],
        "isa": _native.isa(),
        "undisturbed": statistics.fmean(sample.undisturbed for sample in timed_samples),
        "samples": len(timed_samples),
        "undisturbed_by_kind": {
            "stream": statistics.fmean(sample.undisturbed for sample in streams),
            **{name: statistics.fmean(s.undisturbed for s in values) for name, values in every.items()},
        },
        "switch": ratio("decode switch", f"decode {min(served)}", f"decode {max(served)}"),
        **mixes,
        "widths": rows,
    }


def check(engine: Engine, session: Session, served: Sequence[int] = WIDTHS) -> None:
    """SystemExit unless the last matrices multiply, and steps add up, as they should at every width ``served``."""
    checkpoint = open_checkpoint(engine.path, check_hashes=False)
    for path in list(engine.model.weights)[-CHECKED:]:
        tensor = checkpoint.nested(path, mapped=True)
        check_products(tensor, engine.model.weights[path], threads=engine.threads, widths=served)
    prompt = list(range(1, 9))
    seen: list[np.ndarray] = []
    for bits in served:
        widths = engine.widths(bits)
        session.rewind(0)
        at_once = session.extend(prompt, widths).copy()
        session.rewind(0)
        one_by_one = [session.extend([token], widths) for token in prompt][-1]
        if not (np.isfinite(at_once).all() and (at_once == one_by_one).all()):
            raise SystemExit(f"int{bits}: a prompt at once and token by token differ, or are not finite")
        if any((at_once == other).all() for other in seen):
            raise SystemExit(f"int{bits} gives the logits of another width")
        seen.append(at_once)


def mixed(engine: Engine) -> np.ndarray:
    """The widths of MIX by layers in turn; the head as at MIX_MEAN."""
    architecture, head = engine.model.architecture, list(engine.model.weights)[-1]
    plan = {
        path: MIX[layer % len(MIX)]
        for layer in range(architecture.layers)
        for path in (f"model.layers.{layer}.{name}" for name, _ in architecture.matrices(layer))
        if path in engine.model.weights
    }
    return engine.widths(plan={**plan, head: max(MIX_MEAN, HEAD_BITS) if architecture.tied else MIX_MEAN})


def burst(stretch: Callable[[], Sample], seconds: float) -> list[Sample]:
    """Samples until ``seconds`` are over, one at least."""
    stop = time.perf_counter() + seconds
    samples = [stretch()]
    while time.perf_counter() < stop:
        samples.append(stretch())
    return samples


def decode_burst(session: Session, schedule: Sequence[np.ndarray], seconds: float) -> dict[str, list[Sample]]:
    """Return samples of decoding after the first CONTEXT tokens of the cache, by name.

    decode, linears: tokens/s of steps, and of their linear layers alone, waits for other threads included. outside,
    wait: shares of a step's time, outside the linear layers, and waiting (counted with the layers).
    """
    parts_of: dict[str, list[Sample]] = {name: [] for name in PARTS}
    tokens = random_tokens(session, len(schedule))

    def steps() -> None:
        session.rewind(CONTEXT)
        for token, widths in zip(tokens, schedule, strict=True):
            session.extend([token], widths)

    def stretch() -> Sample:
        session.workspace.profile = True  # a clock per part of the step, now at zero; costs microseconds
        sample = timed(steps, len(schedule), session.engine.threads)
        parts = session.workspace.seconds()
        total, linears = len(schedule) / sample.value, sum(parts[name] for name in LINEARS)
        values = {"linears": len(schedule) / linears, "outside": 1 - linears / total, "wait": parts["wait"] / total}
        for name, value in values.items():
            parts_of[name].append(dataclasses.replace(sample, value=value))
        return sample

    return {"decode": burst(stretch, seconds), **parts_of}


def prefill(session: Session, widths: np.ndarray, tokens: int) -> Sample:
    """Tokens/s of a prompt of ``tokens`` tokens, which it leaves in the cache."""
    session.rewind(0)
    prompt = random_tokens(session, tokens)
    return timed(lambda: session.extend(prompt, widths), tokens, session.engine.threads)


def random_tokens(session: Session, count: int) -> list[int]:
    """Ids that the worker of llama.cpp draws too; different ones, since equal tokens use the same experts."""
    vocab = session.engine.model.architecture.vocab
    return [int(token) for token in np.random.default_rng(0).integers(vocab, size=count)]


def first_token_s(directory: Path, threads: int, kind: str, max_bits: int) -> float:
    """Seconds from a process's start to its first token at ``max_bits``, hashes "checked" or not; median of LOADS."""
    for file in directory.iterdir():  # into the page cache
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    command: list[str | Path] = [sys.executable, "-c", FIRST_TOKEN, directory, str(threads), kind, str(max_bits)]
    seconds = []
    for _ in range(LOADS):
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# -------------------------------------------------------------------------------------------------------- reporting

# column -> (key of a width's row, format, targets by width)
COLUMNS: dict[str, tuple[str, str, dict[int, float]]] = {
    "tokens/s": ("tok_s", ".1f", {}),
    "of the limit": ("fraction", ".2f", dict.fromkeys(WIDTHS, LIMIT_TARGET)),
    "layers of the limit": ("linear_fraction", ".2f", {}),
    "outside layers": ("outside", ".1%", {}),
    "over int8": ("over_int8", ".2f", STEP_TARGETS),
    "llama.cpp": ("peer_tok_s", ".1f", {}),
    "over it": ("over_peer", ".2f", DECODE_TARGETS),
    "ik_llama.cpp": ("ik_tok_s", ".1f", {}),
    "over this": ("over_ik", ".2f", {}),
    "prompt tokens/s": ("prefill_tok_s", ".0f", {}),
    "llama.cpp's": ("peer_prefill_tok_s", ".0f", {}),
    "over them": ("prefill_over_peer", ".2f", dict.fromkeys(WIDTHS, PREFILL_TARGET)),
    "ik_llama.cpp's": ("ik_prefill_tok_s", ".0f", {}),
    "over these": ("prefill_over_ik", ".2f", {}),
}


def show(record: Record) -> None:
    """A table of one record; what has a target is shown with it, green or red."""
    grouping = f"group {record['group']}" if record["group"] else "per channel"
    title = f"{record['shape']}, {record.get('grid', UNIFORM)}, {grouping}, {record['threads']} threads"
    table = Table(title=title, title_justify="left")
    for name in ("width", *COLUMNS):
        table.add_column(name, justify="right")
    for width, measured in record["widths"].items():
        cells = []
        for key, form, targets in COLUMNS.values():
            wanted = SHAPE_TARGETS.get(record["shape"], {}).get(key, targets)
            cells.append(_cell(measured[key], form, wanted.get(int(width))) if key in measured else "")
        table.add_row(f"int{width}, {measured.get('peer', 'alone')}", *cells)
    console = Console(width=200)
    console.print(table)
    few, *_, many = record["widths"]
    console.print(f"int{few} and int{many} in turn: {_cell(record['switch'], '.3f', SAME)} of the speed of both alone")
    if "mix" in record:
        console.print(
            f"layers of int{MIX[0]} and int{MIX[1]} in turn: {_cell(record['mix_of_parts'], '.3f', SAME)} of the speed "
            f"of both alone, {_cell(record['mix'], '.3f', SAME)} of that of int{MIX_MEAN}"
        )
    if record["load_s"]:
        checked, unchecked = record["load_s"]["checked"], record["load_s"]["unchecked"]
        colour = "green" if checked < LOAD_TARGET_S else "red"
        console.print(
            f"process start to first token: [{colour}]{checked:.2f}[/] s (under {LOAD_TARGET_S:g}), "
            f"{unchecked:.2f} s without checking hashes"
        )
    stream = record["undisturbed_by_kind"]["stream"]
    console.print(f"streaming limit {record['stream_gb_s']:.1f} GB/s ({stream:.0%} of its samples undisturbed)")
    console.print(
        f"{record['undisturbed']:.0%} of {record['samples']} other samples undisturbed; "
        f"{record['isa']}; {record['date']}, {record['commit']}"
    )


def _cell(value: float, form: str, target: float | None) -> str:
    if target is None:
        return f"{value:{form}}"
    return f"[{'green' if value >= target else 'red'}]{value:{form}}[/] ({target:g})"


@app.command()
def report() -> None:
    """Print the newest record of every shape, group size and thread count."""
    for record in _newest().values():
        show(record)


def _newest() -> dict[tuple[str, int, int], Record]:
    if not RECORDS.is_file():
        raise SystemExit(f"{RECORDS} is missing; first: python bench/decode.py run")
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return {(record["shape"], record["group"], record["threads"]): record for record in records}


@app.command()
def plot(shape: Annotated[str, typer.Option(help="Whose records.")] = "llama-3.2-1b") -> None:
    """Draw tokens/s against bytes per token, a panel per thread count, under the limit of its first record."""
    mine = {key[1:]: record for key, record in _newest().items() if key[0] == shape}
    counts = sorted({threads for _, threads in mine})
    figure, panels = plt.subplots(1, len(counts), figsize=(5.5 * len(counts), 4.5), squeeze=False, layout="constrained")
    for axes, threads in zip(panels[0], counts, strict=True):
        records = {group: record for (group, count), record in sorted(mine.items()) if count == threads}
        first = next(iter(records.values()))
        for group, record in records.items():
            label = f"matquant, groups of {group}" if group else "matquant, per channel"
            _curve(axes, record, "", "o-" if record is first else "s:", label, named=record is first)
        keys = [key for key in ("mb_per_token", "peer_mb_per_token") if key in first["widths"]["8"]]
        if len(keys) > 1:
            _curve(axes, first, "peer_", "^--", "llama.cpp", named=True)
        reach = np.array([row[key] for row in first["widths"].values() for key in keys])
        line = np.linspace(reach.min() * 0.9, reach.max() * 1.1, 100)
        limit = first["stream_gb_s"]
        axes.plot(line, limit * 1e3 / line, color="black", label=f"streaming limit, {limit:.0f} GB/s")
        axes.set(xscale="log", yscale="log", xlabel="MB of weights per token", ylabel="tokens/s")
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.savefig(PICTURE, dpi=130)
    print(PICTURE)


def _curve(axes: Any, record: Record, prefix: str, style: str, label: str, *, named: bool) -> None:
    rows = record["widths"]
    x, y = ([row[f"{prefix}{key}"] for row in rows.values()] for key in ("mb_per_token", "tok_s"))
    axes.plot(x, y, style, label=label)
    if not named:
        return
    for width, at in zip(rows, zip(x, y, strict=True), strict=True):
        text = rows[width]["peer"] if prefix else f"int{width}"
        axes.annotate(text, at, xytext=(-5, -4), textcoords="offset points", ha="right", va="top", fontsize="small")


if __name__ == "__main__":
    app()
