"""Worker: llama.cpp on the CPU, through llama-cpp-python. ``python llamacpp_worker.py FOLDER``.

A job may also have "texts": {export: [text, ...]}; their token ids come back as "ids".
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from safetensors.numpy import save_file


def main(folder: Path) -> None:
    """Load every file with llama.cpp's own loader; its tensors with gguf's reader, under the names in the file."""
    job = json.loads((folder / "job.json").read_text())
    windows = np.load(job["windows"])
    result = {}
    for name, file in job["exports"].items():
        save_file(weights(Path(file)), folder / f"{name}.safetensors")
        texts = job.get("texts", {}).get(name, [])
        result[name] = measure(file, job["prompt"], job["new_tokens"], windows, texts)
    (folder / "result.json").write_text(json.dumps(result))


def weights(file: Path) -> dict[str, np.ndarray]:
    """All tensors, float32."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
    return found


def measure(file: str, prompt: list[int], new_tokens: int, windows: np.ndarray, texts: list[str]) -> dict[str, Any]:
    """The greedy continuation, the mean loss over windows, and the ids of texts."""
    context = max(windows.shape[1], len(prompt) + new_tokens)
    model = llama_cpp.Llama(file, n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1)

    def logits(tokens: list[int]) -> np.ndarray:
        model.reset()
        model.eval(tokens)
        return np.asarray(model.scores[: len(tokens)], dtype=np.float64)

    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(logits(tokens)[-1].argmax()))
    losses = []
    for window in windows.tolist():
        rows = logits(window[:-1])
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses += (-rows[np.arange(len(rows)), window[1:]]).tolist()
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    return {"tokens": tokens[len(prompt) :], "log_perplexity": sum(losses) / len(losses), "ids": ids}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
