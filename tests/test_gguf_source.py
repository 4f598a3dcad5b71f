"""A GGUF file as the float model: the same numbers and tokens as transformers reads, checked before any work."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

import conftest
import matquant
from conftest import make_tokenizer
from gguf_files import SIZES, TEMPLATE, paired, tiny_llama, tokens_of, write_gguf
from matquant import cli
from matquant.export import export
from matquant.export.tokens import read_tokens
from matquant.hf.gguf import as_directory, check_gguf, convert_gguf, quantised_notice
from matquant.hf.source import check_source
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.system.errors import InputError

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def theirs(file: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model that transformers reads."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48)[None] * 5 % 300).logits
    return found


def assert_same_files(one: Path, other: Path, *, but: tuple[str, ...] = ()) -> None:
    """Two checkpoints have the same files with the same bytes."""
    names = {file.name for file in one.iterdir()} | {file.name for file in other.iterdir()}
    for name in sorted(names - set(but)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tied"), [("F32", False), *((kind, True) for kind in KINDS)])
def test_the_model_is_the_one_that_transformers_reads(kind: str, tied: bool, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(tied=tied, dtype=FLOATS.get(kind, torch.float32)), kind)
    stored = FLOATS.get(kind, torch.bfloat16 if kind.startswith("Q4") else torch.float32)
    convert_gguf(file, tmp_path / "ours")
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "model.safetensors").values()} == {stored}
    ours, other = load_float(tmp_path / "ours", dtype=torch.float32), theirs(file)
    assert ours.config.tie_word_embeddings is tied
    for name, value in other.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.to(stored).float()), name
        other.state_dict()[name].copy_(value.to(stored))
    assert torch.equal(logits(ours), logits(other))
    assert torch.equal(logits(load_float(file, dtype=torch.float32)), logits(ours))


def test_the_comparison_above_sees_rows_in_another_order(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    file = write_gguf(tmp_path / "model.gguf", model, "F32")
    weight = model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(paired(weight.detach().numpy(), model.config.num_key_value_heads).copy()))
    assert not torch.equal(logits(load_float(file)), logits(model))


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("F32", "rtn"),
        ("BF16", "rtn"),
        ("Q8_0", "rtn"),
        pytest.param("Q4_0", "rtn", marks=pytest.mark.slow),  # its numbers are compared above
        ("Q4_1", "gptq"),
    ],
)
def test_a_checkpoint_of_the_file_is_that_of_the_directory(
    kind: str, method: str, tmp_path: Path, text_file: Path
) -> None:
    dtype = FLOATS.get(kind, torch.bfloat16 if kind.startswith("Q4") else torch.float32)
    model = tiny_llama(tied=False, dtype=dtype)
    file = write_gguf(tmp_path / "model.gguf", model, kind, {"tokenizer.chat_template": None})
    if kind.startswith("Q"):
        state = theirs(file).state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
    model.save_pretrained(tmp_path / "directory")
    load_tokenizer_of(file, tmp_path).save_pretrained(tmp_path / "directory")
    text: dict[str, Any] = {} if method == "rtn" else {"text": [text_file], "samples": 4, "seq_len": 32}
    for source, name in ((file, "one"), (tmp_path / "directory", "two")):
        matquant.quantize(source, tmp_path / name, method=method, scope="all", group_size=32, **text)
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert leftovers == []
    made = b"".join(path.read_bytes() for path in (tmp_path / "one").iterdir())
    assert b".one.model" not in made


def load_tokenizer_of(file: Path, folder: Path) -> Any:
    with as_directory(file) as directory:
        return load_tokenizer(directory)


def test_vectors_that_the_matrices_dtype_cannot_hold_make_the_model_float32(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)  # norms in float32, matrices in float16
    file = write_gguf(tmp_path / "model.gguf", model, "F16")
    convert_gguf(file, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    for made in (tmp_path / "ours").iterdir():  # a resumed run compares times of large files
        assert made.stat().st_mtime_ns == file.stat().st_mtime_ns


LARGE: dict[str, Any] = {**SIZES, "hidden_size": 64, "max_position_embeddings": 128}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama3": lambda: transformers.LlamaConfig(**LARGE, head_dim=32, rope_parameters=LLAMA3, attention_bias=True),
    "llama": lambda: transformers.LlamaConfig(**LARGE, rope_parameters=LINEAR, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**LARGE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**LARGE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LARGE, head_dim=32, rope_parameters=YARN),
    "gemma2": lambda: transformers.Gemma2Config(**LARGE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("mistral", "qwen2"))) for name in CONFIGS]
)
def test_what_we_export_is_read_back(family: str, tmp_path: Path) -> None:
    """Names, biases, rotary scaling, windows and soft caps: the int8 export is the int8 model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 if parameter.ndim > 1 else parameter + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    made = conftest.quantize(tmp_path / "model", tmp_path / "nested", method="rtn", scope="all", group_size=32)
    export(made, tmp_path / "model.gguf", to="gguf", bits=8)
    ours = load_float(tmp_path / "model.gguf", dtype=torch.float32)
    expected = matquant.load(made, 8, kernels="none", dtype=torch.float32)
    assert type(ours).__name__ == type(model).__name__.replace("Mistral", "Llama")
    if family != "gemma2":
        assert torch.equal(logits(ours), logits(expected))
    else:  # its norms are stored plus one, in float32
        torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(expected), logits(matquant.load(made, 7, kernels="none")), atol=1e-2)
    conftest.quantize(tmp_path / "model.gguf", tmp_path / "again", method="rtn", scope="all", group_size=32)
    tokens = [(tmp_path / name / "tokenizer.json").read_text() for name in ("nested", "again")]
    for text in ("Hello, wörld 123!", "<|endoftext|> x"):
        assert Tokenizer.from_str(tokens[0]).encode(text).ids == Tokenizer.from_str(tokens[1]).encode(text).ids


# Tokens --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(tied=True)


def convert(tmp_path: Path, model: Any, **metadata: Any) -> Path:
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    file = write_gguf(tmp_path / "model.gguf", model, "F32", named)
    return convert_gguf(file, tmp_path / "made", overwrite=True)


def test_the_tokenizer_is_what_the_metadata_says(tmp_path: Path, model: Any) -> None:
    tokens = tokens_of(make_tokenizer())
    texts = [*tokens["tokenizer.ggml.tokens"], "<|im_start|>", "<|im_end|>", "<think>", "[PAD260]"]
    directory = convert(
        tmp_path,
        model,
        tokenizer__ggml__tokens=texts,
        tokenizer__ggml__token_type=[*tokens["tokenizer.ggml.token_type"], 3, 3, 4, 5],
        tokenizer__ggml__bos_token_id=257,
        tokenizer__ggml__eos_token_id=258,
        tokenizer__ggml__eot_token_id=256,
        tokenizer__ggml__add_bos_token=True,
        general__sampling__temp=0.5,
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", texts[256])
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|im_start|>a"
    ids = tokenizer("a<think><|im_end|>")["input_ids"]
    assert ids == [257, texts.index("a"), 259, 258]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"
    assert "[PAD260]" not in tokenizer.get_vocab()
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert (generation.bos_token_id, generation.eos_token_id, generation.temperature) == (257, [258, 256], 0.5)
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 258


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġa"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġa"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġa"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġa"]),
    ],
)
def test_text_is_split_as_the_name_in_the_file_says(pre: str, words: list[str], tmp_path: Path, model: Any) -> None:
    directory = convert(tmp_path, model, tokenizer__ggml__pre=pre)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234 a")] == words
    adds_bos = pre == "llama-bpe"  # by llama.cpp's default
    assert tokenizer.encode("a").ids == [*([256] if adds_bos else []), tokenizer.token_to_id("a")]


def test_scores_become_merges(data: Path, tmp_path: Path, model: Any) -> None:
    """A tokenizer converted from SentencePiece goes to GGUF's scores and comes back the same."""
    source = data / "models" / "stories260K"
    tokens = read_tokens(source, {"vocab_size": 512})
    metadata = {"model": "llama", "scores": list(tokens.scores), "tokens": list(tokens.texts)}
    metadata |= {"token_type": list(tokens.types), "merges": None, "pre": "default"}
    metadata |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": None}
    directory = convert(
        tmp_path,
        tiny_llama(tied=True, vocab_size=512),
        llama__vocab_size=512,
        **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()},
    )
    ours, expected = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (directory, source))
    text = (data / "text" / "tinystories-valid.txt").read_text()[:20000]
    for sample in (text, "déjà-vu: 3.14159…  don't\n\n  I'LL   say — 你好! <0x41>\t🙂\n", " a", ""):
        assert ours.encode(sample).ids == expected.encode(sample).ids
        assert ours.decode(ours.encode(sample).ids) == expected.decode(expected.encode(sample).ids)


def test_a_file_without_a_tokenizer_makes_a_model_that_takes_token_ids(tmp_path: Path, model: Any) -> None:
    directory = convert(tmp_path, model, tokenizer__ggml__model="no_vocab")
    assert not (directory / "tokenizer.json").exists()
    made = conftest.quantize(tmp_path / "model.gguf", tmp_path / "nested", method="rtn")
    assert not (made / "tokenizer.json").exists()


# Files that are rejected ----------------------------------------------------------------------------------------------


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


RAW: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "wrong magic": (b"PK\x03\x04" + bytes(99), ("is not a GGUF file (it begins with b'PK\\x03\\x04')",)),
    "empty": (b"", ("is not a GGUF file",)),
    "magic alone": (b"GGUF", ("is truncated: it ends inside its header; copy or download it again",)),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), ("is a big-endian GGUF file; give the little-endian one",)),
    "version 1": (header(1), ("is a GGUF file of version 1; versions 2 and 3 are supported",)),
    "version 9": (header(9), ("of version 9",)),
    "huge counts": (header(3, 2**63, 2**63), ("is truncated",)),
    "huge string": (header(3, 0, 1) + struct.pack("<Q", 2**62), ("is truncated",)),
    "huge array": (header(3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**61), ("is truncated",)),
    "unknown value": (header(3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 77), ("damaged header ('a' is of the unknown",)),
    "nested arrays": (header(3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1), ("damaged header",)),
    "five dimensions": (header(3, 1, 0) + struct.pack("<Q1sI", 1, b"a", 5), ("damaged header ('a' has 5 dimensions)",)),
    "no tensors": (header(3, 0, 0), ("is a vocabulary without weights",)),
}


@pytest.mark.parametrize("name", RAW)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    content, parts = RAW[name]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_source(tmp_path / "model.gguf")
    for part in (str(tmp_path / "model.gguf"), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"general.type": "adapter"}, "is a LoRA adapter; merge it into its model first"),
    "old adapter": ({"adapter.type": "lora"}, "is a LoRA adapter"),
    "mmproj": ({"general.type": "mmproj"}, "is the vision or audio part of a model; give the file of the language"),
    "clip": ({"clip.has_vision_encoder": True}, "is the vision or audio part of a model"),
    "imatrix": ({"general.type": "imatrix"}, "is an importance matrix"),
    "other": ({"general.type": "lyrics"}, "is of type 'lyrics', not a model"),
    "split": (
        {"split.count": 3},
        "is one of 3 parts of a model; merge them with llama.cpp's 'llama-gguf-split --merge",
    ),
    "unknown key": ({"llama.attention.scale": 0.5}, "has llama.attention.scale = 0.5, which is not supported"),
    "experts": ({"llama.expert_count": 8}, "has llama.expert_count = 8, which is not supported"),
    "per layer": ({"llama.feed_forward_length": [64, 64]}, "llama.feed_forward_length = different values by layer"),
    "no size": ({"llama.block_count": None}, "has llama.block_count = None; it must be an integer above 0"),
    "part of a head": ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, "heads of size 8"),
    "wrong heads": ({"llama.attention.head_count_kv": 4}, "blk.0.attn_k.weight of shape 16 x 32, its metadata says"),
    "more layers": ({"llama.block_count": 3}, "lacks the tensor blk.2.attn_norm.weight"),
    "fewer layers": ({"llama.block_count": 1}, "has tensors (9) without a place in a llama model: blk.1.attn_k.weight"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "rotary scaling of type 'longrope', which is not supported"),
    "no words": ({"tokenizer.ggml.pre": "viking"}, "llama.cpp's 'viking', which is not supported, only gpt-2, smollm"),
    "wordpiece": ({"tokenizer.ggml.model": "bert"}, "has a tokenizer of type 'bert'; gpt2 and llama are supported"),
    "no token": ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id = 999, and 257 tokens"),
    "scores of nothing": ({"tokenizer.ggml.model": "llama"}, "a tokenizer without a score for each of 257 tokens"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens that are not texts"),
    "numbers for merges": ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges that are not texts"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 257}, "has the token 'a' twice"),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": [str(index) for index in range(301)], "tokenizer.ggml.token_type": [1] * 301},
        "has 301 tokens for 300 rows of the embedding",
    ),
    "no alignment": ({"general.alignment": 0}, "has general.alignment 0"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_files_of_something_else_are_named(name: str, tmp_path: Path, model: Any) -> None:
    metadata, part = CHANGED[name]
    file = write_gguf(tmp_path / "model.gguf", model, "F32", metadata)
    with pytest.raises(InputError) as caught:
        check_source(file)
    assert str(file) in str(caught.value)
    assert part in str(caught.value)


def test_another_architecture_a_part_and_a_cut_file_are_named(tmp_path: Path, model: Any) -> None:
    whole = write_gguf(tmp_path / "model.gguf", model, "F32")
    content = whole.read_bytes()
    (tmp_path / "falcon.gguf").write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv7"))
    (tmp_path / "model-00001-of-00002.gguf").write_bytes(content)
    (tmp_path / "cut.gguf").write_bytes(content[:-1000])
    (tmp_path / "head.gguf").write_bytes(content[:3000])
    for name, part in (
        ("falcon", "has the architecture 'rwkv7', which is not supported as GGUF, only gemma2, llama, qwen2, qwen3"),
        ("model-00001-of-00002", "is one of 2 parts of a model"),
        ("cut", "is truncated: blk.1.ffn_down.weight ends at byte"),
        ("head", "is truncated: it ends inside its header"),
    ):
        with pytest.raises(InputError, match=name) as caught:
            check_gguf(tmp_path / f"{name}.gguf")
        assert part in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", model, "F32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the package gguf.*pip install 'matquant\[train\]'"):
        check_source(file)


# Use ------------------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["matquant", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_line_takes_a_file_and_says_that_it_is_quantised(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(tied=False), "Q4_0")
    notice = f"note: {file} is quantised already, most layers to Q4_0 (4.5 bits per weight); quality will be relative"
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    assert run(monkeypatch, "quantize", file, "-o", out, "--recipe", "fast", "--dry-run") == 0
    assert notice in capfd.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert run(monkeypatch, "quantize", file, "-o", out, "--recipe", "fast") == 0
    assert notice in capfd.readouterr().err
    record = tmp_path / "eval.json"
    words = ("--text", text_file, "--reference", file, "--seq-len", 32, "--max-tokens", 256, "--json", record)
    assert run(monkeypatch, "eval", out, "--bits", "8,2", *words) == 0
    measured = json.loads(record.read_text())
    assert abs(measured["reference"] - measured["log_perplexity"]["8"]) < 0.01
    assert abs(measured["reference"] - measured["log_perplexity"]["2"]) > 0.05
    assert json.loads((out / "config.json").read_text())["_name_or_path"] == "model.gguf"
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    capfd.readouterr()
    assert run(monkeypatch, "quantize", tmp_path / "bad.gguf", "-o", tmp_path / "bad") == 2
    assert capfd.readouterr().err == f"error: {tmp_path / 'bad.gguf'} is truncated: it ends inside its header; " + (
        "copy or download it again\n"
    )
    assert not (tmp_path / "bad").exists()


def test_only_narrow_types_get_a_notice(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    for kind, narrow in (("F16", False), ("Q8_0", False), ("Q4_1", True)):
        assert bool(quantised_notice(write_gguf(tmp_path / f"{kind}.gguf", model, kind))) is narrow
    assert quantised_notice("some/model") == ""


def test_an_interrupted_run_of_a_file_resumes(tmp_path: Path, text_file: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(tied=False), "Q8_0")
    options: dict[str, Any] = {"method": "gptq", "text": [text_file], "samples": 4, "seq_len": 32, "scope": "all"}
    matquant.quantize(file, tmp_path / "whole", **options)
    records: list[Any] = []

    def interrupt(record: dict[str, Any]) -> None:
        records.append(record)
        if record.get("block") == "model.layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        matquant.quantize(file, tmp_path / "out", report=interrupt, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "model.gguf", "whole"]
    matquant.quantize(file, tmp_path / "out", resume=True, **options)
    assert_same_files(tmp_path / "whole", tmp_path / "out", but=("training.jsonl", "matquant_manifest.json"))
    assert any(record.get("stage") == "reading the GGUF file" for record in records)


def test_a_failed_conversion_leaves_what_was_there(tmp_path: Path, model: Any) -> None:
    file = write_gguf(tmp_path / "model.gguf", model, "F32")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a Hugging Face model and will not be replaced"):
        convert_gguf(file, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="exists; use another"):
        convert_gguf(file, tmp_path / "out")
    with conftest.largest_file(20_000), pytest.raises(InputError, match="no space left"):
        convert_gguf(file, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]
