"""The record and the model card of an export."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from matquant.export.job import Job
from matquant.format.read import manifest_sha256

RECORD = "matquant_export.json"


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
    """Return README.md: front matter for hubs, the recipe, sizes and measurements."""
    environment = Environment(loader=PackageLoader("matquant", "export"), undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("card.md.jinja").render(
        spec=job.checkpoint.spec,
        widths=sorted(Counter(job.plan.values()).items(), reverse=True),
        containers=Counter(job.kinds().values()).most_common(),
        bits_per_weight=job.bits_per_weight(),
        zero_point=job.zero_point,
        loss=job.about.get("loss"),
        measured=_measured(job.about.get("measured")),
        base_model=job.about.get("base_model"),
        format=job.about["format"],
        engines=job.exporter.engines,
        architecture=", ".join(job.checkpoint.config.get("architectures") or ["a causal language model"]),
    )


def _measured(
    evaluation: Mapping[str, Any] | None,
) -> list[tuple[str, float, float | None, float | None, float | None]]:
    """Return (width, bits per weight, log-perplexity, KL divergence, task average) of an evaluation record."""
    if evaluation is None:
        return []
    losses, klds, averages = (evaluation.get(key, {}) for key in ("log_perplexity", "kld", "task_average"))
    return [
        (f"int{name}" if name.isdigit() else name, size, losses.get(name), klds.get(name), averages.get(name))
        for name, size in evaluation["bits_per_weight"].items()
    ]
