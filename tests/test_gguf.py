"""GGUF: blocks, weights, names as the gguf package and transformers read them; tokens as tokenizers gives them."""

import importlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import conftest
import matquant
from cases import each
from conftest import SMALL, largest_file, make_tokenizer
from gguf_files import assert_holds_the_slices, file_types, file_weights, gguf_name, metadata, oracle
from matquant.core.spec import Plan
from matquant.export import export
from matquant.export.blocks import CONTAINERS, LAYOUTS, pack_blocks
from matquant.export.containers import ELEMENTS, FIXED, Container, Encoded, Fit, decode
from matquant.export.tokens import read_tokens
from matquant.format.read import open_checkpoint
from matquant.hf.families import supported
from matquant.hf.llama_words import NORMAL, PATTERNS, UNUSED
from matquant.system.errors import InputError

LARGE: dict[str, Any] = {**SMALL, "hidden_size": 256, "intermediate_size": 288}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LARGE, rope_parameters=LLAMA3, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**LARGE, sliding_window=48),
    "qwen2": lambda: transformers.Qwen2Config(**LARGE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LARGE, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(**LARGE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
}
MASTERS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix plain": {"affine": "none"},
    "round": {"rule": "round", "affine": "none"},
    "extra": {"rule": "extra", "affine": "none"},
    "asymmetric": {"symmetric": False},
    "groups": {"group_size": 32},
    "exact scales": {"scale_dtype": "float32"},
}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


# Blocks --------------------------------------------------------------------------------------------------------------


def weight_of(kind: Container, *, rows: int, columns: int, groups: int, seed: int = 0) -> Encoded:
    """Random integers of all values, and a scale and zero of its own for every group."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**kind.bits, (rows, columns), dtype=np.uint8)
    codes[0] = np.arange(columns) % 2**kind.bits
    scale = generator.uniform(1e-3, 1, (rows, groups)).astype(np.float32)
    if kind.zero == ELEMENTS:
        scale = np.exp2(generator.integers(-120, 120, (rows, groups))).astype(np.float32)
    middle = np.full_like(scale, 2 ** (kind.bits - 1))
    zero = middle if kind.zero == FIXED else generator.uniform(-3, 2**kind.bits, (rows, groups)).astype(np.float32)
    ones = np.ones_like(scale, dtype=np.uint8)
    return Encoded(codes=codes, fit=Fit(factor=ones, shift=0 * ones, scale=scale, offset=zero))


def foreign_weights(kind: Container, blocks: np.ndarray) -> np.ndarray:
    """What gguf's own reader makes of blocks."""
    found: np.ndarray = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    return found


@pytest.mark.parametrize("kind", CONTAINERS, ids=lambda kind: kind.name)
def test_gguf_reads_the_blocks_we_pack(kind: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, LAYOUTS[kind.name].itemsize)
    for chunk in (2**19, 700):  # rows at a time
        monkeypatch.setattr("matquant.export.blocks.CHUNK", chunk)
        for groups in (1, 2, 4):
            encoded = weight_of(kind, rows=7, columns=1024, groups=groups, seed=groups)
            np.testing.assert_array_equal(foreign_weights(kind, pack_blocks(kind, encoded)), decode(kind, encoded))


@each("kind", CONTAINERS)
def test_every_bit_of_a_block_counts(kind: Container) -> None:
    """The comparison above can fail: each integer changed by one is seen, at its own place only."""
    encoded = weight_of(kind, rows=1, columns=kind.block, groups=1)
    before = foreign_weights(kind, pack_blocks(kind, encoded))[0]
    for place in range(kind.block):
        for bit in range(kind.bits):
            codes = encoded.codes.copy()
            codes[0, place] ^= 1 << bit
            after = foreign_weights(kind, pack_blocks(kind, Encoded(codes=codes, fit=encoded.fit)))[0]
            zeros = kind.zero == ELEMENTS and encoded.codes[0, place] % 8 == 0 and bit == 3  # 0 and -0
            assert np.flatnonzero(after != before).tolist() == ([] if zeros else [place])


def test_containers_come_by_size_the_fixed_zero_first() -> None:
    sizes = [(LAYOUTS[kind.name].itemsize * 8 / kind.block, kind.zero != FIXED) for kind in CONTAINERS]
    assert sizes == sorted(sizes)
    assert [size for size, _ in sizes] == [2.625, 3.4375, 4.25, 4.5, 4.5, 5.0, 5.5, 5.5, 6.0, 6.5625, 8.5]


# Weights in files ----------------------------------------------------------------------------------------------------


def make_large(family: str, directory: Path) -> Path:
    """A random model of ``family`` with rows long enough for blocks of 256, norms that are not all alike."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("large")
    return {family: make_large(family, root / family) for family in CONFIGS}


@pytest.fixture(scope="module")
def masters(large: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("masters")
    return {
        name: conftest.quantize(large["llama"], root / name, method="rtn", scope="linears", **options)
        for name, options in MASTERS.items()
    }


@pytest.fixture(scope="module")
def families(large: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: conftest.quantize(large[name], root / name, method="rtn", scope="linears") for name in CONFIGS}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("exact scales", "prefix plain") else []) for n in MASTERS]
)
@pytest.mark.parametrize("zero_point", ["exact", pytest.param("midrange", marks=pytest.mark.slow)])
def test_a_file_holds_the_slices_exactly_or_is_refused(
    name: str, zero_point: str, masters: dict[str, Path], tmp_path: Path
) -> None:
    shapes, held = open_checkpoint(masters[name]).shapes, {}
    for bits in (8, 7, 6, 5, 4, 3, 2):
        out = tmp_path / f"{bits}.gguf"
        try:
            made = export(masters[name], out, to="gguf", bits=bits, zero_point=zero_point)
        except InputError:
            continue
        held[bits] = set(made["containers"])
        assert_holds_the_slices(out, masters[name], dict.fromkeys(shapes, bits), zero_point)
        with pytest.raises(AssertionError):
            assert_holds_the_slices(out, masters[name], dict.fromkeys(shapes, bits - 1), zero_point)
    prefix = {4: {"Q4_K", "Q4_1"}, 2: {"Q2_K", "Q4_1"}} | {3: {"Q4_K", "Q4_1"}, 5: {"Q5_K", "Q5_1"}}
    rounded = {8: {"Q8_0"}, 7: {"Q8_0"}, 6: {"Q6_K", "Q8_0"}, 5: {"Q5_0"}, 4: {"Q4_0"}, 3: {"Q3_K", "Q4_0"}}
    extra = {8: {"Q8_0"}, 7: {"Q8_0"}, 6: {"Q8_0"}, 5: {"Q6_K", "Q8_0"}, 4: {"Q5_0"}, 3: {"Q4_0"}}
    moved = {8: {"Q8_0"}, 7: {"Q8_0"}, 6: {"Q8_0"}, 5: {"Q5_K", "Q5_1"}, 4: {"Q4_K", "Q4_1"}, 3: {"Q4_0"}}
    expected: dict[tuple[str, str], dict[int, set[str]]] = {
        ("prefix", "exact"): {8: {"Q8_0"}, **prefix},
        ("exact scales", "exact"): {8: {"Q8_0"}, **prefix},
        ("prefix plain", "exact"): {8: {"Q8_0"}, **prefix},
        ("asymmetric", "exact"): prefix,
        ("asymmetric", "midrange"): {},
        ("groups", "exact"): {8: {"Q8_0"}, 5: {"Q5_1"}, **{key: {"Q4_1"} for key in (4, 3, 2)}},
        ("groups", "midrange"): {
            **{key: {"Q8_0"} for key in (8, 7, 6)},
            5: {"Q5_1"},
            4: {"Q4_1"},
            3: {"Q4_0"},
            2: {"Q4_0"},
        },
        **{("round", zeros): rounded | {2: {"Q2_K", "Q4_0"}} for zeros in ("exact", "midrange")},
        **{("extra", zeros): extra | {2: {"Q3_K", "Q4_0"}} for zeros in ("exact", "midrange")},
    }
    assert held == expected.get((name, zero_point), moved | {2: {"Q2_K", "Q4_0"}})


def test_a_plan_is_exported_path_by_path(masters: dict[str, Path], tmp_path: Path) -> None:
    plan = Plan(default=4, bits={UP: 2, DOWN: 8})
    out = tmp_path / "model.gguf"
    export(masters["prefix"], out, to="gguf", plan=plan)
    assert_holds_the_slices(out, masters["prefix"], plan.resolve(open_checkpoint(masters["prefix"]).shapes))
    assert (file_types(out)["blk.0.ffn_up.weight"], file_types(out)["blk.0.ffn_down.weight"]) == ("Q2_K", "Q8_0")
    record = json.loads(metadata(out)["matquant.record"])
    assert (record["bits"][UP], record["containers"][DOWN]) == (2, "Q8_0")


def test_what_no_block_holds_stays_dense_in_float32(llama: Path, tmp_path: Path) -> None:
    quantised, notices = conftest.quantize(llama, tmp_path / "q", method="rtn"), []
    out = tmp_path / "model.gguf"
    made = export(quantised, out, to="gguf", bits=4, notice=notices.append)  # in_features 32 and 48
    assert made["containers"] == {"Q4_1": 4, "dense": 2}
    assert notices == [f"2 weights such as {DOWN} do not fit the blocks of gguf and stay dense (F32)"]
    checkpoint = open_checkpoint(quantised)
    assert_holds_the_slices(out, quantised, dict.fromkeys(checkpoint.shapes, 4))
    assert file_types(out)["blk.0.ffn_down.weight"] == "F32"


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in ("mistral", "qwen3") else []) for f in CONFIGS]
)
def test_transformers_reads_the_same_model(family: str, families: dict[str, Path], tmp_path: Path) -> None:
    """Its GGUF reader undoes names, the order of rows and Gemma's norms; the shape is told, it reads less of it."""
    kept = {"llama": "llama", "mistral": "llama"}.get(family)
    for bits in (8, 2):
        export(families[family], tmp_path / "model.gguf", to="gguf", bits=bits, overwrite=True)
        ours = matquant.load(families[family], bits, kernels="none", dtype=torch.float32)
        config = CONFIGS[family]()
        if family == "mistral":  # the same tensors; transformers has a file of llama's architecture be one
            config = transformers.LlamaConfig(**{**LARGE, "rope_parameters": config.rope_parameters})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
        )
        assert kept is None or theirs.config.model_type == kept
        expected, checkpoint = ours.state_dict(), open_checkpoint(families[family])
        kinds = file_types(tmp_path / "model.gguf")
        for name, value in theirs.state_dict().items():
            path = name.removesuffix(".weight")
            if path in checkpoint.shapes and bits < 8:
                nested = checkpoint.nested(path)
                np.testing.assert_array_equal(value.numpy(), oracle(nested, bits, kinds[gguf_name(path)]))
            else:
                offset = float(family == "gemma2" and value.ndim == 1)  # norms are stored plus one, rounded as there
                assert torch.equal(value + offset, expected[name] + offset), name


def test_shapes_and_numbers_that_llama_cpp_wants(families: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for family, directory in families.items():
        notices: list[str] = []
        export(directory, tmp_path / f"{family}.gguf", to="gguf", bits=2, base_model="a/b", notice=notices.append)
        found[family] = metadata(tmp_path / f"{family}.gguf")
        assert found[family]["general.architecture"] == supported("gguf")[family].name
        assert found[family]["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q2_K
        assert found[family]["general.quantization_version"] == gguf.GGML_QUANT_VERSION
        assert found[family]["general.base_model.0.repo_url"] == "https://huggingface.co/a/b"
        assert found[family]["matquant.card"].startswith("---\nbase_model: a/b\n")
        told = {"mistral": ["sliding window"], "qwen2": ["(NFC)"]}.get(family, [])  # transformers composes
        assert [part in text for part, text in zip(told, notices, strict=True)] == [True] * len(told)
    llama, mistral, qwen, gemma = (found[name] for name in ("llama", "mistral", "qwen3", "gemma2"))
    assert (llama["llama.context_length"], mistral["llama.context_length"]) == (64, 48)
    assert (qwen["qwen3.attention.key_length"], qwen["qwen3.attention.head_count_kv"]) == (32, 2)
    assert llama["llama.rope.freq_base"] == 10000.0
    assert llama["llama.vocab_size"] == len(llama["tokenizer.ggml.tokens"]) == 300
    caps = (gemma["gemma2.attn_logit_softcapping"], gemma["gemma2.final_logit_softcapping"])
    assert (caps, gemma["gemma2.attention.sliding_window"]) == ((50.0, 30.0), 16)
    names = {family: set(file_types(tmp_path / f"{family}.gguf")) for family in families}
    assert "output.weight" not in names["qwen2"] | names["gemma2"]
    assert "output.weight" in names["llama"]
    assert "blk.1.attn_q.bias" in names["llama"]
    assert {name for name in names["llama"] if "rope" in name} == {"rope_freqs.weight"}


def test_rotary_factors_are_those_of_llama_3(families: dict[str, Path], tmp_path: Path) -> None:
    """The factors by which llama.cpp divides positions, from its converter's formula."""
    export(families["llama"], tmp_path / "model.gguf", to="gguf", bits=8)
    found = file_weights(tmp_path / "model.gguf")["rope_freqs.weight"]
    expected = []
    for index in range(32):
        wavelength = 2 * np.pi * 10000.0 ** (2 * index / 64)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 32 / 4.0 else 8.0 if wavelength > 32 / 1.0 else between)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(expected)) > 3


def test_the_dtype_asked_for_is_that_of_matrices_not_of_vectors(families: dict[str, Path], tmp_path: Path) -> None:
    for dtype, kind in ((None, "F32"), ("float16", "F16"), ("bfloat16", "BF16")):
        export(families["qwen2"], tmp_path / "model.gguf", to="gguf", bits=4, dtype=dtype, overwrite=True)
        types = file_types(tmp_path / "model.gguf")
        assert (types["token_embd.weight"], types["output_norm.weight"]) == (kind, "F32")
        assert types["blk.0.attn_q.bias"] == "F32"


# Tokens --------------------------------------------------------------------------------------------------------------

TEXT = "The cats' 2024 déjà-vu: it's 3.14159…  don't\n\n  I'LL say   ▁so — 你好! <0x41> ﬁ\t🙂\n"


def sentencepiece(tokenizer: Any, text: str, directory: Path, size: int) -> list[int]:
    """Token ids by llama.cpp's algorithm for SentencePiece: merge the neighbours that spell the best token."""
    tokens = read_tokens(directory, {"vocab_size": size})
    ids = {text: index for index, text in enumerate(tokens.texts)}
    symbols = list(((" " if tokens.adds_space else "") + text).replace(" ", "▁"))
    while True:
        pairs = [
            (tokens.scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [*([tokens.special["bos"]] if tokens.adds_bos else []), *(token for part in found for token in part)]


def test_scores_make_sentencepiece_merge_as_the_merges_do(data: Path) -> None:
    directory = data / "models" / "stories260K"
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stories = (data / "text" / "tinystories-valid.txt").read_text()[:1500]
    for text in (TEXT, stories):
        assert sentencepiece(tokenizer, text, directory, 512) == tokenizer.encode(text).ids
    tokens = read_tokens(directory, {"vocab_size": 515})
    assert (tokens.model, tokens.adds_bos, tokens.adds_eos, tokens.adds_space) == ("llama", True, False, True)
    assert tokens.special == {"bos": 1, "eos": 2, "unk": 0}
    assert list(tokens.types[:4]) == [2, 3, 3, 6]
    assert tokens.texts[512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert set(tokens.types[512:]) == {UNUSED}


def byte_level(directory: Path, **changes: Any) -> Path:
    """A tokenizer of bytes and the merge of "he", with parts replaced."""
    directory.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "he"])}
    ignore = changes.pop("ignore_merges", False)
    merges = changes.pop("merges", [("h", "e")])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": "hello"}')
    return directory


def split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize(("steps", "whole"), [key for key in PATTERNS if key[0][0] not in ("gpt2", "digits")])
def test_patterns_of_known_tokenizers_have_their_name(steps: tuple[str, ...], whole: bool, tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "t", pre_tokenizer=split(steps[0]), ignore_merges=whole)
    tokens = read_tokens(directory, {"vocab_size": 300})
    assert (tokens.model, tokens.pre) == ("gpt2", PATTERNS[steps, whole])
    assert tokens.merges == ["h e"]
    assert (tokens.texts[256:258], tokens.types[256], tokens.chat_template) == (["he", "<s>"], NORMAL, "hello")


def test_the_pattern_of_llama_3_and_of_smollm(tmp_path: Path) -> None:
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    directory = byte_level(tmp_path / "a", pre_tokenizer=split(llama3), ignore_merges=True, post_processor=bos)
    tokens = read_tokens(directory, {"vocab_size": 258})
    assert (tokens.pre, tokens.adds_bos, tokens.adds_eos, tokens.special) == ("llama-bpe", True, False, {"bos": 257})
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    assert read_tokens(byte_level(tmp_path / "b", pre_tokenizer=digits), {"vocab_size": 258}).pre == "smollm"


def test_tokenizers_that_llama_cpp_cannot_follow_are_refused(tmp_path: Path) -> None:
    tekken = next(steps[0] for (steps, _), name in PATTERNS.items() if name == "tekken")
    double = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 257)])
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"pre_tokenizer": split(r"\w+")},
            r"splits text by \w+, which llama.cpp does not support; use --to mlx or dense",
        ),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "which llama.cpp does not support"),
        (
            {"normalizer": normalizers.Lowercase()},
            "normalises text (Lowercase), but llama.cpp's gpt2 tokenizer does not",
        ),
        ({"post_processor": double}, "adds the tokens [257, 257] to every text, but llama.cpp adds only bos and eos"),
        (
            {"pre_tokenizer": split(tekken), "merges": []},
            "has ignore_merges=False, unlike llama.cpp's tekken, and merges do not lead to the token 'he'",
        ),
    ]
    for number, (changes, message) in enumerate(cases):
        directory = byte_level(tmp_path / str(number), **changes)
        with pytest.raises(InputError) as caught:
            read_tokens(directory, {"vocab_size": 258})
        assert message in str(caught.value)
    directory = byte_level(tmp_path / "large")
    with pytest.raises(InputError, match=r"the embedding has 257 rows; copy the model's tokenizer"):
        read_tokens(directory, {"vocab_size": 257})
    assert read_tokens(byte_level(tmp_path / "nfc", normalizer=normalizers.NFC()), {"vocab_size": 258}).notices


def test_merges_that_scores_cannot_say_are_refused(data: Path, tmp_path: Path) -> None:
    given = json.loads((data / "models" / "stories260K" / "tokenizer.json").read_text())
    merges = given["model"]["merges"]
    cases = {"does not merge": merges[:-1], "merges": [*merges[1:5], merges[0], *merges[5:], merges[1]]}
    for message, changed in cases.items():
        given["model"]["merges"] = changed
        (tmp_path / "tokenizer.json").write_text(json.dumps(given))
        with pytest.raises(InputError, match=message):
            read_tokens(tmp_path, {"vocab_size": 512, "bos_token_id": 1})


# Bad input -----------------------------------------------------------------------------------------------------------


def refusal(directory: Path, out: Path, **options: Any) -> str:
    """The message of an export that is refused and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as caught:
        export(directory, out, to="gguf", **options)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_an_asymmetric_master_has_no_container_at_8_and_6_bits(masters: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(masters["asymmetric"], tmp_path / "model.gguf", bits=8)
    assert "--to gguf cannot hold model.layers.0" in message
    assert re.search(r"; use --to mlx or compressed-tensors or (gptq_v2 or )?dense, or --bits 5$", message), message


def test_a_family_that_llama_cpp_computes_otherwise_is_refused(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantised = {
        name: conftest.quantize(family_model(name), tmp_path / name, method="rtn") for name in ("opt", "gemma2")
    }
    out = tmp_path / "model.gguf"
    known = "llama, mistral, qwen2, qwen3, gemma2"
    assert refusal(quantised["opt"], out).startswith(f"--to gguf does not support opt models, only {known}; use --to")
    assert refusal(quantised["gemma2"], out, bits=4) == (
        "--to gguf does not support query_pre_attn_scalar 256, which llama.cpp's gemma2 does not compute; "
        "use --to mlx or dense"
    )


def test_without_its_package_gguf_is_refused_and_the_others_work(
    masters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(name: str, *more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert refusal(masters["prefix"], tmp_path / "model.gguf") == (
        "--to gguf needs the package gguf, which is not installed; pip install 'matquant[export]'"
    )
    export(masters["prefix"], tmp_path / "dense", to="dense")


@pytest.mark.parametrize("limit", [1000, 200_000])
def test_a_disk_that_fills_up_leaves_the_old_file(limit: int, masters: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    export(masters["prefix"], out, to="gguf", bits=2)
    before = out.read_bytes()
    assert refusal(masters["prefix"], out).endswith("exists; use another -o, or --overwrite to replace it")
    with largest_file(limit):
        message = refusal(masters["prefix"], out, overwrite=True)
    assert "no space left on the device" in message
    assert out.read_bytes() == before


def test_a_tied_head_is_not_written_and_a_model_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    quantised = conftest.quantize(tmp_path / "tied", tmp_path / "q", method="rtn")
    notices: list[str] = []
    export(quantised, tmp_path / "model.gguf", to="gguf", bits=4, notice=notices.append)
    assert "output.weight" not in file_types(tmp_path / "model.gguf")
    assert notices[0] == "there is no tokenizer.json, so the file takes token ids, not text"
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.model"] == "no_vocab"
