"""The command line: ``matquant`` and ``python -m matquant``. Ctrl-C is handled before anything heavy is imported."""

import importlib
import sys

from matquant.system.startup import leave_on_interrupt, let_threads_sleep, shortage


def main() -> None:
    """Run the command line."""
    let_threads_sleep()
    try:
        with leave_on_interrupt():
            command_line = importlib.import_module("matquant.cli")
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        reason = shortage(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    command_line.main()


if __name__ == "__main__":
    main()
