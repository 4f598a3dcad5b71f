"""Text becomes the same tokens everywhere: in transformers, in our reader of tokenizer.json, and after every repair."""

import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import conftest
import matquant
from conftest import make_tokenizer
from matquant.cli.generate import read_input
from matquant.cli.verbs import app
from matquant.core.spec import Plan
from matquant.engine.chat import render
from matquant.engine.terminal import chat
from matquant.export import export
from matquant.format.manifest import write_manifest
from matquant.format.side_files import TOKENS
from matquant.format.verify import verify_checkpoint
from matquant.hf import sidefiles
from matquant.hf.probe import TEXTS, check_tokens, difference, probe_texts
from matquant.hf.text import check_ids, read_documents, token_stream
from matquant.hf.vocabulary import read_vocabulary
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.shards import open_shards
from matquant.hf_torch.tokenizer import Texts, read_texts
from matquant.measure.run import evaluate_checkpoint
from matquant.measure.tasks import check_tasks, open_tasks
from matquant.planning.pareto import read_baselines
from matquant.planning.sensitivity import open_losses
from matquant.system.errors import InputError
from matquant.system.files import MARK

# The module; transformers has a function of the same name.
convert_slow_tokenizer = importlib.import_module("transformers.convert_slow_tokenizer")
END = "<|endoftext|>"
ENDS = {"bos_token": END, "eos_token": END}
EXTRA = ["an <x> b<y>", "<s>he</s>", "he llo"]
Files = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- tiny tokenizers


def byte_level(*, prefix: bool = False) -> dict[str, Any]:
    """As GPT-2: byte-level BPE with two merges, and <|endoftext|> in the vocabulary but not among the added tokens."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 256, "Ġhe": 257, END: 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return parsed(tokenizer)


def metaspace(*, scheme: str = "first", old: bool = False, bos: bool = True) -> dict[str, Any]:
    """As Llama 2: SentencePiece's BPE with bytes to fall back to. old: spaces are the normaliser's work."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "he", "▁he", "1"]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("h", "e"), ("▁", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in words[:3]])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return parsed(tokenizer)


def unigram() -> dict[str, Any]:
    """As T5: SentencePiece's unigram model; most letters are unknown."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("h", -3.0), ("e", -3.0), ("▁he", -1.0)]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return parsed(tokenizer)


def parsed(tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    return values


def described(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


def words_of(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """vocab.json and merges.txt of a byte-level tokenizer."""
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer["model"]["merges"]), ""])
    return {"vocab.json": tokenizer["model"]["vocab"], "merges.txt": merges}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
SPECIAL_MAP = {**ENDS, "eos_token": described("<y>", rstrip=True), "additional_special_tokens": ["<x>"]}
# name -> side files, JSON values or texts, which transformers reads in another way than tokenizer.json alone says.
FAULTS: dict[str, Files] = {
    "special tokens by name": {"tokenizer.json": byte_level(), "tokenizer_config.json": {**FAST, **ENDS}},
    "added_tokens_decoder": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**FAST, "added_tokens_decoder": {"259": {**described("<x>", lstrip=True)}}},
    },
    "added_tokens.json": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": FAST,
        "added_tokens.json": {"<x>": 259, "he llo": 260},
    },
    "special_tokens_map.json": {"tokenizer.json": byte_level(), "special_tokens_map.json": SPECIAL_MAP},
    "additional_special_tokens": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**FAST, "additional_special_tokens": ["<x>", "<y>"], "image_token": "<img>"},
    },
    "a prefix space by GPT2's class": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, **ENDS},
    },
    "no prefix space by Llama's class": {
        "tokenizer.json": metaspace(),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False},
    },
    "a prefix space by Llama's class": {
        "tokenizer.json": metaspace(scheme="never"),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
    },
    "Llama's class drops the normaliser": {
        "tokenizer.json": metaspace(old=True),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    },
    "a pre-tokenizer and NFC by Qwen2's class": {
        "config.json": {"model_type": "qwen2"},
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END},
    },
    "a beginning by T5's class": {
        "tokenizer.json": unigram(),
        "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
    },
    "add_bos_token, which tokenizer.json overrides": {
        "tokenizer.json": metaspace(bos=False),
        "tokenizer_config.json": {**FAST, "add_bos_token": True, "bos_token": "<s>"},
    },
    "the name of the first token by the class": {
        "tokenizer.json": metaspace(bos=False),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
    },
    "special tokens split": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**FAST, **ENDS, "split_special_tokens": True},
    },
    "a first token that is not in the vocabulary": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": {**FAST, "bos_token": "<nowhere>"},
    },
    "vocab.json and merges.txt": {
        **words_of(byte_level()),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", **ENDS},
    },
    "another file of the same kind": {
        "tokenizer.json": byte_level(),
        "tokenizer.4.0.0.json": byte_level(prefix=True),
        "tokenizer_config.json": {**FAST, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
    },
}


def write_files(directory: Path, files: Files, *, mark: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config.json": {"model_type": "llama"}} | dict(files)).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(mark + text, encoding="utf-8")
    return directory


def assert_same_tokens(source: Path, texts: Texts, out: Path) -> None:
    """transformers gives the same for ``source`` and ``out``, which has the files of ``texts``; so does our reader."""
    write_files(out, {})
    shutil.copy(source / "config.json", out)
    for name, content in texts.files.items():
        (out / name).write_bytes(content)
    theirs, again, ours = load_tokenizer(source), load_tokenizer(out), read_vocabulary(out)
    assert theirs.bos_token_id == again.bos_token_id == ours.bos
    for text in [*probe_texts(theirs.get_added_vocab()), *EXTRA]:
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == ours.plain(text) == plain, text
        assert again(text)["input_ids"] == ours.prompt(text) == theirs(text)["input_ids"], text
        assert ours.tokenizer.decode(plain) == theirs.decode(plain, True, clean_up_tokenization_spaces=False)
    assert ours.document(EXTRA[0]) == list(token_stream(EXTRA[:1], theirs)), "as in training and evaluation"
    check_tokens(out)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_declared_anywhere_gives_the_same_tokens_everywhere(fault: str, tmp_path: Path) -> None:
    mark = MARK if fault in ("vocab.json and merges.txt", "added_tokens.json") else ""
    source = write_files(tmp_path / "source", FAULTS[fault], mark=mark)
    assert_same_tokens(source, read_texts(source, needed=True, vocab_size=300), tmp_path / "out")


def test_a_tokenizer_that_all_read_alike_is_copied_as_it_is(llama: Path, tmp_path: Path) -> None:
    texts = read_texts(llama, needed=False, vocab_size=300)
    assert texts.notices == ()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert texts.files[name] == (llama / name).read_bytes()
    assert_same_tokens(llama, texts, tmp_path / "out")


def test_an_assertion_of_same_tokens_fails_for_other_tokens(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", FAULTS["added_tokens.json"])
    other = write_files(tmp_path / "other", FAULTS["a prefix space by GPT2's class"])
    with pytest.raises(AssertionError):
        assert_same_tokens(source, read_texts(other, needed=True, vocab_size=300), tmp_path / "out")


def test_notices_name_the_file_the_text_and_both_readings(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", FAULTS["a prefix space by GPT2's class"])
    (notice,) = read_texts(source, needed=True, vocab_size=300).notices
    assert notice == (
        f"tokenizer.json of {source} gives other tokens than transformers (tokens of 'Hello world': "
        "[39, 68, 75, 75, 78, 220, 86, 78, 81, 75, 67] instead of [220, 39, 68, 75, 75, 78, 220, 86, 78, 81, 75, 67]); "
        "the checkpoint gets one that transformers made"
    )
    bare = write_files(tmp_path / "bare", FAULTS["vocab.json and merges.txt"])
    assert read_texts(bare, needed=True, vocab_size=259).notices == (
        f"tokenizer.json is missing in {bare}; the checkpoint gets one that transformers made",
    )


UNUSABLE: dict[str, tuple[Files, str]] = {
    "nothing": ({}, "has no usable tokenizer (Couldn't instantiate the backend tokenizer from one of); put "),
    "a class without a vocabulary": (
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
        "has no usable tokenizer (no vocabulary); put tokenizer.json beside the model",
    ),
    "SentencePiece": (
        {"tokenizer.model": "\n\x05<unk>", "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
        "has its tokenizer in tokenizer.model, which needs sentencepiece protobuf; "
        "pip install sentencepiece protobuf, or put tokenizer.json beside the model",
    ),
    "tiktoken": (
        {"tokenizer.model": "IQ== 0\n"},
        "has its tokenizer in tokenizer.model, which needs tiktoken; "
        "pip install tiktoken, or put tokenizer.json beside the model",
    ),
    "code of its own": (
        {"tokenizer.json": byte_level(), "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
        "repair its tokenizer files",
    ),
    "a value of another type": (
        {"tokenizer.json": byte_level(), "tokenizer_config.json": {"tokenizer_class": 5}},
        "repair its tokenizer files",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_tokenizer_that_cannot_be_built_is_named_and_refused_where_text_is_needed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidefiles, "_is_installed", lambda module: False)
    monkeypatch.setattr(convert_slow_tokenizer, "requires_backends", not_installed)
    monkeypatch.setattr(convert_slow_tokenizer.TikTokenConverter, "load_tiktoken_bpe", not_installed)
    files, message = UNUSABLE[name]
    source = write_files(tmp_path / "source", files)
    with pytest.raises(InputError) as caught:
        read_texts(source, needed=True, vocab_size=300)
    assert message in str(caught.value)
    texts = read_texts(source, needed=False, vocab_size=300)
    rest = "its tokenizer.json is copied unchecked" if "tokenizer.json" in files else "takes only token ids"
    assert texts.notices[0].startswith(str(caught.value))
    assert texts.notices[0].endswith(rest)
    assert TOKENS not in texts.files


def not_installed(*_: object) -> None:
    raise ImportError("a package is not installed")


# ----------------------------------------------------------------------------------------------------------- hub ids


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, as its client writes it, with one model, and nothing else to be reached."""
    folder = tmp_path / "hub" / "models--acme--tiny"
    snapshot = folder / "snapshots" / ("0123456789" * 4)
    for part in ("blobs", "refs", f"snapshots/{snapshot.name}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, folder / "blobs" / f"{number:040d}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040d}")
    (snapshot / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_brings_its_tokenizer_template_and_generation_config(hub: Path, llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize("acme/tiny", tmp_path / "out", method="rtn")
    local = conftest.quantize(llama, tmp_path / "local", method="rtn")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", TOKENS):
        assert (out / name).read_bytes() == (local / name).read_bytes()
        assert not (out / name).is_symlink()
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    engine = matquant.Engine(out, threads=1)
    assert engine.generate("Once", max_tokens=3) == matquant.Engine(local, threads=1).generate("Once", max_tokens=3)
    check_tokens(verify_checkpoint(out).directory)


def test_a_hub_id_without_tokenizer_is_quantised_with_a_notice(hub: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hub / name).unlink()
    records: list[dict[str, Any]] = []
    out = conftest.quantize("acme/tiny", tmp_path / "out", method="rtn", report=records.append)
    assert (out / "generation_config.json").is_file()
    assert records[0]["notice"].startswith("acme/tiny has no usable tokenizer (")


# ------------------------------------------------------------------------------------------------- vocabularies, verify


@pytest.fixture(scope="module")
def bare(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is vocab.json and merges.txt, with a token beyond its 300 rows, and its checkpoint."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(llama, folder / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    files = words_of(byte_level()) | {"added_tokens.json": {f"<{index}>": index for index in range(259, 302)}}
    config = {"tokenizer_class": "GPT2Tokenizer", **ENDS}
    write_files(folder / "model", {"config.json": (llama / "config.json").read_text(), **files, CONFIG: config})
    return conftest.quantize(folder / "model", folder / "out", method="rtn")


CONFIG = "tokenizer_config.json"
BEYOND = (
    "token 300 ('<300>') is outside the vocabulary of 300; use the model's own tokenizer, "
    "or resize the float model's embedding to fit it"
)


def test_vocab_and_merges_become_a_tokenizer_json_that_engine_and_evaluation_read(bare: Path, text_file: Path) -> None:
    engine = matquant.Engine(bare, threads=1)
    assert engine.vocabulary.plain("he <259>") == [256, 220, 259]
    assert engine.generate("Once", max_tokens=2)
    record = evaluate_checkpoint(bare, bits=[8], text=[text_file], seq_len=32, max_tokens=64)
    assert record["tokens"] == 64


def test_a_token_beyond_the_vocabulary_is_one_sentence_in_every_verb(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("he " * 100 + "<300>")
    calls: dict[str, Callable[[], Any]] = {
        "eval": lambda: evaluate_checkpoint(bare, bits=[8], text=[text]),
        "eval, native": lambda: evaluate_checkpoint(bare, bits=[8], text=[text], engine="native"),
        "plan": lambda: open_losses(bare, [text]),
        "quantize": lambda: conftest.quantize(bare.parent / "model", tmp_path / "out", method="gptq", text=[text]),
        "report": lambda: app(
            ["report", str(bare), "-o", str(tmp_path / "r.html"), "--text", str(text)], standalone_mode=False
        ),
        "generate": lambda: matquant.Engine(bare, threads=1).generate("he <300>"),
        "score": lambda: matquant.Engine(bare, threads=1).score("he <300>"),
    }
    for verb, call in calls.items():
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == BEYOND, verb
    text.write_text("he " * 100 + "<299>")
    assert evaluate_checkpoint(bare, bits=[8], text=[text], seq_len=32)["tokens"], "the last row is one"


def test_a_token_beyond_the_vocabulary_is_one_sentence_in_the_evaluation_harness(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StandIn:
        """As lm_eval's HFLM, as far as it makes tokens."""

        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model, self.tokenizer = pretrained, tokenizer

        def tok_encode(self, string: Any) -> Any:
            return self.tokenizer(string)["input_ids"]

        def tok_batch_encode(self, strings: list[str]) -> Any:
            return torch.tensor(self.tokenizer(strings)["input_ids"]), None

    names = {
        "lm_eval": {"__version__": "0", "__file__": __file__},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": StandIn},
        "lm_eval.tasks": {"TaskManager": None},
    }
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    ours = ("matquant.integrations.lm_eval", "matquant.integrations.harness")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    harness, torch_free = map(importlib.import_module, ours)
    for name in ours:
        del sys.modules[name]
    native = torch_free.wrap_engine(matquant.Engine(bare, threads=1))
    native.prefix_token_id = 256
    assert native.tok_encode("he") == [256]
    served = harness.wrap(load_float(bare.parent / "model"), load_tokenizer(bare), batch_size=1)
    assert (served.tok_encode("he"), served.tok_encode("")) == ([256], [])
    for encode, text in (
        (served.tok_encode, "<300>"),
        (served.tok_encode, ["he", "<300>"]),
        (served.tok_batch_encode, ["<300>"]),
        (native.tok_encode, "<300>"),
    ):
        with pytest.raises(InputError) as caught:
            encode(text)
        assert str(caught.value) == BEYOND


def test_ids_outside_are_named_even_if_they_have_no_text() -> None:
    for ids in ([0, 5], [0, -1], [2**40]):
        with pytest.raises(InputError, match=rf"^token {ids[-1]} is outside the vocabulary of 5; use the model's own"):
            check_ids(ids, vocab_size=5)
    check_ids([], vocab_size=5)
    check_ids([0, 4], vocab_size=5)


def test_tokens_beyond_the_embedding_are_told_when_a_checkpoint_is_made(bare: Path) -> None:
    assert read_texts(bare.parent / "model", needed=False, vocab_size=300).notices[0] == (
        f"the tokenizer of {bare.parent / 'model'} has the token 300 ('<300>'), but its embedding has 300 rows: "
        "text with such a token will be rejected"
    )


def test_verify_finds_a_tokenizer_that_gives_other_tokens_than_when_it_was_made(bare: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(bare, tmp_path / "changed")
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_manifest(changed, verify_checkpoint(bare).spec)  # as after any repair that is sealed
    with pytest.raises(InputError) as caught:
        check_tokens(verify_checkpoint(changed).directory)
    assert str(caught.value) == (
        f"{changed} has a different tokenizer than when it was made (tokens of 'Hello world': [220, 39, 68, 75, 75, "
        "78, 220, 86, 78, 81, 75, 67] instead of [39, 68, 75, 75, 78, 220, 86, 78, 81, 75, 67]); "
        "copy tokenizer.json and tokenizer_config.json again, or quantise again"
    )
    with pytest.raises(InputError, match="has a different tokenizer than when it was made"):
        app(["verify", str(changed)], standalone_mode=False)
    (changed / TOKENS).unlink()
    check_tokens(changed)  # as in checkpoints made before there was a record


@pytest.mark.parametrize(
    "content",
    [
        *('{"format": 2}', '{"format": 1}', '{"format": 1, "bos": "x", "texts": []}', "[]", "{"),
        '{"format": 1, "bos": null, "texts": [{"text": "a", "ids": 5, "prompt": [], "decoded": ""}]}',
    ],
)
def test_a_damaged_record_of_tokens_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / TOKENS).write_text(content)
    with pytest.raises(InputError, match=rf"{TOKENS} is not .*; copy it again"):
        check_tokens(tmp_path)


def test_a_smaller_nested_checkpoint_and_a_saved_one_keep_the_record(bare: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "exported", tmp_path / "saved"):
        if out.name == "exported":
            export(bare, out, to="matquant", bits=2)
        else:
            matquant.load(bare).save_pretrained(out)
        assert (out / TOKENS).read_bytes() == (bare / TOKENS).read_bytes()
        check_tokens(verify_checkpoint(out).directory)


def test_the_first_difference_is_named() -> None:
    row = {"text": "a" * 99, "ids": [1], "prompt": [0, 1], "decoded": "a"}
    one = {"bos": 0, "texts": [row]}
    assert difference(one, one) is None
    assert difference(one, {"bos": None, "texts": [row]}) == "beginning-of-sequence token: None instead of 0"
    other = {"bos": 0, "texts": [{**row, "prompt": None}]}
    assert difference(one, other) == f"a prompt's tokens of '{'a' * 56}...: None instead of [0, 1]"
    assert len(set(TEXTS)) == len(TEXTS)


# --------------------------------------------------------------------------------------------------- byte-order marks


def marked(file: Path, text: str) -> Path:
    file.write_text(MARK + text, encoding="utf-8")
    return file


def test_a_byte_order_mark_is_dropped_from_every_file_a_user_gives(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_documents([marked(tmp_path / "text.txt", "he")]) == ["he"]
    assert Plan.read(marked(tmp_path / "plan.json", '{"default": 4}')).default == 4
    assert read_baselines(marked(tmp_path / "points.json", '{"a": [[1, 2]]}')) == {"a": ([1.0], [2.0])}
    line = json.dumps({"question": "q", "choices": [], "answerKey": "A"})
    marked(tmp_path / "arc_easy.jsonl", f"{line}\n{line}\n")
    check_tasks(["arc_easy"], tmp_path)
    harness = SimpleNamespace(TEMPLATES=tmp_path, load_task=lambda file: json.loads(file.read_text()))
    with open_tasks(harness, ["arc_easy"], tmp_path) as tasks:
        (read,) = tasks["arc_easy"]["dataset_kwargs"]["data_files"].values()
        assert Path(read).read_text() == f"{line}\n{line}\n", "what the harness reads"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{MARK}he"))
    assert read_input() == "he"
    lines = iter([f"{MARK}/quit"])
    out = conftest.quantize(llama, tmp_path / "out", method="rtn")
    marked(out / "chat_template.jinja", "{{ messages[0].content }}")
    matquant.seal_checkpoint(out)
    options = {"engine": {"check_hashes": False}, "system": "", "bits": None, "plan": None}
    assert chat(out, read=lambda _: next(lines), **options) == 0


def test_a_model_directory_whose_files_have_byte_order_marks_is_as_one_without(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    for file in source.glob("*.json"):
        marked(file, file.read_text())
    marked(source / "chat_template.jinja", "{{ messages[0].content }}")
    out = conftest.quantize(source, tmp_path / "out", method="rtn")
    clean = conftest.quantize(llama, tmp_path / "clean", method="rtn")
    for name in ("tokenizer.json", CONFIG, "generation_config.json", "model.safetensors", TOKENS):
        assert (out / name).read_bytes() == (clean / name).read_bytes()
    assert render(read_vocabulary(out), [{"role": "user", "content": "Hi"}]) == "Hi"
    model = load_float(source)
    assert model.config.name_or_path == str(source)
    name, parameter = next(iter(model.named_parameters()))
    assert (open_shards(source).read(name) == parameter).all()
    for file in out.glob("*.j*"):  # as an editor leaves them
        marked(file, file.read_text())
    write_manifest(out, verify_checkpoint(clean).spec)
    assert matquant.Engine(out, threads=1).generate("he", max_tokens=2)
    assert load_tokenizer(out)("he")["input_ids"] == make_tokenizer()("he")["input_ids"]


def test_utf_16_is_named_as_before(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text", encoding="utf-16")
    with pytest.raises(InputError, match=r"text.txt is not UTF-8 \(invalid start byte at byte 0\); convert it"):
        read_documents([tmp_path / "text.txt"])
