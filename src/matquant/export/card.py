"""The record and the model card of an export."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from matquant.core.verdict import limits, verdict
from matquant.export.containers import MIDRANGE
from matquant.export.job import Job
from matquant.format.describe import ends_words, float_bytes, float_dtype, model_words, plain, scope_words, size
from matquant.format.read import Checkpoint, manifest_sha256
from matquant.format.sizes import bits_per_weight, plain_bytes, plan_bytes
from matquant.system.errors import InputError
from matquant.system.files import read_json

RECORD = "matquant_export.json"
CARD_WIDTHS = (8, 6, 4, 3, 2)  # rows of the card of a nested checkpoint
# format -> what the export is, where it is not one width
NATURES = {"matquant": "It is a nested checkpoint that is read at this width and at every narrower one"}


def record(job: Job) -> dict[str, Any]:
    """Return how an export was made and the container of every path, as JSON values."""
    return {
        "checkpoint": manifest_sha256(job.checkpoint.directory),
        "format": job.about["format"],
        "rule": job.checkpoint.spec.rule,
        "zero_point": job.zero_point,
        "bits": dict(job.plan),
        "containers": job.kinds(),
        "bits_per_weight": job.bits_per_weight(),
        **({"requantised": job.about["loss"]} if job.about.get("loss") is not None else {}),
    }


def model_card(job: Job) -> str:
    """Return README.md: front matter for hubs, what the export is, its quality, how to run it, and the recipe."""
    checkpoint, base_model = job.checkpoint, job.about.get("base_model")
    whole, total = float_bytes(checkpoint), sum(part.bytes for part in job.parts())
    rows = _measured(job.about.get("measured"))
    here = next((row for row in rows if row["key"] == _measured_as(job)), None)
    changed = {"requantised": job.about.get("loss") is not None, "moved to mid-range": job.zero_point == MIDRANGE}
    changes = " and ".join(words for words, is_so in changed.items() if is_so)
    return _template("card.md.jinja").render(
        what=model_words(checkpoint),
        name=(base_model or checkpoint.directory.resolve().name).split("/")[-1],
        width=_width_words(job),
        nature=NATURES.get(job.about["format"], "It is one width of a nested checkpoint"),
        size=size(total),
        share=f"{100 * total / whole:.0f} % of the {float_dtype(checkpoint)} model" if whole else "",
        ends=_ends_words(job),
        here=here,
        before=f" (before it was {changes})" if changes else "",
        rows=rows,
        limits=limits(),
        run=job.exporter.run,
        spec=checkpoint.spec,
        scope=scope_words(checkpoint),
        widths=sorted(Counter(job.plan.values()).items(), reverse=True),
        containers=Counter(job.kinds().values()).most_common(),
        bits_per_weight=job.bits_per_weight(),
        zero_point=job.zero_point,
        loss=job.about.get("loss"),
        base_model=base_model,
        format=job.about["format"],
        engines=job.exporter.engines,
    )


def read_evaluation(file: Path | None, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Read a record of matquant eval; InputError for other files, and for a record of another checkpoint."""
    if file is None:
        return None
    give = "a file that matquant eval --json wrote"
    found = read_json(file, "--measured", give=give, missing=give)
    if not isinstance(found, dict) or not isinstance(found.get("bits_per_weight"), dict):
        raise InputError(f"--measured {file} has no bits_per_weight; give {give}")
    sha256 = manifest_sha256(checkpoint.directory)
    if found.get("checkpoint", sha256) != sha256:
        raise InputError(
            f"--measured {file} was measured on checkpoint {str(found['checkpoint'])[:12]}…, but "
            f"{checkpoint.directory} is {sha256[:12]}…; evaluate this checkpoint"
        )
    return found


def nested_card(
    checkpoint: Checkpoint, *, name: str, base_model: str | None, measured: Mapping[str, Any] | None, has_planes: bool
) -> str:
    """Return README.md of a nested checkpoint on a hub: a row per width, and how to fetch and run it.

    name: of the repository. measured: a record of ``matquant eval --json``. has_planes: they are in the repository.
    """
    found = {row["key"]: row for row in _measured(measured)}
    plain_size, rows = plain_bytes(checkpoint), []
    for bits in CARD_WIDTHS:
        plan = checkpoint.widths(bits)
        rows.append(
            {
                "bits": bits,
                "bits_per_weight": bits_per_weight(checkpoint, plan),
                "size": size(plan_bytes(checkpoint, plan) + plain_size),
                "perplexity": found.get(str(bits), {}).get("perplexity"),
            }
        )
    return _template("nested_card.md.jinja").render(
        what=model_words(checkpoint),
        name=name,
        base_model=base_model,
        rows=rows,
        ends=ends_words(checkpoint),
        scope=scope_words(checkpoint),
        spec=checkpoint.spec,
        has_planes=has_planes,
    )


@functools.cache
def _template(name: str) -> Template:
    environment = Environment(loader=PackageLoader("matquant", "export"), undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = plain
    return environment.get_template(name)


def _body(job: Job) -> dict[str, int]:
    """Return the widths of all weights but embedding and head."""
    return {path: bits for path, bits in job.plan.items() if path not in job.checkpoint.ends}


def _width_words(job: Job) -> str:
    """Return the width of the export: "4 bits", or the range of its plan."""
    widths = sorted(set(_body(job).values()))
    return f"{widths[0]} bits" if len(widths) == 1 else f"a plan of {widths[0]} to {widths[-1]} bits"


def _ends_words(job: Job) -> str:
    """Return how embedding and head are stored."""
    stored = {f"{job.kinds()[path]}, read at int{job.plan[path]}" for path in job.checkpoint.ends}
    return "; ".join(sorted(stored)).replace("dense, read at", "dense, the values of") or "not quantised"


def _measured_as(job: Job) -> str | None:
    """Return the key of an evaluation record under which this export's widths were measured."""
    plan = (job.about.get("measured") or {}).get("plan")
    if isinstance(plan, dict) and plan.get("bits") == dict(job.plan):
        return "plan"
    bits = max(_body(job).values(), default=0)
    return f"{bits}" if bits and dict(job.plan) == job.checkpoint.widths(bits) else None


def _measured(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return a row per measured width: its key in the record, metrics (None: not measured), loss and verdict.

    Losses are log-perplexities above the reference's, in nats; without a reference there are none.
    """
    if evaluation is None:
        return []
    found = {key: evaluation.get(key, {}) for key in ("log_perplexity", "kld", "top1", "task_average")}
    reference = evaluation.get("reference")
    rows = []
    for key, bits in sorted(evaluation["bits_per_weight"].items(), reverse=True):
        metrics = {name: values.get(key) for name, values in found.items()}
        nats = metrics["log_perplexity"]
        loss = None if nats is None or reference is None else nats - reference
        row = {"key": key, "name": f"int{key}" if key.isdigit() else key, "bits_per_weight": bits, **metrics}
        row |= {"perplexity": _perplexity(nats), "reference": _perplexity(reference), "loss": loss}
        rows.append(row | {"verdict": None if loss is None else verdict(loss, base="the float model")})
    return rows


def _perplexity(nats: float | None) -> float | None:
    return None if nats is None else math.exp(min(nats, 700))
