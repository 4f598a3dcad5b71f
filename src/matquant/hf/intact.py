"""Check that a model directory's files are readable and sensible, before allocating anything large.

Damage (a file that ends early, is empty or is not JSON) and values of a wrong type, sign or size give a message that
names the file. Only headers are read, no tensor data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from matquant.format.facts import FILES, REPAIR, check_counts, check_facts, is_weight_map, read_json
from matquant.hf.tensors import INDEX, SINGLE
from matquant.system.errors import InputError

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (b"PK\x03\x04", b"\x80")  # first bytes of torch.save's files: a zip archive, before torch 1.6 a pickle
DEEPEST = 10_000  # maximum layers if the tensors cannot be counted

Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape


def check_readable(directory: Path) -> None:
    """Raise InputError for the first damaged file: JSON, safetensors, or a file that torch.save did not write."""
    for name in FILES:
        read_json(directory / name)
    read_shapes(directory)
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return
    for file in bin_files(directory):
        with file.open("rb") as stream:
            if not stream.read(max(map(len, PICKLES))).startswith(PICKLES):
                raise InputError(f"{file} is not a file of PyTorch weights; {REPAIR}")


def check_sensible(directory: Path, *, tensors: int) -> None:
    """Raise InputError for the first JSON value of a wrong kind, and counts that do not fit (facts.check_counts).

    tensors: number of stored tensors, 0 if not known.
    """
    files = {name: read_json(directory / name) for name in FILES}
    for name, values in files.items():
        check_facts(values, FILES[name], where=directory / name)
    check_counts(files["config.json"], tensors or DEEPEST, where=directory / "config.json")


def read_shapes(directory: Path) -> Shapes:
    """Return the shapes of all tensors in safetensors files, as transformers would read them; InputError for damage."""
    shapes: Shapes = {}
    for file in _listed(directory, SINGLE, INDEX):
        try:
            with safe_open(file, "np") as handle:
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); {REPAIR}") from None
    return shapes


def bin_files(directory: Path) -> list[Path]:
    """Return the files of PyTorch weights in a directory."""
    return list(_listed(directory, BIN, BIN_INDEX))


def _listed(directory: Path, single: str, index: str) -> Iterator[Path]:
    """Yield the single file of weights, or those that the index lists."""
    if (directory / single).is_file():
        yield directory / single
    elif (directory / index).is_file():
        weight_map: Any = read_json(directory / index).get("weight_map")
        if not is_weight_map(weight_map):
            raise InputError(f"{directory / index} has no weight_map of tensor names to file names; {REPAIR}")
        for name in sorted(set(weight_map.values())):
            if not (directory / name).is_file():
                raise InputError(f"{directory / index} lists {name}, which is missing; {REPAIR}")
            yield directory / name
