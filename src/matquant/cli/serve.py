"""``matquant serve``."""

from typing import TYPE_CHECKING, Annotated

import typer

from matquant.cli.arguments import (
    Activations,
    CheckHashes,
    Directory,
    Mmap,
    Option,
    Speculate,
    Threads,
    read_speculate,
)
from matquant.core.nest import check_bits
from matquant.system.arguments import read_numbers, read_size
from matquant.system.errors import InputError, check_positive
from matquant.system.lazy import lazy
from matquant.system.startup import INTERRUPTED

if TYPE_CHECKING:
    from matquant.serve import run
else:
    run = lazy("matquant.serve.run", extra="serve")

LIMITS, ACCESS = "Limits", "Access"

Host = Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")]
Port = Annotated[int, Option(help="Port to listen on; 0 for any free one.")]
Name = Annotated[str | None, Option(metavar="NAME", help="Name of the model in requests.", show_default="that of DIR")]
Widths = Annotated[
    str | None, Option(metavar="LIST", help="Widths to list, and to choose from by load.", show_default="8,6,4,3,2")
]
Plans = Annotated[
    list[str] | None,
    Option(metavar="NAME=FILE", help="A mixed-precision plan, served as the model NAME; repeat for several."),
]
MinBits = Annotated[int, Option(help="Narrowest width that load may lead to; requests may raise it.")]
PrefillBits = Annotated[
    int | None,
    Option(
        help="Read prompts of narrower requests at this width.",
        show_default="that of the request",
    ),
]
LatencyMs = Annotated[float, Option(help="Time between two tokens, ms, above which a narrower width serves.")]
ToolFormat = Annotated[
    str | None,
    Option(help="Form of tool calls: hermes, llama3 or mistral.", show_default="from its template"),
]
MaxBits = Annotated[int, Option(help="Keep in memory only the bits that widths up to this one need.")]
Resident = Annotated[
    str | None,
    Option(
        metavar="SIZE",
        help="Memory for weights, such as 20GB: experts get more bits as they are used.",
        show_default="all of them",
        rich_help_panel=LIMITS,
    ),
]
Context = Annotated[
    int | None,
    Option(
        help="Maximum tokens of a prompt and its answer.",
        show_default="the model's context, 32768 at most",
        rich_help_panel=LIMITS,
    ),
]
MaxNumSeqs = Annotated[int, Option(help="Sequences generated at once.", rich_help_panel=LIMITS)]
MaxQueued = Annotated[int, Option(help="Sequences that may wait; more are answered with 429.", rich_help_panel=LIMITS)]
KvBytes = Annotated[
    str | None,
    Option(
        metavar="SIZE",
        help="Memory for keys and values, such as 2GB.",
        show_default="a quarter of what is free",
        rich_help_panel=LIMITS,
    ),
]
AnswerTokens = Annotated[
    int, Option(help="Maximum new tokens of a chat that does not set max_tokens.", rich_help_panel=LIMITS)
]
MaxBodyMb = Annotated[float, Option(help="Largest body of a request, MiB.", rich_help_panel=LIMITS)]
DrainSeconds = Annotated[
    float, Option(help="Time for running answers to finish when the server is stopped.", rich_help_panel=LIMITS)
]
ApiKey = Annotated[
    list[str] | None,
    Option(
        metavar="KEY",
        help="Key that requests must send; repeat for several.",
        envvar="MATQUANT_API_KEY",
        show_default="none is needed",
        rich_help_panel=ACCESS,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    Option(metavar="ORIGIN", help="Web origin whose pages may use the server, or *.", rich_help_panel=ACCESS),
]
AllowHost = Annotated[
    list[str] | None,
    Option(metavar="HOST", help="Further host name that requests may use.", rich_help_panel=ACCESS),
]


def serve(
    directory: Directory,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    widths: Widths = None,
    plan: Plans = None,
    min_bits: MinBits = 4,
    prefill_bits: PrefillBits = None,
    latency_ms: LatencyMs = 100.0,
    speculate: Speculate = "off",
    tool_format: ToolFormat = None,
    max_bits: MaxBits = 8,
    resident: Resident = None,
    context: Context = None,
    max_num_seqs: MaxNumSeqs = 16,
    max_queued: MaxQueued = 128,
    kv_bytes: KvBytes = None,
    answer_tokens: AnswerTokens = 2048,
    max_body_mb: MaxBodyMb = 8.0,
    drain_seconds: DrainSeconds = 30.0,
    api_key: ApiKey = None,
    cors_origin: CorsOrigin = None,
    allow_host: AllowHost = None,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Serve a checkpoint at every width through OpenAI's API. Needs no torch."""
    listed = None if widths is None else tuple(int(bits) for bits in read_numbers(widths, int, "--widths"))
    _check_widths(min_bits, prefill_bits, *(listed or ()), most=max_bits)
    _check(max_num_seqs=max_num_seqs, max_queued=max_queued, latency_ms=latency_ms, drain_seconds=drain_seconds)
    _check(answer_tokens=answer_tokens, max_body_mb=max_body_mb)
    batching = {"max_num_seqs": max_num_seqs, "max_queued_requests": max_queued, "widths": listed, "min_bits": min_bits}
    batching |= {"kv_bytes": _size(kv_bytes, "--kv-bytes"), "prefill_bits": prefill_bits}
    engine = {"max_bits": max_bits, "threads": threads, "activations": activations}
    settings = run.Settings(
        directory=directory,
        engine={**engine, "check_hashes": check_hashes, "mmap": mmap, "resident": _size(resident, "--resident")},
        batching={**batching, "latency_s": latency_ms / 1000, "speculate": read_speculate(speculate)},
        host=host,
        port=port,
        name=name,
        widths=listed,
        plans=plan or [],
        context=context,
        answer_tokens=answer_tokens,
        api_keys=api_key or [],
        origins=cors_origin or [],
        hosts=[entry.lower() for entry in allow_host or []],
        body_bytes=int(max_body_mb * 2**20),
        tool_form=tool_format,
        drain_s=drain_seconds,
    )
    try:
        run.serve(settings)
    except KeyboardInterrupt:  # while it loads; later a signal drains
        raise typer.Exit(INTERRUPTED) from None


def _size(text: str | None, flag: str) -> int | None:
    return None if text is None else read_size(text, flag)


def _check_widths(least: int, prefill: int | None, *listed: int, most: int) -> None:
    """Raise InputError for a number that is no width, and for a --prefill-bits above --max-bits."""
    for bits in (least, most, *listed, *([] if prefill is None else [prefill])):
        check_bits(bits)
    if prefill is not None and prefill > most:
        raise InputError(f"--prefill-bits {prefill} exceeds --max-bits {most}; use {most} or less")


def _check(**numbers: float) -> None:
    """Raise InputError, naming the option, for a number that is not above 0 (of --drain-seconds, below 0)."""
    for name, value in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "drain_seconds" and value == 0:
            continue
        try:
            check_positive(**{flag: value})
        except InputError:
            raise InputError(f"{flag} {value:g} is not valid; give a number above 0") from None
