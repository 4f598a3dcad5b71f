"""Worker: llama.cpp or ik_llama.cpp, whichever its environment has. ``python decode_llamacpp.py FOLDER TYPE...`` reads
FOLDER/shape.json. ik_llama.cpp repacks blocks as it loads them, four or eight rows interleaved (--run-time-repack).

Writes a GGUF per block type into FOLDER if it is not there: every matrix in that type, or in the one llama-quantize
falls back to where blocks of 256 do not fit, and the head at Q6_K or wider, as llama-quantize keeps it. The blocks are
random, with one small scale, so that all weights are finite, and about as many above zero as below: tokens then differ
enough to use different experts. Routers are float32, as llama.cpp keeps them. Then it loads them all and serves bursts:
a request per line of stdin,

    {"type": "Q4_K", "threads": 2, "work": "decode" or "prefill", "tokens": 2, "context": 16, "seconds": 1}

an answer per line of stdout: [[wall seconds, CPU seconds], ...], a pair per stretch of ``tokens`` tokens, until
``seconds`` are over (one stretch at least). Decoding begins after the first ``context`` tokens of the last prefill.
The first line is {"versions", "mb_per_token"}, the bytes of all matrices but the embedding, and of the experts in use.
"""

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_gguf import finish_gguf, start_gguf  # type: ignore[import-not-found]

try:
    from ik_llama_cpp import _ctypes_api as llama_cpp  # type: ignore[import-not-found]

    FORK = True
except ModuleNotFoundError:
    import llama_cpp  # type: ignore[import-not-found]

    FORK = False

# block type -> where its blocks have float16 scales (bytes); everything else in a block may be any byte
SCALES = {"Q8_0": (0,), "Q6_K": (208,), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_0": (0,), "Q5_0": (0,)}
MINIMUM = {"Q4_K": 7.5, "Q2_K": 1.5}  # second scale over the first, for a mean of zero: half the largest code
FALLBACKS = {"Q6_K": "Q8_0", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}  # tensor_type_fallback of llama.cpp
HEAD, HEAD_TYPE = "output", "Q6_K"  # or wider (llama_tensor_get_type)
EXPERTS = "_exps"  # in the names of tensors that hold all experts of a layer
SCALE = 2.0**-14
CONTEXT = 256


def main(folder: Path, kinds: list[str]) -> None:
    """Write what is missing, load everything, answer until stdin ends."""
    shape = json.loads((folder / "shape.json").read_text())
    for kind in kinds:
        if not _file(folder, kind).is_file():
            partial = folder / f"{kind}.partial"
            _write_gguf(partial, kind, shape)
            partial.rename(_file(folder, kind))
    llama_cpp.llama_backend_init()
    models = {kind: _load(_file(folder, kind)) for kind in kinds}
    read = {kind: _read_bytes(kind, shape) / 1e6 for kind in kinds}
    names = ("ik-llama-cpp-python" if FORK else "llama-cpp-python", "gguf")
    _answer({"versions": {name: version(name) for name in names}, "mb_per_token": read})
    for line in sys.stdin:
        request = json.loads(line)
        _answer(_burst(models[request["type"]], request, shape["vocab_size"]))


def _file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}-head-{_type_of(HEAD, kind)}.gguf"


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _matrices(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of quantised matrices but the embedding, by GGUF name: [rows, columns] or [experts, ...]."""
    hidden, ffn, suffix = shape["hidden_size"], shape["intermediate_size"], ""
    experts: tuple[int, ...] = ()
    if "num_experts" in shape:
        ffn, suffix, experts = shape["moe_intermediate_size"], EXPERTS, (shape["num_experts"],)
    attended = shape["num_attention_heads"] * shape["head_dim"]
    shared = shape["num_key_value_heads"] * shape["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        **{"attn_q": (attended, hidden), "attn_k": (shared, hidden), "attn_v": (shared, hidden)},
        "attn_output": (hidden, attended),
        **{f"{name}{suffix}": (*experts, ffn, hidden) for name in ("ffn_gate", "ffn_up")},
        f"ffn_down{suffix}": (*experts, hidden, ffn),
    }
    layers = range(shape["num_hidden_layers"])
    return {f"blk.{layer}.{name}": size for layer in layers for name, size in sizes.items()} | {
        HEAD: (shape["vocab_size"], hidden)
    }


def _floats(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the float32 tensors: norms, and routers [experts, hidden]."""
    hidden, experts = shape["hidden_size"], shape.get("num_experts")
    for layer in range(shape["num_hidden_layers"]):
        yield from ((f"blk.{layer}.{name}", (hidden,)) for name in ("attn_norm", "ffn_norm"))
        if experts:
            yield from ((f"blk.{layer}.{name}", (shape["head_dim"],)) for name in ("attn_q_norm", "attn_k_norm"))
            yield f"blk.{layer}.ffn_gate_inp", (experts, hidden)
    yield "output_norm", (hidden,)


def _read_bytes(kind: str, shape: dict[str, int]) -> float:
    """Bytes of matrices that a token reads."""
    used = shape["num_experts_per_tok"] / shape["num_experts"] if "num_experts" in shape else 0.0
    sizes = {name: _bytes(_type_of(name, kind), *size) for name, size in _matrices(shape).items()}
    quantised = (size * (used if EXPERTS in name else 1) for name, size in sizes.items())
    return sum(quantised) + sum(4 * math.prod(size) for _, size in _floats(shape) if len(size) > 1)


def _type_of(name: str, kind: str) -> str:
    return HEAD_TYPE if name == HEAD and kind != "Q8_0" else kind


def _fitting(kind: str, columns: int) -> str:
    """The type of a matrix: ``kind`` if its blocks divide a row."""
    weights, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if columns % weights == 0 else FALLBACKS[kind]


def _bytes(kind: str, *size: int) -> int:
    weights, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_fitting(kind, size[-1])]]
    return int(math.prod(size) // weights * stored)


def _write_gguf(file: Path, kind: str, shape: dict[str, Any]) -> None:
    writer = start_gguf(file, shape)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    quantised = {"token_embd": (shape["vocab_size"], shape["hidden_size"]), **_matrices(shape)}
    for name, size in quantised.items():
        fitting = _fitting(_type_of(name, kind), size[-1])
        blocks = _random_blocks(generator, fitting, *size)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[fitting])
    for name, size in _floats(shape):
        values = np.ones(size, np.float32)
        if len(size) > 1:  # a router; logits of about 1
            values = generator.standard_normal(size, np.float32) / np.float32(size[-1] ** 0.5)
        writer.add_tensor(f"{name}.weight", values)
    finish_gguf(writer)


def _random_blocks(generator: np.random.Generator, kind: str, *size: int) -> np.ndarray:
    """uint8 [..., rows, bytes of a row]."""
    _, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    values = np.frombuffer(bytearray(generator.bytes(_bytes(kind, *size))), np.uint8).reshape(-1, stored)
    for at, factor in zip(SCALES[kind], (1.0, MINIMUM.get(kind, 1.0)), strict=False):
        values[:, at : at + 2] = np.array([SCALE * factor], np.float16).view(np.uint8)
    return values.reshape(*size[:-1], -1)


def _load(file: Path) -> Any:
    loading = llama_cpp.llama_model_default_params()
    if FORK:  # pages of a mapped file may be reclaimed, and are small
        loading.use_mmap, loading.repack_tensors = False, True
    else:
        loading.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), loading)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    context = llama_cpp.llama_init_from_model(model, parameters) if model else None
    if not context:
        raise SystemExit(f"llama.cpp does not load {file}; remove it to have it written again")
    return _bound(context) if FORK else context


def _bound(context: int) -> Any:
    """The context for functions of ik_llama.cpp that its package does not declare."""
    library, place, count = llama_cpp._lib, ctypes.c_void_p, ctypes.c_int32
    library.llama_set_n_threads.argtypes = [place, ctypes.c_uint32, ctypes.c_uint32]
    library.llama_synchronize.argtypes = [place]
    library.llama_kv_cache_seq_rm.argtypes = [place, count, count, count]
    library.llama_batch_get_one.argtypes = [llama_cpp.llama_token_p, count, count, count]
    library.llama_batch_get_one.restype = llama_cpp.llama_batch
    return place(context)


def _burst(context: Any, request: dict[str, Any], vocab: int) -> list[tuple[float, float]]:
    _library().llama_set_n_threads(context, request["threads"], request["threads"])
    ids = np.random.default_rng(0).integers(vocab, size=request["tokens"]).tolist()
    stop = time.perf_counter() + request["seconds"]
    samples: list[tuple[float, float]] = []
    while not samples or time.perf_counter() < stop:
        wall, cpu = time.perf_counter(), time.process_time()
        if request["work"] == "prefill":
            _run(context, keep=0, batches=[ids])
        else:
            _run(context, keep=request["context"], batches=[[token] for token in ids])
        samples.append((time.perf_counter() - wall, time.process_time() - cpu))
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    if not np.isfinite(np.ctypeslib.as_array(logits, (vocab,))).all():
        raise SystemExit(f"llama.cpp's logits of {request['type']} are not finite: these timings mean nothing")
    return samples


def _run(context: Any, *, keep: int, batches: list[list[int]]) -> None:
    """Forget all but ``keep`` tokens, then run batches of token ids, each until its last logits are there."""
    library = _library()
    if FORK:
        library.llama_kv_cache_seq_rm(context, -1, keep, -1)
    else:
        library.llama_memory_seq_rm(library.llama_get_memory(context), -1, keep, -1)
    for batch in batches:
        ids = (llama_cpp.llama_token * len(batch))(*batch)
        place = (keep, 0) if FORK else ()
        code = llama_cpp.llama_decode(context, library.llama_batch_get_one(ids, len(batch), *place))
        if code != 0:
            raise SystemExit(f"llama_decode gave {code}")
        library.llama_synchronize(context)
        keep += len(batch)


def _library() -> Any:
    return llama_cpp._lib if FORK else llama_cpp


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
