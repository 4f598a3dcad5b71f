"""Hugging Face models in torch."""

from typing import Any

Model = Any  # a transformers PreTrainedModel
