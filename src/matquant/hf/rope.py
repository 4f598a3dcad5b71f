"""Rotary frequencies: default, linear (position interpolation), llama3 and yarn (arXiv 2309.00071).

All in float32, as transformers computes them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from matquant.system.errors import InputError

Rope = tuple[np.ndarray, float]  # float32 [head_dim / 2] radians per position; factor of sines and cosines


def frequencies(given: Mapping[str, Any], head_dim: int, values: Mapping[str, Any], where: object) -> Rope:
    """Return the frequencies of ``given``, an entry of config.json; InputError for types that we do not support.

    values: config.json, for the context.
    """
    rope = {key: value for key, value in given.items() if value is not None or key == "factor"}  # yarn has a default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(
            f"{where} has rotary positions of type {kind!r}, partial_rotary_factor "
            f"{rope.get('partial_rotary_factor', 1.0)}, but the engine supports "
            "only default, linear, llama3 and yarn with partial_rotary_factor 1"
        )
    try:
        with np.errstate(all="ignore"):
            found, scale = _compute(kind, rope, head_dim, values)
    except KeyError as error:
        raise InputError(f"{where} has {kind} rotary positions without {error}; repair config.json") from None
    except (ArithmeticError, ValueError):  # from logarithms
        found, scale = np.full(1, np.nan), math.nan
    if not (np.isfinite(found).all() and math.isfinite(scale)):
        facts = ", ".join(f"{key}={value}" for key, value in rope.items())
        raise InputError(f"{where} has {kind} rotary positions that are not numbers ({facts}); repair config.json")
    return found, scale


def _compute(kind: str, rope: Mapping[str, Any], head_dim: int, values: Mapping[str, Any]) -> Rope:
    """Return frequencies and factor of a type; KeyError for a missing key, ArithmeticError or NaN for wrong values."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float32(rope["rope_theta"]) ** exponents
    if kind == "linear":
        return 1 / powers / np.float32(rope["factor"]), 1.0
    if kind == "llama3":
        return _llama3(1 / powers, rope), 1.0
    if kind == "yarn":
        return _yarn(powers, rope, head_dim, values)
    return 1 / powers, 1.0


def _llama3(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Divide low frequencies by ``factor``, keep high ones, and blend smoothly in between."""
    factor, low, high = (np.float32(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope["original_max_position_embeddings"]
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    result = np.where(wavelengths > context / low, frequencies / factor, frequencies)
    inside = (wavelengths >= context / high) & (wavelengths <= context / low)
    return np.where(inside, between, result).astype(np.float32)


def _yarn(powers: np.ndarray, rope: Mapping[str, Any], head_dim: int, values: Mapping[str, Any]) -> Rope:
    """Scale NTK by parts: keep fast dimensions, interpolate slow ones, with a ramp in between; sharpen attention."""
    trained = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    factor = rope["factor"] or values["max_position_embeddings"] / trained

    def dimension(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    frequencies = (1 / (np.float32(factor) * powers)) * ramp + (1 / powers) * (1 - ramp)
    scale = rope.get("attention_factor")
    if scale is None:
        weights = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = sharpness(weights[0]) / sharpness(weights[1]) if weights[0] and weights[1] else sharpness(1.0)
    return frequencies.astype(np.float32), float(scale)
