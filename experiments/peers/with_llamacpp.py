"""Worker: llama.cpp in a separate environment. ``python with_llamacpp.py FOLDER`` reads FOLDER/job.json.

Writes the model as a float32 GGUF, gives llama-imatrix the calibration sequences, calls llama-quantize and reads the
tensors back with gguf's own dequantisation. options: type (llama-quantize's name) and pure (one type throughout).

llama-imatrix takes text, not tokens. So that it sees exactly the windows of the others, the GGUF's vocabulary has one
character for each token, ``chr(FIRST + token)``, and the text is those characters. Llama's query and key rows are
interleaved as llama.cpp wants them.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_gguf import finish_gguf, start_gguf  # type: ignore[import-not-found]
from safetensors.numpy import load_file, save_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FIRST = 0x10000  # beyond every surrogate and every space
FLOATS = ("F32", "F16", "BF16")


def main(folder: Path) -> None:
    """Convert, measure importance, quantise, read back."""
    job = json.loads((folder / "job.json").read_text())
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    source, importance, target = (folder / name for name in ("f32.gguf", "imatrix.gguf", "quantised.gguf"))
    _write_gguf(source, load_file(job["weights"]), config)
    tools, threads = Path(job["tools"]), str(job["threads"])
    measured = _importance(importance, source, np.load(job["calibration"]), Path(job["calibration"]), tools, threads)
    began = time.perf_counter()
    # The embedding and a tied or separate head stay float: only the decoder's layers are compared.
    float_types = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
    pure = ["--pure"] if job["options"].get("pure") else []
    arguments = [*pure, "--imatrix", importance, *float_types, source, target, job["options"]["type"], threads]
    subprocess.run([tools / "llama-quantize", *map(str, arguments)], check=True)
    seconds = measured + time.perf_counter() - began
    weights, result = _read_back(target, list(job["shapes"]), config)
    save_file(weights, folder / "weights.safetensors")
    (folder / "result.json").write_text(json.dumps({**result, "seconds": seconds}))


def _importance(file: Path, source: Path, ids_SL: np.ndarray, calibration: Path, tools: Path, threads: str) -> float:
    """Put the importance matrix of the model ``source`` at ``file``; return the seconds that measuring it took.

    It is the same for all settings, so it is measured once and kept beside the calibration sequences.
    """
    kept, took = (calibration.with_suffix(suffix) for suffix in (".imatrix.gguf", ".imatrix.json"))
    if not took.is_file():
        (file.parent / "text.txt").write_text("".join(chr(FIRST + token) for token in ids_SL.ravel()), encoding="utf-8")
        began = time.perf_counter()
        context = ["-c", str(ids_SL.shape[1]), "-b", str(ids_SL.shape[1]), "-t", threads]
        files = ["-m", str(source), "-f", str(file.parent / "text.txt"), "-o", str(kept)]
        subprocess.run([tools / "llama-imatrix", *files, *context], check=True)
        took.write_text(json.dumps(time.perf_counter() - began))
    shutil.copyfile(kept, file)
    return float(json.loads(took.read_text()))


def _gguf_name(path: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}" if layer else OUTSIDE[path]


def _heads(path: str, config: dict[str, Any]) -> int | None:
    """How many heads the rows of ``path`` are interleaved in; None: they are not."""
    if path.endswith("q_proj"):
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if path.endswith("k_proj") else None


def _write_gguf(file: Path, state: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    writer = start_gguf(file, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(FIRST + token) for token in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    for name, tensor in state.items():
        path = name.removesuffix(".weight")
        if path == "lm_head" and config["tie_word_embeddings"]:
            continue
        heads = _heads(path, config)
        if heads is not None:
            halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        writer.add_tensor(f"{_gguf_name(path)}.weight", tensor.astype(np.float32))
    finish_gguf(writer)


def _read_back(file: Path, paths: list[str], config: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float32 weights, the bytes of their blocks and how many tensors have which type."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights, stored, types = {}, {"blocks": 0, "float": 0}, Counter[str]()
    for path in paths:
        tensor = tensors[f"{_gguf_name(path)}.weight"]
        kind = tensor.tensor_type.name
        types[kind] += 1
        stored["float" if kind in FLOATS else "blocks"] += int(tensor.n_bytes)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight_NK = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        heads = _heads(path, config)
        if heads is not None:
            weight_NK = weight_NK.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        weights[path] = np.ascontiguousarray(weight_NK)
    return weights, {"bytes": stored, "types": types}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
