"""The small files beside a model's weights that are copied along with it: tokenizer, templates, generation defaults.

Of a checkpoint only files that its manifest lists are read, and links never bring in a file from elsewhere
(``manifest.side_file``).
"""

from pathlib import Path

from matquant.format.manifest import regular_file, side_file

TOKENS = "matquant_tokens.json"  # hf/probe.py
SIDE_FILES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt", "chat_template.jinja", "generation_config.json"),
    "chat_template.json",
)


def side_files(source: Path | str) -> dict[str, bytes]:
    """Tokenizer and generation files in a model's directory, by name.

    Of a checkpoint only those that its manifest lists. InputError for links that leave the directory, and for what is
    no regular file.
    """
    where = Path(source)
    if not where.is_dir():
        return {}
    regular_file(where, "config.json")  # what it says is copied too
    found = {name: side_file(where, name) for name in SIDE_FILES}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def nested_side_files(directory: Path) -> dict[str, bytes]:
    """The side files of a nested checkpoint that go into another one: those of its model, and the record of tokens."""
    record = side_file(directory, TOKENS)
    return side_files(directory) | ({} if record is None else {TOKENS: record.read_bytes()})
