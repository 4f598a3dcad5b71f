"""What experiments/peers.py compares: models with their texts, tools with their packages and settings."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environments import TORCH
from origin import ROOT

DATA = Path(os.environ.get("MATQUANT_DATA", ROOT.parent / "shared" / "data"))
REFERENCE = ROOT / "examples" / "reference"
SMOLLM2 = Path(os.environ.get("MATQUANT_SMOLLM2", ROOT / "out" / "smollm2" / "model"))
CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its texts."""

    model: Path
    train: Path | None  # calibration text; None: the text that comes with matquant
    valid: Path  # evaluation text
    dropped: int = 0  # its first documents, not used
    windows: int  # evaluated
    context: int = CONTEXT  # tokens of a window evaluated
    jobs: str = ""  # the model whose calibration text, and so whose quantised weights, serve here too; "": its own
    nested: Path | None = None  # where ``make smollm2`` keeps a checkpoint of each recipe


MODELS = {
    "reference": Case(
        model=REFERENCE / "model",
        train=REFERENCE / "text" / "train.txt",
        valid=REFERENCE / "text" / "valid.txt",
        windows=80,
    ),
    "stories260K": Case(
        model=DATA / "models" / "stories260K",
        train=DATA / "text" / "tinystories-train.txt",
        valid=DATA / "text" / "tinystories-valid.txt",
        dropped=1,  # cut at its beginning
        windows=117,
    ),
    "smollm2": Case(
        model=SMOLLM2,
        train=None,
        valid=DATA / "text" / "wikitext2-test.raw.txt",
        windows=8,
        context=1024,
        nested=SMOLLM2.parent,
    ),
}
MODELS["smollm2-c4"] = replace(MODELS["smollm2"], valid=DATA / "text" / "c4-sample.txt", jobs="smollm2")

# name -> what pip installs; the first is the tool
PACKAGES: dict[str, tuple[str, ...]] = {
    "gptqmodel": ("gptqmodel==7.6.0", TORCH),
    "autoround": ("auto-round==0.16.1", TORCH),
    "hqq": ("hqq==0.2.8.post1", "transformers==5.23.0", TORCH),
    "llamacpp": ("gguf==0.19.0", "numpy", "safetensors"),
}
LLAMACPP = "llama-cpp-python==0.3.36"  # its source archive on PyPI carries llama.cpp's
CMAKE = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON"),
    *("-DGGML_OPENMP=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF"),
    *("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"),
)
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2"}  # its default on two cores is one, with which it does not start

AUTOROUND = {"iters": 200, "group_size": 128, "sym": True}
# peer -> rows of (setting, options, nominal bits)
SETTINGS: dict[str, tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...]] = {
    "float": (("float32", {}, (32,)),),
    "rtn": (
        ("asymmetric, per channel", {"group_size": None}, (2, 3, 4, 8)),
        ("asymmetric, g128", {"group_size": 128}, (2, 3, 4, 8)),
    ),
    "hqq": (
        ("g64, axis 1", {"group_size": 64, "axis": 1}, (2, 3, 4, 8)),
        ("g64, axis 0", {"group_size": 64, "axis": 0}, (2, 3, 4, 8)),
        ("g128, axis 1", {"group_size": 128, "axis": 1}, (2, 3, 4, 8)),
        ("per channel", {"group_size": None, "axis": 1}, (2, 3, 4, 8)),
    ),
    "llamacpp": (
        ("Q2_K, imatrix", {"type": "Q2_K"}, (2,)),
        ("Q2_K pure, imatrix", {"type": "Q2_K", "pure": True}, (2,)),
        ("IQ2_XXS, imatrix", {"type": "IQ2_XXS"}, (2,)),
        ("IQ2_XS, imatrix", {"type": "IQ2_XS"}, (2,)),
        ("IQ2_S, imatrix", {"type": "IQ2_S"}, (2,)),
        ("IQ2_M, imatrix", {"type": "IQ2_M"}, (2,)),
        ("IQ3_XXS, imatrix", {"type": "IQ3_XXS"}, (3,)),
        ("Q3_K_M, imatrix", {"type": "Q3_K_M"}, (3,)),
        ("Q3_K pure, imatrix", {"type": "Q3_K_S", "pure": True}, (3,)),
        ("IQ4_XS, imatrix", {"type": "IQ4_XS"}, (4,)),
        ("Q4_K_M, imatrix", {"type": "Q4_K_M"}, (4,)),
        ("Q4_K pure, imatrix", {"type": "Q4_K_S", "pure": True}, (4,)),
        ("Q6_K, imatrix", {"type": "Q6_K"}, (6,)),
        ("Q8_0, imatrix", {"type": "Q8_0"}, (8,)),
    ),
    "gptqmodel": (
        ("g128, sym, defaults", {"group_size": 128, "sym": True}, (2, 3, 4, 8)),
        # Its default act_group_aware does not support one group per row.
        ("per channel, sym", {"group_size": -1, "sym": True, "act_group_aware": False}, (2, 3, 4)),
        ("g128, asym, gptq_v2", {"group_size": 128, "sym": False, "format": "gptq_v2"}, (2, 3, 4, 8)),
        ("g64, asym, gptq_v2", {"group_size": 64, "sym": False, "format": "gptq_v2"}, (2, 3, 4, 8)),
        (
            "g64, asym, gptq_v2, float32",
            {"group_size": 64, "sym": False, "format": "gptq_v2", "dtype": "float32"},
            (2, 3, 4, 8),
        ),
    ),
    "matquant": (
        ("balanced", {"recipe": "balanced"}, (2, 3, 4, 5, 6, 8)),
        # as many bits as IQ4_XS, Q3_K_M and Q4_K_M take of smollm2, and 0.1 more than the last
        ("balanced, plan of 4.43 bits", {"recipe": "balanced", "budget": 4.43}, (4,)),
        ("balanced, plan of 4.63 bits", {"recipe": "balanced", "budget": 4.63}, (4,)),
        ("balanced, plan of 5.53 bits", {"recipe": "balanced", "budget": 5.53}, (5,)),
        ("balanced, plan of 5.63 bits", {"recipe": "balanced", "budget": 5.63}, (5,)),
        ("best", {"recipe": "best"}, (2, 3, 4, 5, 6, 8)),
        ("best, plan of 4.63 bits", {"recipe": "best", "budget": 4.63}, (4,)),
        ("best, plan of 5.53 bits", {"recipe": "best", "budget": 5.53}, (5,)),
    ),
    "autoround": (
        ("iters 200, g128, sym", AUTOROUND, (2, 3, 4, 8)),
        ("iters 200, per channel, sym", {**AUTOROUND, "group_size": -1}, (2, 3, 4, 8)),
        ("light: iters 50, g64, sym", {"iters": 50, "lr": 0.005, "group_size": 64, "sym": True}, (2, 3, 4)),
        # What its documentation recommends for two bits: auto-round-best with enable_alg_ext.
        ("best: iters 1000, alg_ext, g128, sym", {**AUTOROUND, "iters": 1000, "enable_alg_ext": True}, (2,)),
    ),
}
