"""Files of a model that are damaged, or say something of a wrong type, sign or size: one line, and no memory for it.

Every reader of a source model and of a checkpoint is run in this process on copies of one tiny model.
"""

import contextlib
import copy
import io
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import conftest
import matquant
from cases import each
from conftest import FAMILIES, OTHERS
from matquant import InputError, _native
from matquant.engine import terminal
from matquant.engine.chat import ROOM, Conversation
from matquant.export import FORMATS, export
from matquant.format.contents import summarise
from matquant.format.facts import CONFIG, FILES, GENERATION, LARGEST, check_facts
from matquant.format.manifest import write_manifest
from matquant.format.read import open_checkpoint
from matquant.format.verify import verify_checkpoint
from matquant.planning.sensitivity import open_losses

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "eos_token_id": 256}
VALUES: list[Any] = [
    *(-1, 0, 1e30, 0.5, 10**6, 2**31, 2**32 + 128, 2**63, float("nan"), float("inf")),
    *("8", "auto", None, True, [], {}, [-1], [[1]], {"a": {"b": 1}}),
]
MEMORY_BYTES = 300 * 2**20  # what one run may take on top, far below what the sizes ask for


@pytest.fixture(scope="module")
def source(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with a chat template and sampling settings."""
    directory = shutil.copytree(llama, tmp_path_factory.mktemp("hostile") / "source")
    edit(directory / "tokenizer_config.json", chat_template=TEMPLATE, add_bos_token=True)
    (directory / "generation_config.json").write_text(json.dumps(SAMPLED))
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return conftest.quantize(source, source.parent / "checkpoint", method="rtn")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def seal(directory: Path) -> None:
    """Make the manifest fit the files again, as the repair of a file does."""
    spec = open_checkpoint(directory, check_hashes=False).spec
    write_manifest(directory, spec)


def readers(directory: Path, text: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a checkpoint, by name."""

    def generate() -> None:
        engine = matquant.Engine(directory, check_hashes=False, threads=1)
        engine.generate("hi", bits=4, max_tokens=2)
        engine.score("hello")

    def chat() -> None:
        engine = {"check_hashes": False, "threads": 1}
        read = iter(["hi", "/quit"])
        assert terminal.chat(
            directory, bits=4, plan=None, system="", engine=engine, read=lambda _: next(read), max_tokens=2
        ) in (0, 2)

    def load() -> None:
        matquant.load(directory, check_hashes=False)(torch.tensor([[1, 2, 3]]))

    def plan() -> None:
        open_losses(directory, [text], seq_len=16, samples=1)

    def exported(to: str) -> None:
        seal(directory)
        export(directory, out / f"{to}{FORMATS[to].suffix}", to=to, bits=4, zero_point="midrange", overwrite=True)

    return {
        "generate": generate,
        "chat": chat,
        "load": load,
        "plan": plan,
        "inspect": lambda: summarise(open_checkpoint(directory, check_hashes=False)),
        "verify": lambda: (seal(directory), verify_checkpoint(directory)),
        **{f"export {to}": lambda to=to: exported(to) for to in FORMATS},  # type: ignore[misc]
    }


def assert_one_line(run: Callable[[], object], what: object) -> str:
    """``run`` succeeds or raises an InputError of one line, whose text is returned; and takes little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run()
    except InputError as error:
        message = str(error)
        assert message.count("\n") == 0, what
        assert len(message) < 1000, what
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert taken < MEMORY_BYTES, f"{what} took {taken} bytes"
    return message


def test_the_comparison_sees_a_traceback() -> None:
    with pytest.raises(AssertionError, match="here: KeyError"):
        assert_one_line(lambda: {}["x"], "here")


def mutants(values: dict[str, Any], generator: random.Random, *, count: int) -> Iterator[tuple[str, Any, str]]:
    """(key, value, JSON text) with one value of ``values``, at any depth, replaced: ``count`` replacements a key."""

    def places(part: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, value in part.items():
            if key != "quantization_config":
                yield (*at, key)
                if isinstance(value, dict):
                    yield from places(value, (*at, key))

    for place in list(places(values, ())):
        for value in generator.sample(VALUES, count):
            changed = copy.deepcopy(values)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            yield ".".join(place), value, json.dumps(changed)


JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
LIGHT = ("generate", "chat", "inspect", "export gguf", "export mlx", "export dense")  # without transformers


@pytest.mark.parametrize("name", JSON_FILES)
def test_no_value_in_a_checkpoints_json_ends_in_a_traceback(
    name: str, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    generator, values = random.Random(name), json.loads((directory / name).read_text())
    if name == "config.json":
        values |= {"sliding_window": 16, "torch_dtype": "float32", "head_dim": 8}
    runs = readers(directory, text_file, tmp_path)
    for key, value, text in mutants(values, generator, count=1):
        (directory / name).write_text(text)
        verb = generator.choice(LIGHT)
        assert_one_line(runs[verb], f"{verb} with {key}={value!r} in {name}")


def test_no_value_in_a_source_models_json_ends_in_a_traceback(source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "source")
    for name in JSON_FILES:
        whole = (directory / name).read_text()
        generator = random.Random(name)
        for key, value, text in mutants(json.loads(whole), generator, count=1):
            (directory / name).write_text(text)
            run = lambda: conftest.quantize(directory, tmp_path / "out", method="rtn", overwrite=True)  # noqa: E731
            assert_one_line(run, f"{key}={value!r} in {name}")
        (directory / name).write_text(whole)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbled": lambda content: content[:40] + bytes(range(128, 256)) + content[168:],
    "a list": lambda content: b"[1]",
    "UTF-16": lambda content: content.decode("latin-1").encode("utf-16"),
    "deep": lambda content: b"[" * 100_000,
}
JSON_DAMAGE = tuple(DAMAGE)
SIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_of_a_source_model_is_one_line(damage: str, source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "added_tokens.json", *SIDE):
        directory = shutil.copytree(source, tmp_path / name)
        content = (directory / name).read_bytes() if (directory / name).is_file() else b'{"a": 1}'
        (directory / name).write_bytes(DAMAGE[damage](content))
        for method, text in (("rtn", {}), ("gptq", {"text": [source / "config.json"], "samples": 1, "seq_len": 8})):
            run = lambda: conftest.quantize(directory, tmp_path / "out", method=method, overwrite=True, **text)  # noqa: B023, E731
            message = assert_one_line(run, f"{name} {damage} {method}")
            assert name in message, (name, damage)
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04garbage"], ids=repr)
def test_damaged_pytorch_weights_are_one_line(content: bytes, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "source")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)
    message = assert_one_line(lambda: conftest.quantize(directory, tmp_path / "out", method="rtn"), content)
    assert message.startswith(f"{directory} cannot be loaded as a model ({directory / 'pytorch_model.bin'} is ")


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_of_a_wrong_shape_is_one_line(kind: str, index: str, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "source")
    (directory / "model.safetensors").unlink()
    (directory / f"{kind}.index.json").write_text(index)
    message = assert_one_line(lambda: conftest.quantize(directory, tmp_path / "out", method="rtn"), index)
    assert f"{directory / kind}.index.json" in message
    (directory / f"{kind}.index.json").write_text('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    message = assert_one_line(lambda: conftest.quantize(directory, tmp_path / "out", method="rtn"), index)
    named = (
        "gone.safetensors is missing" if kind.endswith("safetensors") else "lists gone.safetensors, which is missing"
    )
    assert named in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_damaged_file_of_a_checkpoint_is_one_line_in_every_reader(
    name: str, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    for number, damage in enumerate(DAMAGE):
        directory = shutil.copytree(checkpoint, tmp_path / damage)
        (directory / name).write_bytes(DAMAGE[damage]((directory / name).read_bytes()))
        runs = readers(directory, text_file, tmp_path)
        for verb in runs if number == 0 else LIGHT[:2]:
            message = assert_one_line(runs[verb], f"{verb} with {name} {damage}")
            reads = {"generate", "chat"} if name != "config.json" else set(runs)
            assert name in message or verb not in reads, (name, damage, verb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch_dtype": "auto"}, "config.json has torch_dtype='auto', which must be float32, bfloat16, "),
        ({"num_hidden_layers": "2"}, "config.json has num_hidden_layers='2', which must be an integer above 0 or null"),
        ({"hidden_size": -32}, "config.json has hidden_size=-32, which must be an integer above 0 or null"),
        ({"num_attention_heads": 5}, "(ValueError: The hidden size (32) is not a multiple of the number of attention "),
        ({"rope_parameters": {"rope_theta": "x"}}, "config.json has rope_parameters.rope_theta='x', which must be "),
        ({"eos_token_id": [1, "2"]}, "config.json has eos_token_id=[1, '2'], which must be an integer of at "),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_kind_is_named_with_its_file_and_key(
    change: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(source, tmp_path / "source")
    edit(directory / "config.json", **change)
    for method in ("rtn", "gptq"):
        text = {"text": [directory / "config.json"]} if method == "gptq" else {}
        with pytest.raises(InputError) as caught:
            conftest.quantize(directory, tmp_path / "out", method=method, **text)
        assert str(directory) in str(caught.value)
        assert message.removeprefix("(ValueError: ") in str(caught.value)


def test_a_checkpoint_with_sampling_of_a_wrong_kind_is_named(checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    file = directory / "generation_config.json"
    for key, value, words in (
        ("temperature", "0.7", "a number of at least 0 or null"),
        ("top_k", -3, "an integer of at least 0 or null"),
        ("do_sample", 1, "true, false or null"),
    ):
        file.write_text(json.dumps(SAMPLED | {key: value}))
        with pytest.raises(InputError) as caught:
            matquant.Engine(directory, check_hashes=False)
        assert str(caught.value) == (
            f"{file} has {key}={value!r}, which must be {words}; repair the file or copy it again"
        )


def test_configurations_of_all_families_are_of_the_kinds_expected() -> None:
    for name, make in (FAMILIES | OTHERS).items():
        config = make()
        for values in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string(use_diff=False))):
            values.pop("dtype", None)  # to_dict has torch's own
            check_facts(values, CONFIG, where=name)
    check_facts({"eos_token_id": [1, 2], "top_k": 50, "temperature": 1}, GENERATION, where="here")
    assert set(FILES) >= set(JSON_FILES)


SIZES = [
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": LARGEST},
    {"vocab_size": 2**31},
    {"intermediate_size": 2**40},
    {"head_dim": 2**31 + 64},  # times two key/value heads it is 2^32 + 128
    {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**12},
    {"hidden_size": 2**40},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 12},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_compared_with_the_tensors_before_memory_is_taken(
    sizes: dict[str, int], source: Path, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    edit(directory / "config.json", **sizes)
    runs = readers(directory, text_file, tmp_path)
    for verb in ("generate", "load", "export gguf"):
        assert assert_one_line(runs[verb], f"{verb} with {sizes}"), f"{verb} accepts {sizes}"
    model = shutil.copytree(source, tmp_path / "source")
    edit(model / "config.json", **sizes)
    for method in ("rtn", "gptq"):
        text = {"text": [text_file]} if method == "gptq" else {}
        run = lambda: conftest.quantize(model, tmp_path / "out", method=method, **text)  # noqa: B023, E731
        assert assert_one_line(run, f"{method} with {sizes}"), f"{method} accepts {sizes}"


@pytest.mark.parametrize("sizes", SIZES[2:4], ids=str)
def test_sizes_of_pytorch_weights_are_compared_too(sizes: dict[str, int], source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "source")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    edit(directory / "config.json", **sizes)
    run = lambda: conftest.quantize(directory, tmp_path / "out", method="rtn")  # noqa: E731
    assert "has mismatched keys: model." in assert_one_line(run, sizes)


SMALL_MODEL: dict[str, Any] = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 300}
FACTORS = {"norm_eps": 1e-5, "attention_scale": 1.0, "embedding_scale": 1.0, "attention_cap": 0.0, "logit_cap": 0.0}


@each(
    "sizes",
    [
        {"heads": 2, "kv_heads": 1, "head_dim": 2**31 + 64},
        {"heads": 2**16, "kv_heads": 1, "head_dim": 2**16},
        {"vocab": 2**31},
        {"hidden": -1},
        {"head_dim": 0},
        {"heads": 3},
    ],
)
def test_native_sizes_whose_products_leave_32_bits_are_rejected(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"out of range|do not make a model"):
        _native.Model(**SMALL_MODEL | sizes, **FACTORS, gelu=False)


def test_native_memory_of_an_absurd_sequence_is_rejected() -> None:
    model = _native.Model(**SMALL_MODEL, **FACTORS, gelu=False)
    for capacity in (0, -1, 2**31 - 1):
        with pytest.raises(ValueError, match="capacity of a cache is out of range"):
            _native.Cache(model, capacity, True)
        with pytest.raises(ValueError, match="capacity of a workspace is out of range"):
            _native.Workspace(model, 128, capacity, 1)
    for tokens in (2**31 - 1, 0):
        with pytest.raises(ValueError, match="of a workspace are out of range"):
            _native.Workspace(model, tokens, 64, 1)
    for threads in (2**31 - 1, 0):
        with pytest.raises(ValueError, match="threads must be from 1 to 1024"):
            _native.Workspace(model, 128, 64, threads)


# Contexts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2**31 - 1, 2**31, 10**12])
def test_a_huge_context_works_in_chat_and_generate(context: int, checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    edit(directory / "config.json", max_position_embeddings=context)
    engine = matquant.Engine(directory, check_hashes=False, threads=1)
    engine.generate("hi", max_tokens=2)
    talk = Conversation(engine, max_tokens=2)
    assert talk._session.capacity == ROOM
    assert "".join(talk.ask("hi")) is not None
    assert_one_line(readers(directory, tmp_path, tmp_path)["export gguf"], context)
    with pytest.raises(InputError, match=rf"not enough memory for a sequence of {10**12} tokens; use fewer"):
        engine.session(10**12)


def test_chat_takes_the_room_of_its_context_option(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"check_hashes": False, "threads": 1}
    lines = iter(["hi", "a longer sentence than ten tokens", "/quit"])
    code = terminal.chat(
        checkpoint,
        bits=None,
        plan=None,
        system="",
        context=10,
        engine=engine,
        read=lambda _: next(lines),
        max_tokens=2,
        temperature=0,
    )
    notes = capsys.readouterr().err.splitlines()
    assert code == 0
    assert " tokens at int8, " in notes[1]
    assert "tokens, more than the 10 it may have; start a new one, or use a larger --context (at most 64)" in notes[2]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (0, "context=0; give a number above 0"),
        (-5, "context=-5; give a number above 0"),
        (65, "context=65 is not valid; use a number of tokens from 1 to 64, the model's context"),
        (10**30, f"context={10**30} is not valid; use a number of tokens from 1 to 64, the model's context"),
    ],
)
def test_an_absurd_context_is_a_sentence(context: int, message: str, checkpoint: Path) -> None:
    with pytest.raises(InputError) as caught:
        terminal.chat(checkpoint, bits=None, plan=None, system="", context=context, engine={"threads": 1})
    assert str(caught.value) == message
