"""Where the bundled model and its predictor lie: a small MoE for demonstrations and tests.

Knows its folder only.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_model", "bundled_predictor"]

_FOLDER = Path(__file__).resolve().parent / "data" / "bundled"


def bundled_model() -> str:
    """Path of the bundled model, to be loaded like any other checkpoint."""
    return str(_FOLDER)


def bundled_predictor() -> str:
    """Path of the bundled model's routing-path predictor, for `load_predictor`."""
    return str(_FOLDER / "routing.predictor.safetensors")
