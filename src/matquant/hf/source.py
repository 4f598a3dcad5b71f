"""Check the float model that a user gives, before torch is imported.

The checks need only paths, JSON files and safetensors headers. They read a directory as transformers does, and reject
what transformers would load as another model, or fail to load, after seconds of imports.
"""

import difflib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matquant.hf.gguf import check_gguf
from matquant.hf.gguf_file import is_gguf
from matquant.hf.tensors import INDEX, MERGE, SINGLE, check_stored, read_headers, read_json_object, shards, some
from matquant.system.errors import InputError

GIVE = "give a Hugging Face model directory, a GGUF file or a hub id"
GIVE_FLOAT = "give the float model it was made from"
LOADABLE = "give a directory with config.json and safetensors, or a hub id that this machine can reach"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".onnx", ".zip", ".gz", ".tar", ".txt")
POINTERS = (b"version https://git-lfs", b"# xet version")
POINTER_BYTES = 1024  # maximum size, as in Git LFS
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISER_KEYS = ("quantization_config", "quantization", "compression_config")
QUANTISER_FILES = {  # written beside the weights by tools that leave no record in config.json
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
OTHER_FORMATS = (  # other kinds of directories without config.json
    ("*.gguf", "GGUF files", "give one of these files, not the directory"),
    ("model_index.json", "a diffusion pipeline", "give a causal language model"),
    ("params.json", "a model in its maker's own format", "give its conversion to the Hugging Face format"),
    ("snapshots/*/config.json", "the hub's cache of a model", "give the directory under snapshots"),
    ("*/config.json", "directories of models", "give one of these"),
)
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_source(source: Path | str) -> None:
    """Raise InputError if ``source`` is not a float model, judged by paths, JSON and headers."""
    where = Path(source)
    if where.is_dir():
        check_directory(where)
        return
    if where.is_file():
        if not is_gguf(where):
            raise InputError(_describe_file(where))
        check_gguf(where)
        return
    if not is_hub_id(source):
        raise InputError(f"{source}: no such model directory{_nearest(where)}; {GIVE}")
    try:
        snapshot = importlib.import_module("matquant.hf.hub").find_snapshot(str(source))
    except InputError as error:
        raise InputError(f"{error}{_nearest(where)}") from None
    _check_files(snapshot, source)


def check_directory(where: Path) -> None:
    """Raise InputError if a local directory is not a float model."""
    if not (where / "config.json").is_file():
        raise InputError(_describe_other(where))
    _check_files(where, where)
    _check_weights(where)


def _check_weights(where: Path) -> None:
    """Raise InputError if the weights, or a part of them, are missing."""
    present = [name for name in WEIGHTS if (where / name).is_file()]
    if not present and not read_json_object(where / "config.json").get("transformers_weights"):
        others = sorted(where.glob("*.gguf"))
        if others:
            raise InputError(f"{where} has no weights except {others[0].name}; give that file, not the directory")
        raise InputError(f"{where} cannot be loaded as a model (it has neither {' nor '.join(WEIGHTS)}); {LOADABLE}")
    missing = [] if SINGLE in present else [file.name for file in shards(where) if not file.is_file()]
    if missing:
        raise InputError(f"{where} cannot be loaded as a model ({some(missing)} is missing); {LOADABLE}")


def is_hub_id(source: Path | str) -> bool:
    """Return whether ``source``, which is not an existing path, can be the name of a model on the hub."""
    text = str(source)
    is_name = HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text
    return is_name and not text.endswith((".git", "-", ".")) and not text.lower().endswith(FILE_SUFFIXES)


def _check_files(where: Path, source: Path | str) -> None:
    """Run the checks that a local directory and a snapshot of the hub share."""
    for file in _pointers(where):
        raise InputError(
            f"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {where}, or download it again"
        )
    for name in ADAPTER_FILES:
        if (where / name).is_file():
            raise InputError(
                f"{source} has adapter files beside the model ({name}), which would not be used; {MERGE}, "
                "or remove these files to quantise the model without the adapter"
            )
    tool = quantiser(where)
    if tool:
        raise InputError(f"{source} is quantised already, by {tool}; {GIVE_FLOAT}")
    check_stored(source, read_headers(where))


def _pointers(where: Path) -> Iterator[Path]:
    """Yield pointer files that Git LFS or Xet left in place of large files."""
    for file in sorted(where.iterdir()):
        if file.is_file() and file.stat().st_size <= POINTER_BYTES:
            with file.open("rb") as stream:
                if stream.read(max(map(len, POINTERS))).startswith(POINTERS):
                    yield file


def quantiser(where: Path) -> str:
    """Return the tool that quantised the model in a directory, judged by its files; "" if there is none."""
    config = read_json_object(where / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in QUANTISER_KEYS:
            if part.get(key):
                return _tool(key, part[key])
    return next((tool for name, tool in QUANTISER_FILES.items() if (where / name).is_file()), "")


def _tool(key: str, record: Any) -> str:
    """Return the tool that wrote the quantisation record under ``key`` in config.json."""
    if not isinstance(record, dict):
        return f"another tool ({key}: {record!r})"
    if "matquant" in record:
        return "matquant"
    if record.get("quant_method"):
        return str(record["quant_method"])
    if any(name.startswith(("load_in_", "bnb_", "_load_in_")) for name in record):
        return "bitsandbytes"
    if "bits" in record and "group_size" in record:
        return "MLX" if "mode" in record or key == "quantization" else "GPTQ or AWQ"
    return f"another tool ({key} in config.json)"


def _describe_file(file: Path) -> str:
    """Return why a file is not a model."""
    if (file.parent / "config.json").is_file():
        return f"{file} is a file, not a model directory; give the directory it is in, {file.parent}"
    return f"{file} is a file, not a model directory; {GIVE}"


def _describe_other(where: Path) -> str:
    """Return why a directory without config.json is not a model."""
    if any((where / name).is_file() for name in ADAPTER_FILES):
        base = read_json_object(where / ADAPTER_FILES[0]).get("base_model_name_or_path")
        model = f" for {base}" if base else ""
        return f"{where} is a LoRA adapter{model}, not a model; {MERGE}"
    files = sorted(where.glob("*.gguf"))
    if len(files) == 1:
        return f"{where} has no config.json but a GGUF file; give that file, {files[0]}"
    for pattern, kind, remedy in OTHER_FORMATS:
        if any(where.glob(pattern)):
            return f"{where} has no config.json but {kind}; {remedy}"
    return f"{where} has no config.json; {GIVE}"


def _nearest(where: Path) -> str:
    """Return a directory that ``where`` may be a misspelling of, in brackets."""
    try:
        names = [file.name for file in where.parent.iterdir() if (file / "config.json").is_file()]
    except OSError:
        return ""
    found = difflib.get_close_matches(where.name, names, n=1, cutoff=0.75)
    return f" (there is {where.parent / found[0]})" if found else ""
