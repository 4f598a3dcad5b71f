"""A checkpoint of a released model's shape, with random weights: python bench/random_model.py SHAPE MODEL OUT

SHAPE: one of bench/decode.py, such as llama-3.2-1b, embedding and head included. MODEL: a directory with a
tokenizer.json, a byte-level BPE, whose vocabulary is filled up to the shape's with words that no text has. What such a
model writes means nothing, but servers (bench/serve_load.py) take as long for it as for the released one.
"""

import json
from pathlib import Path
from typing import Any

import typer

import decode

FILES = ("tokenizer_config.json", "generation_config.json")
GROUP_SIZE = 64


def fill_up(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a tokenizer.json with ``size`` tokens: to those that it has, words with a number."""
    held = tokenizer["model"]["vocab"]
    further = {f"Ġword{number}": number for number in range(len(held), size)}
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": held | further}}


def main(shape: str, model: Path, out: Path) -> None:
    """Write the checkpoint."""
    config = json.loads((model / "config.json").read_text())
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    asked = decode.SHAPES[shape] | ends
    tokenizer = fill_up(json.loads((model / "tokenizer.json").read_text()), asked["vocab_size"])
    files = {name: (model / name).read_bytes() for name in FILES if (model / name).is_file()}
    files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False).encode()
    decode.write_random(out, asked, GROUP_SIZE, files=files)


if __name__ == "__main__":
    typer.run(main)
