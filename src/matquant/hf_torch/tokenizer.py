"""Make a new checkpoint's tokenizer files, from which every reader gets the tokens that transformers gives.

transformers builds a tokenizer from several files: tokenizer.json, vocab.json and merges.txt, a SentencePiece model,
added_tokens.json, special_tokens_map.json, and tokenizer_config.json, whose class may replace half of tokenizer.json.
The engine, GGUF and MLX read only tokenizer.json and the special tokens of tokenizer_config.json. So both readers run
the probe (hf/probe.py). If they agree, the files are copied unchanged. Otherwise transformers' tokenizer is written as
tokenizer.json, with a tokenizer_config.json that makes transformers read only that.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from matquant.format.side_files import TOKENS
from matquant.hf.probe import Record, difference, probe_texts, read_ours, read_probe
from matquant.hf.sidefiles import collect, local_directory
from matquant.hf.vocabulary import read_vocabulary
from matquant.hf_torch.loading import load_tokenizer
from matquant.system.errors import InputError
from matquant.system.files import explain_full_disk, json_bytes

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
AS_IT_IS = "PreTrainedTokenizerFast"  # the class that uses tokenizer.json unchanged, in every version of transformers
OVERRIDDEN = ("add_bos_token", "add_eos_token", "fast_tokenizer_files")  # settings that are in tokenizer.json now
Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A tokenizer, and its files in a checkpoint."""

    tokenizer: Any  # transformers'; None if there is none
    files: Mapping[str, bytes]  # the checkpoint's files, by name
    notices: tuple[str, ...] = ()  # for people


def read_texts(source: Path | str, *, needed: bool, vocab_size: int) -> Texts:
    """Return the tokenizer of a float model and the small files for its checkpoint.

    needed: whether the method reads text. vocab_size: rows of the embedding. InputError if a usable tokenizer is needed
    and missing, and if no tokenizer.json gives the tokens that transformers gives.
    """
    files = collect(source)
    try:
        tokenizer = load_tokenizer(source)
    except InputError as error:
        if needed:
            raise
        rest = f"its {FILE} is copied unchecked" if FILE in files else "without it the checkpoint takes only token ids"
        return Texts(tokenizer=None, files=files, notices=(f"{error}; {rest}",))
    texts = probe_texts(tokenizer.get_added_vocab())
    wanted = _read_theirs(tokenizer, texts)
    notices = _beyond(source, tokenizer, vocab_size)
    mended = _with_names(files, tokenizer.special_tokens_map)
    found = _read_ours(mended, texts)
    differs = f"is missing in {source}" if found is None else difference(wanted, found)
    if differs is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            notice = f"{source} has a Python tokenizer ({type(tokenizer).__name__}), which {FILE} cannot represent"
            files.pop(FILE, None)
            return Texts(tokenizer=tokenizer, files=files, notices=(*notices, f"{notice}, so none is written"))
        what = differs if found is None else f"of {source} gives other tokens than transformers ({differs})"
        notices += (f"{FILE} {what}; the checkpoint gets one that transformers made",)
        mended |= _as_transformers_has_it(mended, backend)
    if found is None or mended != files:
        found = _check_mended(source, mended, wanted, texts)
    return Texts(tokenizer=tokenizer, files=mended | {TOKENS: json_bytes(found)}, notices=notices)


def _read_theirs(tokenizer: Any, texts: Sequence[str]) -> Record:
    """Run the probe through transformers, decoding without its clean-up of spaces."""
    return read_probe(
        texts,
        bos=tokenizer.bos_token_id,
        plain=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        prompt=lambda text: tokenizer(text, verbose=False)["input_ids"],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )


def _read_ours(files: Files, texts: Sequence[str]) -> Record | None:
    """Run the probe through our reader of ``files``; None if tokenizer.json is missing or unreadable."""
    with _staged(files) as directory:
        try:
            vocabulary = read_vocabulary(directory)
        except InputError:
            return None
        return read_ours(vocabulary, texts)


def _with_names(files: Files, special: Mapping[str, Any]) -> Files:
    """Return the files, with the special tokens from other files or transformers' class added to CONFIG."""
    config: dict[str, Any] = json.loads(files[CONFIG]) if CONFIG in files else {}
    given = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    lacking = {key: text for key, text in special.items() if isinstance(text, str) and given.get(key) != text}
    return files | {CONFIG: json_bytes(config | lacking)} if lacking else dict(files)


def _as_transformers_has_it(files: Files, backend: Tokenizer) -> Files:
    """Return a tokenizer.json and tokenizer_config.json that hold everything transformers read from all files."""
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = json.loads(files[CONFIG]) if CONFIG in files else {}
    config = {key: value for key, value in config.items() if key not in OVERRIDDEN} | {"tokenizer_class": AS_IT_IS}
    return {FILE: tokenizer.to_str(pretty=True).encode(), CONFIG: json_bytes(config)}


def _check_mended(source: Path | str, files: Files, wanted: Record, texts: Sequence[str]) -> Record:
    """Return the probe by our reader; InputError unless it and transformers both agree with ``wanted``."""
    found = _read_ours(files, texts)
    differs = f"no {FILE}" if found is None else difference(wanted, found)
    if differs is None:
        config = (local_directory(source) or Path(source)) / "config.json"
        with _staged(files | {"config.json": config.read_bytes()}) as directory:
            differs = difference(wanted, _read_theirs(load_tokenizer(directory), texts))
    if found is None or differs is not None:
        raise InputError(
            f"{source} has a tokenizer that {FILE} cannot represent ({differs}); "
            f"add a {FILE} that agrees with it to the model, or remove its tokenizer files"
        )
    return found


def _beyond(source: Path | str, tokenizer: Any, vocab_size: int) -> tuple[str, ...]:
    """Return a notice if the tokenizer has tokens without a row in the embedding."""
    beyond = sorted((index, text) for text, index in tokenizer.get_vocab().items() if index >= vocab_size)
    if not beyond:
        return ()
    index, text = beyond[0]
    return (
        f"the tokenizer of {source} has the token {index} ({text!r}), but its embedding has {vocab_size} rows: "
        "text with such a token will be rejected",
    )


@contextlib.contextmanager
def _staged(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a temporary directory that holds ``files``."""
    with tempfile.TemporaryDirectory() as scratch:
        with explain_full_disk(Path(scratch)):
            for name, content in files.items():
                with (Path(scratch) / name).open("wb") as file:
                    file.write(content)
        yield Path(scratch)
