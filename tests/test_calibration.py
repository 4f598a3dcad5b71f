"""The calibration text that ships with the package: how much, what kinds, how mixed, and whose."""

import re
import time
import unicodedata
from pathlib import Path

import pytest

from matquant.calibration import FILE, calibration_text
from matquant.hf.text import SEPARATOR, cut_windows, read_documents, token_stream
from matquant.hf_torch.loading import load_tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
SOURCES = FILE.with_name("SOURCES.md")

KINDS = {
    "Python": r"^def \w+\(",
    "C++": r"^#include <|\bconstexpr\b|\bstd::",
    "dialogue": r"^User: [\s\S]*^Assistant: ",
    "reported speech": r"said Alice|\" said|said, \"",
    "a table": r"^\|( ?:?-+:? ?\|)+$",
    "arithmetic": r"\d [×+] \d+.* = \d",
}
SCRIPTS = ("CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "GREEK", "HEBREW", "THAI")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return calibration_text()


def test_compressed_text_fits_in_the_wheel() -> None:
    assert FILE.stat().st_size <= 300_000


def test_decoding_takes_less_than_a_tenth_of_a_second() -> None:
    def processor_time_s() -> float:
        start = time.process_time()
        calibration_text()
        return time.process_time() - start

    assert min(processor_time_s() for _ in range(3)) < 0.1


def test_documents_are_many_short_and_distinct(documents: list[str]) -> None:
    assert len(documents) >= 400
    assert len(set(documents)) == len(documents)
    assert all(150 <= len(document) <= 3000 for document in documents)


def test_text_fills_64_windows_of_1024_tokens(documents: list[str]) -> None:
    assert len(cut_windows(token_stream(documents, load_tokenizer(REFERENCE)), 1024)) >= 64
    # A vocabulary of 49,152 tokens takes 4.4 characters of English per token, and fewer of anything else.
    assert sum(map(len, documents)) >= 64 * 1024 * 4.4


def test_documents_read_back_from_a_text_file_are_the_same(documents: list[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"\n{SEPARATOR}\n".join(documents), encoding="utf-8")
    assert read_documents([file]) == documents


def test_every_kind_is_in_the_text(documents: list[str]) -> None:
    for kind, pattern in KINDS.items():
        assert any(re.search(pattern, document, re.MULTILINE) for document in documents), kind


@pytest.mark.parametrize("part", range(4))
def test_every_quarter_holds_code_dialogue_and_other_scripts(documents: list[str], part: int) -> None:
    quarter = documents[part * len(documents) // 4 : (part + 1) * len(documents) // 4]
    for kind in ("Python", "C++", "dialogue"):
        assert any(re.search(KINDS[kind], document, re.MULTILINE) for document in quarter), kind
    letters = {letter for document in quarter for letter in document if letter.isalpha()}
    names = " ".join(unicodedata.name(letter, "") for letter in letters)
    assert sum(script in names for script in SCRIPTS) >= 3


def test_every_script_is_in_the_text(documents: list[str]) -> None:
    letters = {letter for document in documents for letter in document if letter.isalpha()}
    names = " ".join(unicodedata.name(letter, "") for letter in letters)
    assert [script for script in SCRIPTS if script not in names] == []


def test_no_text_of_an_archive_or_broken_character_remains(documents: list[str]) -> None:
    everything = "\n".join(documents)
    assert not re.search(r"gutenberg|\betext\b|canterbury corpus|\ufffd|\u00ad|\r|\x00", everything, re.IGNORECASE)


def test_sources_name_every_document_and_byte_with_a_licence(documents: list[str]) -> None:
    rows = re.findall(
        r"^\| (?P<part>[^|]+) \| (?P<documents>\d+) \| (?P<bytes>[\d,]+) \| (?P<licence>[^|]+) \|$",
        SOURCES.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert sum(int(count) for _, count, _, _ in rows) == len(documents)
    assert sum(int(size.replace(",", "")) for _, _, size, _ in rows) == sum(len(text.encode()) for text in documents)
    allowed = ("Apache-2.0, this project", "public domain", "official record of the United Nations")
    assert [part for part, _, _, licence in rows if not licence.startswith(allowed)] == []
