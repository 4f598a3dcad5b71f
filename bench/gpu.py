"""One card in one run: kernels, decoding, vLLM, training and a real model, correctness first.

    python bench/gpu.py [--seconds 470] [--model SMOLLM2 --text heldout.txt]
    python bench/gpu.py --smoke          tiny shapes on the CPU: shows that everything runs, and nothing else

Prints a JSON line for every row, with the card's name, and appends them to bench/gpu.jsonl. Parts that fail,
and what no time is left for, are rows too. Nothing is timed if a product is wrong.

Kernels: a weight [rows, columns] is held often enough to be larger than the cache, and every product is one replay of a
CUDA graph over all copies. Candidates take turns in every round and medians count. Our graphs are captured once and
their width is switched in the device's memory. ``share`` is the bandwidth of the bytes that a width reads, over that of
copying memory in the same run.

Decoding: the shape of Llama-3.1-8B with random codes, loaded by matquant.load; one token is one replay of a graph of
the whole model with a static cache. The bf16 model has dense weights of the same checkpoint.
"""

import functools
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import StaticCache

import matquant
from decode import SHAPES as DECODE_SHAPES
from decode import write_random
from matquant.backends.gpu import linear
from matquant.backends.gpu_layout import INPUTS, Resident, load_resident, read
from matquant.core.tensor import NestedTensor
from matquant.measure.run import evaluate_checkpoint
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "gpu.jsonl"
WIDTHS = (8, 6, 4, 3, 2)
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))  # rows, columns
TOKENS = (1, 4, 8, 16, 64, 256)
GROUP = 128
CACHE_BYTES = 256 * 2**20  # copies of a weight take more than this: several times the largest second-level cache
ROUNDS = 7
LLAMA_8B = DECODE_SHAPES["llama-3.2-1b"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
}

Row = dict[str, Any]
Product = Callable[[], Any]


class Run:
    """The time that is left, and where rows go."""

    def __init__(self, *, seconds: float, smoke: bool, keep: bool) -> None:
        self.smoke, self.keep = smoke, keep
        self.device = torch.device("cpu" if smoke else "cuda")
        self.stop = time.perf_counter() + seconds
        self.card = "none (smoke)" if smoke else torch.cuda.get_device_name()

    @property
    def left_s(self) -> float:
        return self.stop - time.perf_counter()

    def row(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, "card": self.card, **values})
        print(line, flush=True)
        if self.keep:
            append_record(RECORDS, line)


def random_weight(rows: int, columns: int, *, seed: int = 0) -> NestedTensor:
    """Random codes with groups of GROUP, a per-width scale and zero-point at 2 bits."""
    random = np.random.default_rng(seed)
    shape = (rows, columns // GROUP)
    scale, zero = np.full(shape, 2.0**-10, np.float32), np.full(shape, 128, np.float32)
    own = (scale * 64, np.full(shape, 1.5, np.float32))
    codes = random.integers(0, 256, (rows, columns), np.uint8)
    return NestedTensor(codes=codes, scale=scale, zero=zero, rule="prefix", slices={2: own})


def check(run: Run) -> None:
    """Raise AssertionError unless products are those of the slice and of no neighbouring width, with both activations.

    Integer inputs with a 127 in each 128 make int8 activations exact: these sums must be equal, bit for bit.
    """
    nested = random_weight(192, 512)
    weight = load_resident(nested, device=run.device)
    for tokens in (1, 9) if run.smoke else (1, 2, 5, 8, 16, 33, 300):
        x = torch.randint(-127, 128, (tokens, 512), generator=torch.manual_seed(tokens)).float()
        x[:, ::128] = 127
        for bits in range(1, 9):
            weight.bits.fill_(bits)
            expected, other = (x.double() @ torch.from_numpy(nested.read(b)).double().T for b in (bits, bits - 1 or 2))
            exact = linear(x.to(run.device), weight, activations="int8").double().cpu()
            if tokens <= 256:
                assert torch.equal(exact, expected), f"int8 activations, {tokens} tokens, {bits} bits"
            close = linear(x.to(run.device, torch.bfloat16), weight).double().cpu()
            gap, away = (close - expected).norm() / expected.norm(), (close - other).norm() / expected.norm()
            assert gap < 2.0**-7, f"bf16, {tokens} tokens, {bits} bits: {gap:.2g}"
            assert bits > 5 or away > 2 * gap, f"bf16, {tokens} tokens: int{bits} passes as its neighbour"
    run.row("check", tokens="1 to 300", widths="1 to 8", result="exact")


def copy_bandwidth(run: Run) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**20 if run.smoke else 2**30, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    (seconds,) = interleaved(run, {"copy": lambda: target.copy_(source)}).values()
    return 2 * source.numel() / seconds


def interleaved(run: Run, candidates: Mapping[str, Product]) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, each as a replay of a graph on a GPU."""
    replays = {name: captured(run, product) for name, product in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(1 if run.smoke else ROUNDS):
        for name, replay in replays.items():
            samples[name].append(timed(run, replay))
    return {name: statistics.median(found) for name, found in samples.items()}


def captured(run: Run, product: Product) -> Product:
    """Return the replay of a CUDA graph of ``product``, which has run before, or itself on a CPU."""
    if run.smoke:
        return product
    cuda: Any = torch.cuda  # without types
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product()  # compiles
        product()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    return graph.replay


def timed(run: Run, replay: Product) -> float:
    """Seconds of a call, by events on a GPU."""
    if run.smoke:
        began = time.perf_counter()
        replay()
        return time.perf_counter() - began
    cuda: Any = torch.cuda
    before, after = (cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    replay()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


# Kernels --------------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> None:
    """Products of each shape and number of tokens: ours at every width, bf16, and other libraries where they import."""
    bandwidth = copy_bandwidth(run)
    run.row("copy", gb_s=bandwidth / 1e9)
    for rows, columns in ((128, 256),) if run.smoke else SHAPES:
        nested = random_weight(rows, columns)
        copies = 2 if run.smoke else -(-CACHE_BYTES // (rows * columns // 4))
        weights = [load_resident(nested, device=run.device) for _ in range(copies)]
        # bf16 weights are eight times as large as int2: fewer of them are more than the cache.
        dense = [read(weights[0]).to(torch.bfloat16).clone() for _ in range(max(2, copies // 8))]
        others = [] if run.smoke else other_products(nested, run)
        for tokens in (1, 2) if run.smoke else TOKENS:
            if run.left_s < 60:
                run.row("skipped", what=f"kernels {rows} x {columns}, {tokens} tokens", reason="no time is left")
                continue
            x = torch.randn(tokens, columns, device=run.device).to(torch.bfloat16)
            measure_products(run, weights, dense, others, x, bandwidth)


def measure_products(
    run: Run,
    weights: Sequence[Resident],
    dense: Sequence[torch.Tensor],
    others: Sequence[tuple[str, int, Callable[[torch.Tensor], Any]]],
    x: torch.Tensor,
    bandwidth: float,
) -> None:
    """Print a row for every engine, width and kind of activations; ``share`` counts the bytes of planes and scales."""
    ours = {
        activations: captured(run, functools.partial(each, weights, x, activations))
        for activations in ("float", "int8")
    }
    products = {"bf16": captured(run, lambda: [torch.nn.functional.linear(x, weight) for weight in dense])}
    products |= {f"{name} int{bits}": captured(run, functools.partial(call, x)) for name, bits, call in others}
    samples: dict[str, list[float]] = {}
    for _ in range(1 if run.smoke else ROUNDS):
        for name, replay in products.items():
            count = len(dense) if name == "bf16" else 1
            samples.setdefault(name, []).append(timed(run, replay) / count)
        for bits in WIDTHS:
            for weight in weights:
                weight.bits.fill_(bits)
            for activations, replay in ours.items():
                name = f"matquant int{bits}, {activations}"
                samples.setdefault(name, []).append(timed(run, replay) / len(weights))
    reference = statistics.median(samples["bf16"])
    for name, found in samples.items():
        seconds = statistics.median(found)
        shape = {"rows": weights[0].rows, "columns": weights[0].columns, "tokens": len(x)}
        read_bytes = bytes_read(weights[0], name)
        share = {} if read_bytes is None else {"share": read_bytes / seconds / bandwidth}
        run.row("kernel", engine=name, **shape, us=seconds * 1e6, over_bf16=reference / seconds, **share)


def each(weights: Sequence[Resident], x: torch.Tensor, activations: str) -> list[torch.Tensor]:
    return [linear(x, weight, activations=activations) for weight in weights]


def bytes_read(weight: Resident, name: str) -> float | None:
    """Bytes that a product reads of the weight at the width in ``name``; None for other libraries."""
    values = weight.rows * weight.columns
    if name == "bf16":
        return 2 * values
    if not name.startswith("matquant"):
        return None
    bits = int(name.split("int")[1][0])
    return values * bits / 8 + weight.affine[0].numel() * weight.affine.element_size()


def other_products(nested: NestedTensor, run: Run) -> list[tuple[str, int, Callable[[torch.Tensor], Any]]]:
    """Return the products of other libraries that work here; a row says why one does not."""
    found = []
    for name, products in {"gemlite": gemlite_products, "humming": humming_products}.items():
        try:
            found += list(products(nested, run))
        except Exception as error:  # any type: other people's kernels on a card of any kind
            run.row("skipped", what=name, reason=f"{type(error).__name__}: {error}")
    return found


def gemlite_products(nested: NestedTensor, run: Run) -> Iterator[tuple[str, int, Callable[[torch.Tensor], Any]]]:
    """Yield gemlite's products of 8, 4 and 2 bits, made for one width each."""
    if importlib.util.find_spec("gemlite") is None:
        run.row("skipped", what="gemlite", reason="not installed")
        return
    from gemlite.core import DType, GemLiteLinear

    rows, columns = nested.codes.shape
    for bits in (8, 4, 2):
        layer = GemLiteLinear(
            bits, group_size=GROUP, in_features=columns, out_features=rows,
            input_dtype=DType.BF16, output_dtype=DType.BF16,
        )  # fmt: skip
        codes = torch.from_numpy(nested.codes >> (8 - bits)).to(run.device)
        scale, zero = (
            torch.from_numpy(part).to(run.device, torch.bfloat16).view(-1, 1) for part in nested.affine(bits)
        )
        layer.pack(codes, scale, zero, bias=None)
        yield "gemlite", bits, layer


def humming_products(nested: NestedTensor, run: Run) -> Iterator[tuple[str, int, Callable[[torch.Tensor], Any]]]:
    """Yield Humming's products, each made for one width."""
    if importlib.util.find_spec("humming") is None:
        run.row("skipped", what="humming", reason="not installed")
        return
    from humming.layer import HummingLayer

    rows, columns = nested.codes.shape
    for bits in WIDTHS:
        layer = HummingLayer(
            shape_n=rows, shape_k=columns, weight_config={"dtype": f"uint{bits}", "group_size": GROUP},
            torch_dtype=torch.bfloat16,
        ).to(run.device)  # fmt: skip
        layer.load_from_unquantized(torch.from_numpy(nested.read(bits)).to(run.device, torch.bfloat16))
        layer.transform()
        yield "humming", bits, layer


# Decoding -------------------------------------------------------------------------------------------------------------


def decoding(run: Run) -> None:
    """Tokens per second of a random model of the shape of Llama-3.1-8B, at every width and in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        shape = TINY if run.smoke else LLAMA_8B
        write_random(directory, shape, 64 if run.smoke else GROUP)
        kernels = "planes" if run.smoke else "float"
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": run.device, "check_hashes": False}
        rates: dict[str, list[float]] = {}
        dense = one_token(run, matquant.load(directory, kernels="none", **options))
        model = matquant.load(directory, kernels=kernels, **options)
        ours = one_token(run, model)
        for _ in range(1 if run.smoke else 3):
            rates.setdefault("bf16", []).append(rate(run, dense))
            for bits in WIDTHS:
                model.set_bits(bits)
                rates.setdefault(f"int{bits}", []).append(rate(run, ours))
        for name, found in rates.items():
            tok_s = statistics.median(found)
            over = tok_s / statistics.median(rates["bf16"])
            run.row("decode", through="matquant.load", width=name, tok_s=tok_s, over_bf16=over)
        del dense, model, ours
        through_vllm(run, directory)


def one_token(run: Run, model: Any) -> Product:
    """Return the replay of a whole model's step for one token, with a static cache of 256 tokens."""
    cache = StaticCache(config=model.config, max_cache_len=256)
    ids = torch.tensor([[5]], device=run.device)
    position = torch.tensor([64], device=run.device)

    @torch.no_grad()
    def step() -> Any:
        return model(input_ids=ids, position_ids=position[None], cache_position=position, past_key_values=cache)

    return captured(run, step)


def rate(run: Run, replay: Product) -> float:
    count = 1 if run.smoke else 64
    seconds = timed(run, lambda: [replay() for _ in range(count)])
    return count / seconds


VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
directory, bits = sys.argv[1], int(sys.argv[2])
config = {"quantization_config": {"quant_method": "matquant", "bits": bits}}
model = LLM(directory, hf_overrides=config, max_model_len=512, skip_tokenizer_init=True, gpu_memory_utilization=0.5)
sampling = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True, detokenize=False)
prompt = [{"prompt_token_ids": list(range(5, 21))}]
model.generate(prompt, sampling, use_tqdm=False)
began = time.perf_counter()
model.generate(prompt, sampling, use_tqdm=False)
print(json.dumps(256 / (time.perf_counter() - began)))
"""


def through_vllm(run: Run, directory: Path) -> None:
    """Tokens per second through vLLM's plugin, one process for each width while time is left."""
    if run.smoke or importlib.util.find_spec("vllm") is None:
        run.row("skipped", what="vllm", reason="smoke" if run.smoke else "not installed")
        return
    for bits in (4, 2, 8, 3, 6):
        found = started(run, "vllm", [sys.executable, "-c", VLLM, str(directory), str(bits)], least_s=60)
        if found is not None:
            run.row("decode", through="vllm", width=f"int{bits}", tok_s=float(found))


# Training and a real model --------------------------------------------------------------------------------------------


def training(run: Run) -> None:
    """A joint step against a fine-tuning step: bench/train.py on the card."""
    command = [sys.executable, str(ROOT / "bench" / "train.py"), "--device", run.device.type, "--rounds", "2"]
    found = None if run.smoke else started(run, "training", command, least_s=45)
    if found is not None:
        run.row("training", **json.loads(found))


def real_model(run: Run, model: Path | None, text: Path | None) -> None:
    """SmolLM2-135M with --recipe best, from start to end."""
    if model is None:
        run.row("skipped", what="recipe best", reason="no --model was given")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "matquant", "quantize", str(model), "-o", f"{folder}/best", "--recipe", "best"]
        began = time.perf_counter()
        if started(run, "recipe best", [*command, "--device", run.device.type], least_s=60) is None:
            return
        run.row("recipe", recipe="best", seconds=time.perf_counter() - began)
        if text is not None:
            found = evaluate_checkpoint(Path(folder) / "best", bits=WIDTHS, text=[text], device=run.device.type)
            run.row("recipe", recipe="best", log_perplexity=found["log_perplexity"])


def started(run: Run, what: str, command: Sequence[str], *, least_s: float) -> str | None:
    """Run a command while time is left; return its last line, or None after a row that says why there is none."""
    if run.left_s < least_s:
        run.row("skipped", what=what, reason="no time is left")
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=run.left_s, cwd=ROOT / "bench")
    except subprocess.TimeoutExpired:
        run.row("skipped", what=what, reason="it took longer than the time that was left")
        return None
    if done.returncode != 0:
        run.row("skipped", what=what, reason=done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"])
        return None
    return (done.stdout.strip().splitlines() or [""])[-1]


def main(
    seconds: Annotated[float, typer.Option(help="Stop starting things after this time.")] = 470,
    model: Annotated[Path | None, typer.Option(help="A float SmolLM2-135M for --recipe best.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text for its log-perplexity.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny shapes on the CPU.")] = False,
    keep: Annotated[bool, typer.Option(help="Append rows to bench/gpu.jsonl.")] = True,
) -> None:
    """Measure everything on one card."""
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is available; run with --smoke to check the script on a CPU")
    run = Run(seconds=math.inf if smoke else seconds, smoke=smoke, keep=keep and not smoke)
    torch.manual_seed(0)
    run.row("origin", **origin("torch", "transformers"), inputs=INPUTS)
    check(run)
    last: Callable[[Run], None] = functools.partial(real_model, model=model, text=text)
    parts: dict[str, Callable[[Run], None]] = {"kernels": kernels, "decoding": decoding, "training": training}
    for name, part in {**parts, "recipe": last}.items():
        try:
            part(run)
        except Exception as error:  # any type: the parts after it are still worth their time
            if run.smoke:
                raise
            run.row("failed", what=name, reason=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    typer.run(main)
