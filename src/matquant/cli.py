"""The command line: verbs only. What they do is in the packages they call."""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from matquant.core.nest import check_bits
from matquant.core.spec import Plan
from matquant.format.checkpoint import check_plain, open_checkpoint, verify_checkpoint
from matquant.format.contents import render, summarise
from matquant.format.seal import describe, ignored_files, seal_checkpoint
from matquant.measure.request import check_evaluation
from matquant.options.request import check_request
from matquant.planning.request import check_losses
from matquant.system import progress
from matquant.system.errors import InputError
from matquant.system.files import MARK, json_text
from matquant.system.startup import INTERRUPTED, leave_on_interrupt, shortage
from matquant.system.streams import accept_any_text
from matquant.system.threads import check_environment

app = typer.Typer(
    help="One int8 checkpoint that is a good int4 and int2 model too (Matryoshka Quantization).",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140},
)
Option = typer.Option
Files = Annotated[
    list[Path] | None, Option("--text", metavar="FILE...", help="UTF-8 text, documents cut at <|endoftext|>.")
]
MoreFiles = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", hidden=True)]
Device = Annotated[str | None, Option(help="cpu or cuda.", show_default="cuda if there is one")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by matquant quantize.")]


def main() -> None:
    """Run the command line; the user's mistakes end with one message and exit code 2."""
    accept_any_text()
    try:
        check_environment()
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        short = shortage(error) or (str(error) if isinstance(error, OSError) else None)
        if short is not None:
            print(f"error: {short}", file=sys.stderr)
            sys.exit(2)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        reason = ". ".join(str(error).split(". ")[:2])  # what was asked for; then come pages of advice
        print(f"error: {reason}; give fewer or shorter sequences at once, or --device cpu", file=sys.stderr)
        sys.exit(2)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory or hub id of a float model.")],
    out: Annotated[Path, Option("--out", "-o", metavar="OUT", help="Directory to write.")],
    more_text: MoreFiles = None,
    method: Annotated[str, Option(help="rtn, gptq (one pass), distill, omniquant or qat.")] = "qat",
    objective: Annotated[
        str | None, Option(help="Widths and targets, such as 8,4,2 (the paper).", show_default="by method")
    ] = None,
    weights: Annotated[str | None, Option(help="Lambda per width, in that order.", show_default="by objective")] = None,
    rule: Annotated[str, Option(help="prefix, round (paper Eq. 6) or extra (Eq. 8).")] = "prefix",
    scope: Annotated[str, Option(help="Linears to quantise: ffn, attention or all.")] = "ffn",
    exclude: Annotated[
        list[str] | None, Option(help="Leave out paths in which this regular expression is found.")
    ] = None,
    group_size: Annotated[str, Option(metavar="channel|N", help="Weights that share a scale.")] = "channel",
    symmetric: Annotated[
        bool | None,
        Option(
            "--symmetric/--asymmetric",
            help="Zero-point at 128, or one per group.",
            show_default="by method",
        ),
    ] = None,
    affine: Annotated[
        str | None,
        Option(help="Own affines of widths 2-4: none, refit, learned.", show_default="by method"),
    ] = None,
    zeros: Annotated[str, Option(help="Their zeros: own, or centre (not stored).")] = "own",
    grid: Annotated[str, Option(help="uniform, or companded (finer about 0).")] = "uniform",
    scale_dtype: Annotated[str, Option(help="Stored scales: bfloat16, or float32 (exact).")] = "bfloat16",
    baseline_bits: Annotated[int | None, Option(help="Train the dedicated model of this width instead.")] = None,
    start: Annotated[
        Path | None, Option(metavar="DIR", help="qat: start from this nested checkpoint, such as gptq's.")
    ] = None,
    text: Files = None,
    steps: Annotated[
        int | None, Option(help="Of training.", show_default="qat 300, distill 96, omniquant 1220 a block")
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Sequences per forward pass.", show_default="qat 8, others 4")
    ] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens per window.", show_default="qat 256, distill 512, 256, others 2048")
    ] = None,
    samples: Annotated[
        int | None, Option(help="Calibration sequences of gptq and omniquant.", show_default="128")
    ] = None,
    lr: Annotated[
        float | None, Option(help="Peak rate.", show_default="qat by width, omniquant 1e-3, gptq 3e-3")
    ] = None,
    clip_lr: Annotated[float | None, Option(help="omniquant: of clips.", show_default="as --lr")] = None,
    transform_lr: Annotated[float | None, Option(help="omniquant: of transformations.", show_default="as --lr")] = None,
    transform: Annotated[
        bool | None, Option("--transform/--no-transform", help="omniquant: learn Eq. 4.", show_default="transform")
    ] = None,
    codes: Annotated[str | None, Option(help="omniquant: round, or gptq (ours).", show_default="round")] = None,
    damp: Annotated[float | None, Option(help="gptq: damping of the Hessian.", show_default="0.01")] = None,
    sweeps: Annotated[
        int | None, Option(help="gptq: rounds of coordinate descent after the pass.", show_default="1")
    ] = None,
    tune: Annotated[
        int | None,
        Option(metavar="STEPS", help="gptq: then tune every block.", show_default="0, distill 60"),
    ] = None,
    seed: Annotated[int | None, Option(help="Order of the data.", show_default="0")] = None,
    accumulate: Annotated[int | None, Option(help="Forward passes per optimiser step.", show_default="1")] = None,
    autocast: Annotated[
        bool | None, Option("--bf16/--fp32", help="Arithmetic of forward and backward.", show_default="fp32")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None, Option("--checkpoint-activations", help="Less memory, more time.")
    ] = None,
    train_rest: Annotated[bool | None, Option("--train-rest", help="Also train what is not quantised.")] = None,
    learn_clip: Annotated[
        bool | None,
        Option("--learn-clip/--no-learn-clip", help="Learn the clip of Eq. 3.", show_default="as affines"),
    ] = None,
    masters: Annotated[
        str | None, Option(help="qat: one float weight for all widths, or each its own.", show_default="one")
    ] = None,
    pull: Annotated[float | None, Option(help="Pull on narrower masters.", show_default="qat 1, gptq 0.35")] = None,
    wide_lr: Annotated[
        float | None, Option(help="Rate of the 8-bit masters, relative to --lr.", show_default="1")
    ] = None,
    affine_lr: Annotated[
        float | None, Option(help="qat: rate of affines and clips, relative to --lr.", show_default="1")
    ] = None,
    stagger: Annotated[
        float | None, Option(help="Share of steps by which narrow masters end early.", show_default="0")
    ] = None,
    freeze: Annotated[
        int | None,
        Option(metavar="BITS", help="Widths up to this one keep their codes.", show_default="qat 0, distill 4"),
    ] = None,
    mix: Annotated[
        float | None, Option(help="qat: weight of the loss of a random mix of widths.", show_default="0")
    ] = None,
    hidden: Annotated[
        float | None, Option(help="qat: weight of the layers' distance to float ones.", show_default="0")
    ] = None,
    skip_batches: Annotated[int | None, Option(help="qat: batches left out at the start.", show_default="0")] = None,
    save_every: Annotated[int | None, Option(help="Steps between saved states.", show_default="100")] = None,
    device: Device = None,
    threads: Annotated[int | None, Option(help="CPU threads.", show_default="all")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT, and any interrupted run.")] = False,
) -> None:
    """Make one nested checkpoint of a float model."""
    options: dict[str, Any] = {
        key: value for key, value in locals().items() if key not in ("model", "out", "more_text") and value is not None
    }
    options |= {"weights": _numbers(weights, float, "--weights")} if weights is not None else {}
    options |= {"exclude": exclude or []}
    options |= {"group_size": _group_size(group_size), "text": _files(text, more_text)}
    check_request(model, out, **options)  # before torch is imported
    with _resumable(), progress.quantising() as report:
        written = _needs_torch("matquant.methods.quantize").quantize(model, out, report=report, **options)
    print(f"wrote {written}; try: matquant eval {written} --text FILE")


@app.command("eval")
def evaluate(
    directory: Directory,
    more_text: MoreFiles = None,
    bits: Annotated[str, Option(help="Widths to evaluate.")] = "8,6,4,3,2",
    text: Files = None,
    plan: Annotated[Path | None, Option(metavar="FILE", help="Also a plan, bits per module path.")] = None,
    reference: Annotated[str | None, Option(metavar="MODEL", help="Also this float model.")] = None,
    seq_len: Annotated[int | None, Option(help="Window in tokens.", show_default="the model's context")] = None,
    stride: Annotated[int | None, Option(help="Distance of windows.", show_default="no overlap")] = None,
    max_tokens: Annotated[int | None, Option(help="Only the first so many tokens.")] = None,
    skip_documents: Annotated[int, Option(help="Leave out the first so many documents.")] = 0,
    tasks: Annotated[str | None, Option(metavar="NAMES", help="Zero-shot tasks, such as arc_easy,boolq.")] = None,
    tasks_data: Annotated[
        Path | None, Option(metavar="DIR", help="Their data, arc_easy.jsonl ....", show_default="the hub")
    ] = None,
    limit: Annotated[int | None, Option(help="Only the first so many questions of a task.")] = None,
    batch_size: Annotated[int, Option(help="Answers of a task per forward pass.")] = 8,
    device: Device = None,
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write the record here too; finished tasks are kept.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw log-perplexity against bits.")] = None,
) -> None:
    """Log-perplexity and zero-shot tasks at every width; the last line is JSON."""
    options: dict[str, Any] = {
        "text": _files(text, more_text),
        "plan_file": plan,
        "reference": reference,
        "seq_len": seq_len,
        "stride": stride,
        "max_tokens": max_tokens,
        "skip_documents": skip_documents,
        "tasks": None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()],
        "tasks_data": tasks_data,
        "limit": limit,
        "batch_size": batch_size,
        "json_file": json_file,
    }
    measured = _widths(bits)
    check_evaluation(directory, needs_picture=plot is not None, **options)  # before torch is imported
    run = _needs_torch("matquant.measure.run")
    with progress.counted("eval") as count:
        record = run.evaluate_checkpoint(
            directory,
            bits=measured,
            device=device,
            plot_file=plot,
            **options,
            show=Console().print,
            report=count,
        )
    print(json_text(record))


@app.command()
def plan(
    directory: Directory,
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="Plan to write; with --pareto the curves.")],
    more_text: MoreFiles = None,
    strategy: Annotated[str, Option(help="search, or pyramid, reverse-pyramid, increasing, decreasing.")] = "search",
    bits_per_weight: Annotated[
        float | None, Option(metavar="B", help="Budget: honest bits per quantised weight.")
    ] = None,
    size: Annotated[str | None, Option(metavar="S", help="Or: of the whole model, such as 1.1GB.")] = None,
    tokens_per_second: Annotated[
        float | None, Option(metavar="T", help="Or: decoding speed on this machine, measured first.")
    ] = None,
    text: Files = None,
    reference: Annotated[
        str | None, Option(metavar="MODEL", help="Loss against this float model.", show_default="the 8-bit model")
    ] = None,
    widths: Annotated[str | None, Option(help="Widths to mix.", show_default="search 2,3,4,6,8, others 2,4,8")] = None,
    fused: Annotated[bool, Option("--fused/--no-fused", help="One width for q, k, v and one for gate, up.")] = True,
    samples: Annotated[int, Option(help="Calibration sequences.")] = 8,
    seq_len: Annotated[
        int | None, Option(help="Tokens per sequence.", show_default="the model's context, 512 at most")
    ] = None,
    seed: Annotated[int, Option(help="Choice of the sequences.")] = 0,
    device: Device = None,
    evaluations: Annotated[int, Option(metavar="N", help="Swaps the search measures at most.")] = 100,
    pareto: Annotated[bool, Option("--pareto", help="Instead of one plan, the whole curve and a picture.")] = False,
    baselines: Annotated[Path | None, Option(metavar="FILE", help="Points to add to the picture.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="The picture.", show_default="-o with .png")] = None,
) -> None:
    """The best width per layer for a budget; the last line is JSON."""
    files = _files(text, more_text)
    budget = {"bits_per_weight": bits_per_weight, "size": size, "tokens_per_second": tokens_per_second}
    options: dict[str, Any] = {"fused": fused, "evaluations": evaluations, "show": Console().print}
    options |= {"widths": None if widths is None else _numbers(widths, int, "--widths")}
    one = {"strategy": strategy, **budget}
    if pareto and (strategy != "search" or any(value is not None for value in budget.values())):
        raise InputError("--pareto is for all strategies and budgets, and one is given; leave one of them out")
    if not pareto and (baselines or plot):
        raise InputError("--baselines and --plot are of the picture, and none is drawn; give --pareto too")
    if not files and not pareto:
        record = importlib.import_module("matquant.planning.run").run(directory, out, **one, **options)
    else:
        if not files:
            raise InputError("--pareto measures losses and no text is given; give --text FILE")
        chosen: dict[str, Any] = {"reference": reference, "samples": samples, "seq_len": seq_len, "seed": seed}
        check_losses(directory, files, **chosen)  # before torch is imported
        if not pareto:
            importlib.import_module("matquant.planning.run").check_plan(
                directory, out, **one, widths=options["widths"], evaluations=evaluations
            )
        sensitivity = _needs_torch("matquant.planning.sensitivity")
        with (
            progress.counted("plan") as count,
            sensitivity.open_losses(directory, files, device=device, notice=_notice, **chosen) as losses,
        ):
            losses.report = lambda done: count("plans measured", done, losses.expected)
            if pareto:
                module = importlib.import_module("matquant.planning.pareto")
                record = module.run(directory, out, losses=losses, baselines=baselines, plot=plot, **options)
            else:
                module = importlib.import_module("matquant.planning.run")
                record = module.run(directory, out, losses=losses, **one, **options)
    print(json_text(record))


@app.command()
def report(
    directory: Directory,
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="HTML file to write.")],
    more_text: MoreFiles = None,
    evals: Annotated[list[Path] | None, Option("--eval", metavar="FILE", help="A record of matquant eval.")] = None,
    plans: Annotated[list[Path] | None, Option("--plan", metavar="FILE", help="Bits per module path.")] = None,
    pareto: Annotated[Path | None, Option(metavar="FILE", help="Curves of loss against bits.")] = None,
    sensitivity: Annotated[Path | None, Option(metavar="FILE", help="KL per path and width.")] = None,
    text: Files = None,
    max_tokens: Annotated[int | None, Option(help="Only the first so many tokens of the text.")] = None,
    device: Device = None,
) -> None:
    """One HTML page: what a checkpoint is, what it costs and how good it is."""
    page = importlib.import_module("matquant.report.page")
    records = {name: page.read_record(file) for name, file in page.by_name(evals or [], "--eval").items()}
    files = _files(text, more_text)
    if files:
        check_evaluation(directory, text=files, max_tokens=max_tokens)  # before torch is imported
        run = _needs_torch("matquant.measure.run")
        measure = functools.partial(
            run.evaluate_checkpoint, directory, text=files, max_tokens=max_tokens, device=device
        )
        with progress.counted("report") as count:
            records["held-out text"] = measure(bits=page.WIDTHS, report=count)
            for plan in plans or []:
                records[plan.stem] = measure(bits=(), plan_file=plan, report=count)
    page.write_report(directory, out, records=records, plans=plans or [], pareto=pareto, sensitivity=sensitivity)
    print(f"wrote {out}")


@app.command("inspect")
def inspect_checkpoint(
    directory: Directory,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Widths, rule, honest bytes and bits per weight, overflow and histograms."""
    checkpoint = open_checkpoint(directory)
    summary = summarise(checkpoint)
    if as_json:
        print(json_text(summary))
    else:
        Console().print(render(checkpoint, summary))


@app.command()
def verify(
    directory: Directory,
    seal: Annotated[
        bool,
        Option("--seal", help="Accept edited, added and removed small files (configuration, tokenizer, template)."),
    ] = False,
) -> None:
    """Check every hash, shape and number of a checkpoint, and that text becomes the same tokens as when it was made.

    Files that are not part of it are named.
    """
    if seal:
        checkpoint, changes = seal_checkpoint(directory)
        print(describe(changes))
    else:
        checkpoint = verify_checkpoint(directory)
        check_plain(checkpoint)
    with contextlib.suppress(ModuleNotFoundError):  # without the package tokenizers, all but the tokens is checked
        importlib.import_module("matquant.hf.probe").check_tokens(directory)
    for note in ignored_files(directory):
        print(f"note: {note}", file=sys.stderr)
    print(f"{directory} is whole: {len(checkpoint.shapes)} quantised weights, rule {checkpoint.spec.rule}")


Bits = Annotated[int | None, Option(help="Width to decode at.", show_default="--max-bits")]
PlanFile = Annotated[Path | None, Option("--plan", metavar="FILE", help="Instead, bits per module path.")]
MaxBits = Annotated[int, Option(help="Keep in memory only what widths up to this need.")]
MaxTokens = Annotated[int, Option(help="New tokens at most.")]
FromModel = "generation_config.json, else greedy"
Temperature = Annotated[float | None, Option(help="0: always the most probable token.", show_default=FromModel)]
TopK = Annotated[int | None, Option(help="Draw from the k most probable; 0: from all.", show_default="as temperature")]
TopP = Annotated[float | None, Option(help="Of these, the fewest that hold p.", show_default="as temperature")]
MinP = Annotated[float | None, Option(help="Of these, at least p times the first.", show_default="as temperature")]
Seed = Annotated[int | None, Option(help="Of the draws.", show_default="0")]
Stop = Annotated[list[str] | None, Option(metavar="TEXT", help="Stop at this text, which is not shown; repeatable.")]
Threads = Annotated[int | None, Option(help="CPU threads.", show_default="OMP_NUM_THREADS, else all")]
Activations = Annotated[str, Option(help="int8, or float (exact and slow).")]
CheckHashes = Annotated[bool, Option("--check-hashes/--no-check-hashes", help="Check the checkpoint's hashes first.")]
Mmap = Annotated[
    bool, Option("--mmap/--no-mmap", help="Map the files. --no-mmap reads them: safe where they may be truncated.")
]


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, Option(metavar="TEXT", help="What to continue; - reads it from the input.")] = "",
    bits: Bits = None,
    plan: PlanFile = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    max_bits: MaxBits = 8,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Continue a text at any width, streaming. Needs no torch."""
    options = locals()
    _serve("generate", options | {"prompt": _read_input() if prompt == "-" else prompt, "stop": stop or []})


@app.command()
def chat(
    directory: Directory,
    bits: Bits = None,
    plan: PlanFile = None,
    system: Annotated[str, Option(metavar="TEXT", help="System message.")] = "",
    context: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Tokens that the conversation may have.",
            show_default="the model's context, 32768 at most",
        ),
    ] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_bits: MaxBits = 8,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Talk to a model; /bits 2 switches the width between replies, /quit ends."""
    _serve("chat", locals())


@app.command()
def bench(
    directory: Directory,
    bits: Annotated[str, Option(help="Widths to measure.")] = "8,6,4,3,2",
    tokens: Annotated[int, Option(help="Tokens per sample.")] = 32,
    rounds: Annotated[int, Option(help="Samples per width, taken in turns.")] = 7,
    context: Annotated[int, Option(help="Tokens before the first one timed.")] = 16,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Tokens per second at every width, and how close that is to streaming the weights; the last line is JSON."""
    widths = _widths(bits)
    runtime = importlib.import_module("matquant.engine.bench")
    engine = importlib.import_module("matquant.engine.engine").Engine(
        directory,
        max_bits=max(widths),
        threads=threads,
        activations=activations,
        check_hashes=check_hashes,
        mmap=mmap,
    )
    record = runtime.bench(engine, bits=widths, tokens=tokens, rounds=rounds, context=context)
    Console().print(runtime.table(record, str(directory)))
    print(json_text(record))


@app.command()
def export(
    directory: Directory,
    to: Annotated[str | None, Option(help="gguf, mlx, compressed-tensors, gptq, gptq_v2, dense or matquant.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="OUT", help="File or directory to write.")] = None,
    bits: Annotated[int | None, Option(help="Width to export.", show_default="8")] = None,
    plan: PlanFile = None,
    zeros: Annotated[
        str, Option(help="exact, or centre: move zeros to the middle of the codes, for formats without others.")
    ] = "exact",
    dtype: Annotated[
        str | None,
        Option(help="Dense weights (mlx: scales too): float32, bfloat16 or float16.", show_default="the model's"),
    ] = None,
    base_model: Annotated[str | None, Option(metavar="ID", help="Hub id of the float model, for the card.")] = None,
    measured: Annotated[
        Path | None, Option(metavar="FILE", help="What matquant eval --json wrote, for the card.")
    ] = None,
    explain: Annotated[
        bool, Option("--explain", help="Print what every format makes of every width; no file.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Hand a slice to llama.cpp, MLX, vLLM, transformers or GPTQModel, exactly."""
    exporting = importlib.import_module("matquant.export")
    wanted = Plan.read(plan) if plan is not None else None
    if explain:
        explaining = importlib.import_module("matquant.export.explain")
        checkpoint = open_checkpoint(directory)
        resolved = wanted.resolve(checkpoint.shapes) if wanted is not None else None
        Console().print(explaining.render(explaining.explain(checkpoint, plan=resolved, zeros=zeros), str(directory)))
        return
    if to is None or out is None:
        raise InputError(f"export needs a format and a place; give --to {' or '.join(exporting.FORMATS)} and -o OUT")
    with progress.exporting() as report:
        made = exporting.export(
            directory, out, to=to, bits=bits, plan=wanted, zeros=zeros, dtype=dtype, base_model=base_model,
            measured=measured, overwrite=overwrite, report=report,
            notice=_notice,
        )  # fmt: skip
    speed = made["bytes"] / made["seconds"] / 1e6
    print(
        f"wrote {out}: {', '.join(made['containers'])}, {made['bits_per_weight']:.3f} bits per weight, "
        f"{made['bytes'] / 1e6:,.1f} MB at {speed:,.0f} MB/s"
    )


@app.command()
def demo(
    out: Annotated[Path, Option("--out", "-o", metavar="OUT", help="Directory for checkpoints and pictures.")] = Path(
        "out/demo"
    ),
) -> None:
    """Quantise the embedded model jointly and against its baselines, in a few minutes."""
    _needs_torch("matquant.demo").run(out, Console())


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _needs_torch(module: str) -> Any:
    """Import a module of the training world, or say what to install."""
    try:
        with leave_on_interrupt():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise InputError(f"this needs {error.name}, which is not installed; pip install 'matquant[train]'") from None


def _serve(verb: str, options: dict[str, Any]) -> None:
    """Run a verb of matquant.engine.terminal, imported only now; Ctrl-C ends it with 130 wherever it is."""
    engine = {name: options.pop(name) for name in ("max_bits", "threads", "activations", "check_hashes", "mmap")}
    try:
        code = getattr(importlib.import_module("matquant.engine.terminal"), verb)(engine=engine, **options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


def _read_input() -> str:
    try:
        return sys.stdin.read().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _files(text: list[Path] | None, more_text: list[Path] | None) -> list[Path]:
    """All of ``--text FILE...``, of which the parser hands on the first apart."""
    return [*(text or []), *(more_text or [])]


def _widths(text: str) -> list[int]:
    widths = _numbers(text, int, "--bits")
    for width in widths:
        check_bits(width)
    return widths


def _numbers(text: str, kind: type, flag: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text!r} is not a list of numbers; give them with commas, such as 8,4,2") from None


def _group_size(text: str) -> int | None:
    if text == "channel":
        return None
    if not text.isdecimal():
        raise InputError(f"--group-size {text!r} is neither 'channel' nor a number; give one of them, such as 128")
    return int(text)


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C ends a run of quantize with 130 and the way to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; if it was training, the same command with --resume continues", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
