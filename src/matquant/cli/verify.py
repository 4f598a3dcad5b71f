"""``matquant verify``."""

import contextlib
import importlib
import sys
from typing import Annotated

from matquant.cli.arguments import Directory, Option
from matquant.format.seal import describe, ignored_files, seal_checkpoint
from matquant.format.verify import check_plain, verify_checkpoint


def verify(
    directory: Directory,
    seal: Annotated[
        bool,
        Option("--seal", help="Accept edited, added and removed small files (configuration, tokenizer, template)."),
    ] = False,
) -> None:
    """Check every hash, shape, number and token of a checkpoint, and list files that do not belong to it."""
    if seal:
        checkpoint, changes = seal_checkpoint(directory)
        print(describe(changes))
    else:
        checkpoint = verify_checkpoint(directory)
        check_plain(checkpoint)
    with contextlib.suppress(ModuleNotFoundError):  # without the package tokenizers, tokens are not checked
        importlib.import_module("matquant.hf.probe").check_tokens(directory)
    for note in ignored_files(directory):
        print(f"note: {note}", file=sys.stderr)
    print(f"{directory} is intact: {len(checkpoint.shapes)} quantised weights, rule {checkpoint.spec.rule}")
