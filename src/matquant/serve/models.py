"""Model names and what they serve: ``NAME`` (the width follows the load), ``NAME:int4``, ``NAME:PLAN``.

A name with a width or a plan is served with exactly that; only ``NAME`` may change its width within an answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matquant.core.spec import Plan
from matquant.serve.errors import ApiError

AUTO = "auto"
TIERS = {"auto": ("default", 0), "default": ("default", 0), "priority": ("priority", 1), "flex": ("flex", -1)}
LISTED = (8, 6, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a server offers. widths: those listed. plans: by name. bits_per_weight, tokens_per_s: by label ("8")."""

    name: str
    max_bits: int
    widths: Sequence[int]
    plans: Mapping[str, Plan] = field(default_factory=dict)
    bits_per_weight: Mapping[str, float] = field(default_factory=dict)
    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    context: int
    created: int

    def ids(self) -> list[str]:
        """Return the names listed, the automatic one first; other widths up to ``max_bits`` are served too."""
        return [
            self.name,
            *(f"{self.name}:int{bits}" for bits in self.widths),
            *(f"{self.name}:{p}" for p in self.plans),
        ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one request is served with. label: "auto", "8" or a plan's name. plan: None for auto."""

    label: str
    plan: Plan | None
    least_bits: int = 1
    priority: int = 0
    tier: str | None = None  # as the answer reports it


def choose(models: Models, values: Mapping[str, Any]) -> Choice:
    """Return what the fields model, bits, plan, min_bits and service_tier ask for. ApiError if they do not agree."""
    named = label_of(models, values["model"])
    labels = {"model": named} if named != AUTO else {}
    if values["bits"] is not None:
        labels["bits"] = str(values["bits"])
    if values["plan"] is not None:
        labels["plan"] = values["plan"]
    if len(set(labels.values())) > 1 or {"bits", "plan"} <= set(labels):
        given = " and ".join(f"{key}={values[key]!r}" for key in labels)
        raise ApiError(f"{given} exclude each other; use one of them", param=list(labels)[-1])
    label = next(iter(labels.values()), AUTO)
    plan = _plan(models, label, param="bits" if values["bits"] is not None else "plan")
    least = values["min_bits"] or 1
    if least > models.max_bits:
        raise ApiError(
            f"min_bits={least} exceeds --max-bits {models.max_bits} of this server; use less", param="min_bits"
        )
    asked = [] if plan is None else [bits for bits in (plan.default, *plan.bits.values()) if bits is not None]
    if asked and min(asked) < least:
        raise ApiError(
            f"this request asks for int{min(asked)}, which is below min_bits={least}; leave one of them out",
            param="min_bits",
        )
    tier, priority = TIERS[values["service_tier"] or AUTO]
    if tier == "priority":
        least = max(least, *models.widths)
    return Choice(
        label=label, plan=plan, least_bits=least, priority=priority, tier=tier if values["service_tier"] else None
    )


def label_of(models: Models, name: str | None) -> str:
    """Return the label of a model's name: "auto", "8" or a plan's name. ApiError if it is not served."""
    if name in (None, models.name, f"{models.name}:{AUTO}"):
        return AUTO
    own, _, rest = str(name).rpartition(":")
    if own == models.name:
        width = re.fullmatch(r"int([1-8])", rest)
        if width and int(width[1]) <= models.max_bits:
            return width[1]
        if rest in models.plans:
            return rest
    shown = ", ".join(models.ids())
    raise ApiError(
        f"the model {name!r} does not exist; use one of {shown}", status=404, param="model", code="model_not_found"
    )


def _plan(models: Models, label: str, *, param: str) -> Plan | None:
    if label == AUTO:
        return None
    if label in models.plans:
        return models.plans[label]
    if not label.isdigit():
        known = ", ".join(models.plans) or "none was given by --plan"
        raise ApiError(f"plan={label!r} is not known; plans of this server: {known}", param=param)
    if int(label) > models.max_bits:
        raise ApiError(f"bits={label} exceeds --max-bits {models.max_bits} of this server; use less", param=param)
    return Plan(default=int(label))


def describe(models: Models, name: str) -> dict[str, Any]:
    """Return the entry of /v1/models for a name that a request may give. ApiError if it is not served."""
    label = label_of(models, name)
    return {
        "id": name,
        "object": "model",
        "created": models.created,
        "owned_by": "matquant",
        "root": models.name,
        "parent": None if name == models.name else models.name,
        "max_model_len": models.context,
        "permission": [],
        "matquant": _facts(models, label),
    }


def _facts(models: Models, label: str) -> dict[str, Any]:
    """Return the width of a label, its bits per weight and its speed; of "auto" those of the widest width."""
    kind, value = ("bits", int(label)) if label.isdigit() else ("bits" if label == AUTO else "plan", label)
    label = str(models.max_bits) if label == AUTO else label
    bits, speed = models.bits_per_weight.get(label), models.tokens_per_s.get(label)
    return {
        kind: value,
        "bits_per_weight": None if bits is None else round(bits, 3),
        "tokens_per_s": None if speed is None else round(speed, 2),
    }
