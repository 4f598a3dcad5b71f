"""Worker: llama.cpp in its own environment. ``python decode_llamacpp.py FOLDER`` reads FOLDER/shape.json.

Writes a GGUF per block type into FOLDER if it is not there, "pure": every matrix in that type, or in the one that
llama-quantize falls back to where blocks of 256 do not fit, random blocks with one small scale, so that all weights are
finite. Then it loads them all and serves bursts: a request per line of stdin,

    {"type": "Q4_K", "threads": 2, "work": "decode" or "prefill", "tokens": 2, "context": 16, "seconds": 1}

an answer per line of stdout: [[wall seconds, CPU seconds], ...], a pair per stretch of ``tokens`` tokens, until
``seconds`` are over (one stretch at least). Decoding begins after the first ``context`` tokens of the last prefill.
The first line is {"versions", "mb_per_token"}, the bytes of all matrices but the embedding.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from llama_gguf import finish_gguf, start_gguf  # type: ignore[import-not-found]

# block type -> where its blocks have float16 scales (bytes); everything else in a block may be any byte
SCALES = {"Q8_0": (0,), "Q6_K": (208,), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_0": (0,), "Q5_0": (0,)}
FALLBACKS = {"Q6_K": "Q8_0", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}  # tensor_type_fallback of llama.cpp
KINDS = ("Q8_0", *FALLBACKS)
SCALE = 2.0**-14
CONTEXT = 256
TOKEN = 1


def main(folder: Path) -> None:
    """Write what is missing, load everything, answer until stdin ends."""
    shape = json.loads((folder / "shape.json").read_text())
    for kind in KINDS:
        if not (folder / f"{kind}.gguf").is_file():
            partial = folder / f"{kind}.partial"
            _write_gguf(partial, kind, shape)
            partial.rename(folder / f"{kind}.gguf")
    llama_cpp.llama_backend_init()
    models = {kind: _load(folder / f"{kind}.gguf") for kind in KINDS}
    read = {kind: sum(_bytes(kind, *size) for size in _matrices(shape).values()) / 1e6 for kind in KINDS}
    names = ("llama-cpp-python", "gguf")
    _answer({"versions": {name: version(name) for name in names}, "mb_per_token": read})
    for line in sys.stdin:
        request = json.loads(line)
        _answer(_burst(models[request["type"]], request, shape["vocab_size"]))


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _matrices(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Every matrix that a token reads, by GGUF name: rows and columns."""
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    attended = shape["num_attention_heads"] * shape["head_dim"]
    shared = shape["num_key_value_heads"] * shape["head_dim"]
    sizes = {
        **{"attn_q": (attended, hidden), "attn_k": (shared, hidden), "attn_v": (shared, hidden)},
        **{"attn_output": (hidden, attended), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)},
        "ffn_down": (hidden, ffn),
    }
    layers = range(shape["num_hidden_layers"])
    return {f"blk.{layer}.{name}": size for layer in layers for name, size in sizes.items()} | {
        "output": (shape["vocab_size"], hidden)
    }


def _fitting(kind: str, columns: int) -> str:
    """The type of a matrix: ``kind`` if its blocks divide a row."""
    weights, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if columns % weights == 0 else FALLBACKS[kind]


def _bytes(kind: str, rows: int, columns: int) -> int:
    weights, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_fitting(kind, columns)]]
    return int(rows * columns // weights * stored)


def _write_gguf(file: Path, kind: str, shape: dict[str, Any]) -> None:
    writer = start_gguf(file, shape)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    quantised = {"token_embd": (shape["vocab_size"], shape["hidden_size"]), **_matrices(shape)}
    for name, size in quantised.items():
        fitting = _fitting(kind, size[1])
        blocks = _random_blocks(generator, fitting, *size)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[fitting])
    norms = [f"blk.{layer}.{name}" for layer in range(shape["num_hidden_layers"]) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(shape["hidden_size"], np.float32))
    finish_gguf(writer)


def _random_blocks(generator: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of a row]."""
    _, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    values = np.frombuffer(generator.bytes(_bytes(kind, rows, columns)), np.uint8).reshape(-1, stored).copy()
    for at in SCALES[kind]:
        values[:, at : at + 2] = np.array([SCALE], np.float16).view(np.uint8)
    return values.reshape(rows, -1)


def _load(file: Path) -> Any:
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    context = llama_cpp.llama_init_from_model(model, parameters) if model else None
    if not context:
        raise SystemExit(f"llama.cpp does not load {file}; remove it to have it written again")
    return context


def _burst(context: Any, request: dict[str, Any], vocab: int) -> list[tuple[float, float]]:
    llama_cpp.llama_set_n_threads(context, request["threads"], request["threads"])
    stop = time.perf_counter() + request["seconds"]
    samples: list[tuple[float, float]] = []
    while not samples or time.perf_counter() < stop:
        wall, cpu = time.perf_counter(), time.process_time()
        if request["work"] == "prefill":
            _run(context, keep=0, steps=1, tokens=request["tokens"])
        else:
            _run(context, keep=request["context"], steps=request["tokens"], tokens=1)
        samples.append((time.perf_counter() - wall, time.process_time() - cpu))
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    if not np.isfinite(np.ctypeslib.as_array(logits, (vocab,))).all():
        raise SystemExit(f"llama.cpp's logits of {request['type']} are not finite: these timings mean nothing")
    return samples


def _run(context: Any, *, keep: int, steps: int, tokens: int) -> None:
    """Forget all but ``keep`` tokens, then ``steps`` batches of ``tokens``, each until its last logits are there."""
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), -1, keep, -1)
    ids = (llama_cpp.llama_token * tokens)(*[TOKEN] * tokens)
    for _ in range(steps):
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, tokens))
        if code != 0:
            raise SystemExit(f"llama_decode gave {code}")
        llama_cpp.llama_synchronize(context)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
