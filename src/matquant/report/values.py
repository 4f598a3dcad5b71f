"""Read values from JSON files for the report, and format numbers; anything but finite numbers is left out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.system.errors import InputError
from matquant.system.files import read_json


def read_object(file: Path, flag: str, key: str = "") -> dict[str, Any]:
    """Read a JSON object; if ``key`` is given, it must hold an object of that name."""
    what = f'a JSON file with "{key}"' if key else "a JSON file"
    values = read_json(file, flag, give=what)
    if not isinstance(values, dict) or (key and not isinstance(values.get(key), dict)):
        found = f'an object with "{key}"' if key else "an object"
        raise InputError(f"{flag} {file} is not {found}; give {what}")
    return values


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def numbers(values: Any) -> dict[str, float]:
    """Return the entries of a JSON object that are numbers; none for anything else."""
    return {str(key): value for key, value in values.items() if is_number(value)} if isinstance(values, dict) else {}


def is_width(name: str) -> bool:
    """Return whether a record's key names a uniform width, 1..8."""
    return len(name) == 1 and name in "12345678"


def fixed(value: Any, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if is_number(value) else ""


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def width_order(width: str) -> tuple[bool, int, str]:
    return not width.isdigit(), -int(width) if width.isdigit() else 0, width


def plan_name(record: Mapping[str, Any]) -> str:
    plan = record.get("plan")
    return str(plan.get("name", "plan")) if isinstance(plan, dict) else "plan"
