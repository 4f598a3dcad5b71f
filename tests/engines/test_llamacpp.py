"""Every slice in llama.cpp: the weights it loads are ours bit for bit, its perplexity is ours to 1 %, its tokens too.

llama.cpp quantises activations to 8 bits, and the embedding's products to the embedding's dtype, so its text may leave
ours; how far both go together is kept.
"""

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

import matquant
from conftest import SMALL, make_tokenizer
from engines.conftest import CACHE, HERE, NEW_TOKENS, WIDTHS, Run, Subject
from environments import make_environment
from gguf_files import assert_holds_the_slices
from matquant.core.spec import Plan
from matquant.export.containers import EXACT, MIDRANGE
from matquant.system.errors import InputError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]
ODD = "The cats' 2024 déjà-vu: it's 3.14159…  don't\n\n  I'LL say   so — 你好! <0x41> ﬁ\t🙂\n"
CLOSE = 0.01  # of a perplexity
LARGE = {**SMALL, "hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 4}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LARGE, rope_parameters=LLAMA3, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**LARGE, sliding_window=48),
    "qwen2": lambda: transformers.Qwen2Config(**LARGE, rope_parameters=YARN),
    "qwen3": lambda: transformers.Qwen3Config(**LARGE, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(**LARGE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
}


def check(subject: Subject, names: tuple[str, ...], run: Run, folder: Path, keep: Callable[..., None]) -> None:
    """Export, load, and compare weights, log-perplexity and greedy text with our own slice."""
    made, zero_point = {}, dict.fromkeys(names, EXACT)
    for name in names:
        try:
            made[name] = subject.export(name, folder / f"{name}.gguf", to="gguf")
        except InputError:
            zero_point[name] = MIDRANGE
            made[name] = subject.export(name, folder / f"{name}.gguf", to="gguf", zero_point=MIDRANGE)
    found = run("llamacpp", subject, {name: folder / f"{name}.gguf" for name in names})
    for name, result in found.items():
        assert_holds_the_slices(folder / f"{name}.gguf", subject.directory, subject.bits(name), zero_point[name])
        dense = folder / f"dense-{name}"
        subject.export(name, dense, to="dense", zero_point=zero_point[name], dtype="float32")
        ours = subject.ours(dense, torch.float32)
        together = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(result["tokens"], ours["tokens"], strict=True)
        )
        keep(
            format="gguf", model=subject.name, slice=name, zero_point=zero_point[name],
            containers=made[name]["containers"],
            bits_per_weight=made[name]["bits_per_weight"], log_perplexity=result["log_perplexity"],
            ours=ours["log_perplexity"], same_tokens=len(list(together)), of=NEW_TOKENS,
        )  # fmt: skip
        assert abs(math.expm1(result["log_perplexity"] - ours["log_perplexity"])) < CLOSE, name


def test_every_slice_of_a_real_model(subject: Subject, run: Run, keep: Callable[..., None], tmp_path: Path) -> None:
    check(subject, (*WIDTHS, "plan"), run, tmp_path, keep)


def test_zeros_between_integers_are_refused_where_minima_are_missing(subject: Subject, tmp_path: Path) -> None:
    for name in ("6", "7"):
        with pytest.raises(
            InputError, match=r"is not a multiple of 1/2.*--zero-point midrange, which moves the slice's zero-points"
        ):
            subject.export(name, tmp_path / "out.gguf", to="gguf")


def test_llama_cpp_cuts_text_as_tokenizers_does(subject: Subject, tmp_path: Path) -> None:
    subject.export("4", tmp_path / "model.gguf", to="gguf")
    tokenizer = Tokenizer.from_file(str(subject.directory / "tokenizer.json"))
    texts = [ODD, *(tokenizer.decode(window.tolist()) for window in subject.windows)]
    np.save(tmp_path / "windows.npy", subject.windows[:1])
    job = {"exports": {"4": str(tmp_path / "model.gguf")}, "windows": str(tmp_path / "windows.npy")}
    (tmp_path / "job.json").write_text(json.dumps({**job, "prompt": [1], "new_tokens": 0, "texts": {"4": texts}}))
    python = make_environment(CACHE / "llamacpp", (HERE / "llamacpp.txt").read_text().split())
    subprocess.run([python, HERE / "llamacpp_worker.py", tmp_path], check=True)
    found = json.loads((tmp_path / "result.json").read_text())["4"]["ids"]
    assert found == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, run: Run, keep: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    matquant.quantize(tmp_path / "float", tmp_path / "in", method="rtn", scope="linears")
    subject = Subject(
        name=family,
        directory=tmp_path / "in",
        plan=Plan(default=4, bits={"model.layers.0.mlp.up_proj": 2}),
        prompt=[5, 6, 7],
        windows=np.random.default_rng(0).integers(0, 256, (4, 41)),
    )
    check(subject, ("8", "4", "plan"), run, tmp_path, keep)
