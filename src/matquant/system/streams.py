"""Make standard streams accept any text: characters that the output encoding lacks are replaced, input is UTF-8.

A terminal, a log or a cron job may be ASCII (``PYTHONIOENCODING=ascii``, ``LC_ALL=C``) or a Windows code page, while
models write any character and our tables contain bars and dashes. The command line calls ``accept_any_text`` once,
before printing anything; a program that uses matquant as a library keeps its streams.
"""

import codecs
import io
import sys

ALIKE = {  # replacements for our characters and the most common ones of models; "?" for others
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
    **dict.fromkeys("‐‑‒–—―−━─", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
    "×": "x",
    "·": "*",
    "•": "*",
    "…": ".",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+-",
}
ERRORS = "matquant.alike"  # the name of our error handler


def accept_any_text() -> None:
    """Replace what stdout and stderr cannot encode, and read stdin as UTF-8 unless it is a terminal of another kind."""
    codecs.register_error(ERRORS, _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
    stdin = sys.stdin
    if isinstance(stdin, io.TextIOWrapper) and (not stdin.isatty() or stdin.encoding.lower() in ("ascii", "us-ascii")):
        stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # a byte-order mark is dropped


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    return "".join(ALIKE.get(character, "?") for character in wanted), error.end
