"""Shared fixtures: tiny random models of every family, a tokenizer, a text, and the third-party data where it is."""

import contextlib
import gc
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import matquant

torch.set_num_threads(1)  # two pytest workers on two cores

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
HEADS = {"head_dim": 8}
OLD = {key: SMALL[key] for key in SMALL if key not in ("num_key_value_heads", "intermediate_size")}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **HEADS),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **HEADS),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **HEADS),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "opt": lambda: transformers.OPTConfig(**OLD, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**OLD, intermediate_size=48),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **HEADS, **MOE, mlp_only_layers=[]),
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, Callable[[], Any]] = {  # what is peculiar about them: the tests that ask for them say it
    "falcon": lambda: transformers.FalconConfig(**OLD),
    "gptj": lambda: transformers.GPTJConfig(**OLD, n_positions=64, rotary_dim=4),
    "bloom": lambda: transformers.BloomConfig(**OLD),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL,
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=40,
        interleave_moe_layer_step=1,
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **MOE, shared_expert_intermediate_size=40, mlp_only_layers=[]
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4},
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
        **{"moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "granite_hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SMALL,
        num_local_experts=0,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "gemma3_vision": lambda: transformers.Gemma3Config(
        text_config=FAMILIES["gemma3"]().to_dict(),
        vision_config={**VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
}


def make_model(family: str, directory: Path) -> Path:
    """A tiny random model of ``family`` with a byte-level tokenizer, saved as a Hugging Face directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((FAMILIES | OTHERS)[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # far from uniform predictions, so that a wrong width shows
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and <|endoftext|> as token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def pytest_collection_finish() -> None:
    gc.freeze()  # so that collections skip what torch, transformers and the collected tests hold


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise nanobind reports leaks


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Syncing every file takes longer than writing a tiny checkpoint. Tests of syncing patch os.fsync themselves;
    subprocesses still sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # a closed descriptor is still an error
        yield


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> directory of its tiny model, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        directory = root / family
        return directory if directory.is_dir() else make_model(family, directory)

    return get


@pytest.fixture(scope="session")
def llama(family_model: Callable[[str], Path]) -> Path:
    return family_model("llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents with something to learn."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"The {i % 7}th cat saw {i % 11} mice and said: {'meow ' * (i % 3 + 1)}." for i in range(300)]
    file.write_text("<|endoftext|>".join(lines))
    return file


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of third-party data (models/, text/), beside the project or in $MATQUANT_DATA."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("MATQUANT_DATA", beside))
    if not (directory / "models" / "stories260K").is_dir():
        pytest.skip(f"no third-party data in {directory}; set MATQUANT_DATA")
    return directory


def quantize(model: Path | str, out: Path | str, **options: Any) -> Path:
    """``matquant.quantize``, by default of the feed-forward layers, with one scale per row and by training: the
    smallest checkpoint there is, which most tests want."""
    return matquant.quantize(model, out, **{"method": "qat", "scope": "ffn", "group_size": None, **options})


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Interrupt:
    """Stand in for a function, and be Ctrl-C the n-th time it is called."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        self.function, self.number, self.calls = function, number, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.number:
            raise KeyboardInterrupt
        return self.function(*arguments, **options)
