"""The small files that are copied along with a model: tokenizer, templates, generation defaults.

Only files that a checkpoint's manifest lists are read, and links never bring in a file from elsewhere
(``manifest.side_file``).
"""

from pathlib import Path

from matquant.format.manifest import regular_file, side_file

LOG = "training.jsonl"  # of the run that made a checkpoint, a record per line
TOKENS = "matquant_tokens.json"  # hf/probe.py
SIDE_FILES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt", "chat_template.jinja", "generation_config.json"),
    "chat_template.json",
)


def side_files(source: Path | str) -> dict[str, bytes]:
    """Return the tokenizer and generation files in a model's directory, by name.

    For a checkpoint, only those that its manifest lists. InputError for links that leave the directory and for paths
    that are not regular files.
    """
    where = Path(source)
    if not where.is_dir():
        return {}
    regular_file(where, "config.json")  # its values are copied too
    found = {name: side_file(where, name) for name in SIDE_FILES}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def nested_side_files(directory: Path) -> dict[str, bytes]:
    """Return the side files of a nested checkpoint that go into another one: the model's, and the record of tokens."""
    record = side_file(directory, TOKENS)
    return side_files(directory) | ({} if record is None else {TOKENS: record.read_bytes()})
