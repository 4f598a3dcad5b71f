"""Worker: llama.cpp's own quantiser. ``python quantize_llamacpp.py SOURCE TARGET TYPE THREADS``; one line of JSON.

Every matrix becomes TYPE, as with llama-quantize --pure, but for the embedding, which keeps its own.
"""

import ctypes
import json
import resource
import sys
import time
from importlib.metadata import version

import gguf
import llama_cpp  # type: ignore[import-not-found]

FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "Q4_K": "MOSTLY_Q4_K_S", "Q2_K": "MOSTLY_Q2_K"}


def main(source: str, target: str, kind: str, threads: str) -> None:
    """Quantise and tell the seconds it took, of the clock and of the processors."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = gguf.LlamaFileType[FILE_TYPES[kind]]
    parameters.nthread, parameters.pure = int(threads), True
    parameters.token_embedding_type = gguf.GGMLQuantizationType.BF16
    llama_cpp.llama_backend_init()
    began = time.perf_counter()
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    if code != 0:
        raise SystemExit(f"llama_model_quantize gave {code}")
    versions = {name: version(name) for name in ("llama-cpp-python", "gguf")}
    print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
