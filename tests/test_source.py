"""What a user gives as the float model: everything that is none is named, at once and without torch."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from matquant.hf.source import check_source
from matquant.system.errors import InputError

FLOAT = "give the float model it was made from"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LLAMA = {"model_type": "llama", "num_hidden_layers": 2}


def write_model(directory: Path, files: Mapping[str, Any]) -> Path:
    """A directory of these files: text, JSON of objects, and safetensors of {name: dtype} with one number each."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = directory / name
        if name.endswith(".safetensors") and isinstance(content, dict):
            entries = {
                key: {"dtype": dtype, "shape": [8], "data_offsets": [64 * index, 64 * (index + 1)]}
                for index, (key, dtype) in enumerate(content.items())
            }
            header = json.dumps(entries).encode()
            file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64 * len(entries)))
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def quantised(record: Any, *, key: str = "quantization_config", nested: str = "") -> dict[str, Any]:
    part = {key: record}
    return {"config.json": {**LLAMA, **({nested: part} if nested else part)}, "model.safetensors": {"a.weight": "BF16"}}


Q = "model.layers.0.self_attn.q_proj"
REJECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gptq": (quantised({"quant_method": "gptq", "bits": 4}), ("quantised already, by gptq", FLOAT)),
    "awq": (quantised({"quant_method": "awq"}), ("quantised already, by awq", FLOAT)),
    "text_config": (quantised({"quant_method": "fp8"}, nested="text_config"), ("quantised already, by fp8", FLOAT)),
    "bitsandbytes": (quantised({"load_in_4bit": True}), ("quantised already, by bitsandbytes", FLOAT)),
    "mlx": (quantised({"bits": 4, "group_size": 64}, key="quantization"), ("quantised already, by MLX", FLOAT)),
    "mlx mode": (quantised({"bits": 4, "group_size": 64, "mode": "affine"}), ("quantised already, by MLX", FLOAT)),
    "unknown": (quantised("int4"), ("quantised already, by another tool (quantization_config: 'int4')", FLOAT)),
    "compression_config": (quantised({"format": "x"}, key="compression_config"), ("quantised already", FLOAT)),
    "quantize_config.json": (
        {"config.json": LLAMA, "quantize_config.json": {"bits": 4}},
        ("quantised already, by GPTQ", FLOAT),
    ),
    "fp8 with scales": (
        {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "F8_E4M3", f"{Q}.weight_scale_inv": "F32"}},
        ("stores weights as F8_E4M3", f"scales beside them ({Q}.weight_scale_inv)", f"{Q}.weight", "dequantise it"),
    ),
    "int8": (
        {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "I8"}},
        ("stores weights as I8", "no quantization_config", f"{Q}.weight"),
    ),
    "lora inside": (
        {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "BF16", f"{Q}.lora_A.default.weight": "BF16"}},
        ("LoRA", f"{Q}.lora_A.default.weight", "merge the adapter into the model first"),
    ),
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "acme/base"}, "adapter_model.safetensors": {"a": "F32"}},
        ("is a LoRA adapter for acme/base, not a model", "merge the adapter into the model first"),
    ),
    "adapter beside": (
        {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "BF16"}, "adapter_config.json": {}},
        ("has adapter files beside the model (adapter_config.json)", "merge the adapter into the model first"),
    ),
    "lfs weights": (
        {"config.json": LLAMA, "model.safetensors": POINTER},
        ("model.safetensors is a Git LFS pointer", "git lfs pull"),
    ),
    "lfs bin": (
        {"config.json": LLAMA, "pytorch_model.bin": POINTER},
        ("pytorch_model.bin is a Git LFS", "git lfs pull"),
    ),
    "lfs tokenizer": (
        {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "BF16"}, "tokenizer.json": POINTER},
        ("tokenizer.json is a Git LFS pointer", "git lfs pull"),
    ),
    "no weights": (
        {"config.json": LLAMA, "consolidated.safetensors": {f"{Q}.weight": "BF16"}},
        ("cannot be loaded as a model (it has neither model.safetensors nor", "give a directory with config.json"),
    ),
    "no shard": (
        {
            "config.json": LLAMA,
            "model.safetensors.index.json": {"weight_map": {"a.weight": "model-1-of-1.safetensors"}},
        },
        ("cannot be loaded as a model (model-1-of-1.safetensors is missing)",),
    ),
    "gguf": ({"model.gguf": "GGUF"}, ("has no config.json but a GGUF file; give that file", "model.gguf")),
    "ggufs": ({"a.gguf": "GGUF", "b.gguf": "GGUF"}, ("GGUF files; give one of these files, not the directory",)),
    "gguf with config": ({"config.json": LLAMA, "q4.gguf": "GGUF"}, ("no weights except q4.gguf; give that file",)),
    "nothing": ({"readme.txt": "hello"}, ("has no config.json; give a Hugging Face model directory, a GGUF file or",)),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_source_that_is_no_float_model_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    files, parts = REJECTED[name]
    with pytest.raises(InputError) as caught:
        check_source(write_model(tmp_path / "model", files))
    for part in (str(tmp_path / "model"), *parts):
        assert part in str(caught.value)


def test_float_weights_with_buffers_of_older_versions_are_accepted(tmp_path: Path) -> None:
    stored = {f"{Q}.weight": "BF16", "transformer.h.0.attn.bias": "U8", "model.position_ids": "I64", "mask": "BOOL"}
    files = {"config.json": {**LLAMA, "quantization_config": None}, "model.safetensors": stored}
    check_source(write_model(tmp_path / "model", files))


def test_a_file_is_named_by_what_it_is(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"config.json": LLAMA, "model.safetensors": {f"{Q}.weight": "BF16"}})
    write_model(tmp_path, {"note.txt": "x"})
    for file, part in (
        (model / "model.safetensors", f"give the directory it is in, {model}"),
        (tmp_path / "note.txt", "is a file, not a model directory"),
    ):
        with pytest.raises(InputError, match="give") as caught:
            check_source(file)
        assert part in str(caught.value)


@pytest.mark.parametrize("source", ["./models/llama", "../llama", "models/llama.gguf", "models/llama/", "my models/x"])
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such model directory"):
        check_source(source)


def unreachable(*arguments: Any, **options: Any) -> None:
    raise ConnectionError("no route")


def no_such_model(*arguments: Any, **options: Any) -> None:
    error = huggingface_hub.errors.RepositoryNotFoundError
    raise error.__new__(error)


@pytest.mark.parametrize(
    ("answer", "offline", "part"),
    [
        (unreachable, False, "the hub cannot be reached (no route)"),
        (no_such_model, False, "neither a local directory nor a model on the hub"),
        (lambda *a, **k: pytest.fail("asked the hub"), True, "HF_HUB_OFFLINE forbids network access"),
    ],
)
def test_a_mistyped_path_with_one_slash_asks_the_hub_once_at_most_and_names_the_nearest(
    answer: Callable[..., Any], offline: bool, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "models" / "llama", {"config.json": LLAMA})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    with pytest.raises(InputError) as caught:
        check_source("models/lama")
    assert part in str(caught.value)
    assert "(there is models/llama)" in str(caught.value)


PROBE = """
import json, sys
from matquant import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["matquant", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2, arguments
    assert not {"torch", "transformers", "matplotlib"} & set(sys.modules), arguments
"""


def test_refusals_that_need_no_model_come_before_torch_is_imported(
    tmp_path: Path, llama: Path, text_file: Path
) -> None:
    rejected = [write_model(tmp_path / name.replace(" ", "-"), files) for name, (files, _) in REJECTED.items()]
    (tmp_path / "exists").mkdir()
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    out, text = ("-o", str(tmp_path / "out")), ("--text", str(text_file))
    model, no_text = str(llama), ("--text", str(tmp_path / "no.txt"))
    rtn = ("quantize", model, *out, "--method", "rtn")
    commands: list[tuple[str, ...]] = [
        *(("quantize", str(where), *out, "--method", "rtn") for where in rejected),
        ("quantize", "nosuch", *out, *text),
        ("quantize", "./no/such", *out, *text),
        ("quantize", model, "-o", str(tmp_path / "exists"), *text),
        ("quantize", model, *out, "--recipe", "paper"),
        ("quantize", model, *out, *no_text),
        ("quantize", model, *out, "--text", str(tmp_path / "latin1.txt")),
        ("quantize", model, *out, *text, "--resume"),
        ("quantize", model, *out, *text, "--method", "qat", "--damp", "0.1"),
        (*rtn, "--tune", "3"),
        ("quantize", model, *out, *text, "--method", "gptq", "--damp", "-1"),
        ("quantize", model, *out, *text, "--method", "omniquant", "--codes", "nope"),
        ("quantize", model, *out, *text, "--method", "distill", "--freeze", "7"),
        ("quantize", model, *out, *text, "--objective", "8,4->8"),
        ("quantize", model, *out, *text, "--threads", "0"),
        *(
            (*rtn, flag, "nope")
            for flag in ("--scope", "--rule", "--affine", "--zero-point", "--scale-dtype", "--method")
        ),
        (*rtn, "--exclude", "("),
        (*rtn, "--affine", "learned"),
        ("eval", str(tmp_path / "none"), *text),
        ("eval", model, *text),
        ("eval", model, *text, "--seq-len", "0"),
        ("plan", model, *text, "-o", str(tmp_path / "plan"), "--bits-per-weight", "4"),
        ("report", model, *text, "-o", str(tmp_path / "page")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error: ") == len(commands)
    assert "Traceback" not in done.stderr
