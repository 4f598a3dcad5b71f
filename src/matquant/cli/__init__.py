"""The command line: one file per verb, which only parses and prints. The work is in the packages it calls."""

import sys
from typing import TYPE_CHECKING

from matquant.cli.verbs import app
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.lazy import lazy
from matquant.system.startup import shortage
from matquant.system.streams import accept_any_text
from matquant.system.threads import check_environment

if TYPE_CHECKING:
    from matquant.distributed import group
else:
    group = lazy("matquant.distributed.group")

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; the user's mistakes end with one message and exit code 2."""
    accept_any_text()
    try:
        check_environment()
        app()
    except InputError as error:
        _fail(str(error))
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        short = shortage(error) or (str(error) if isinstance(error, OSError) else None)
        if short is not None:
            _fail(short)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        reason = ". ".join(str(error).split(". ")[:2])  # the allocation that failed; pages of advice follow
        _fail(f"{reason}; use a smaller --batch-size or --seq-len, or --device cpu")


def _fail(message: str) -> None:
    """Print an error and exit with code 2; of several processes only the first one to fail prints."""
    if ranks.count() == 1 or group.claim_error():
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
