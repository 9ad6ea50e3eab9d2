"""Where the bundled model lies: a small MoE trained for demonstrations and tests.

Knows its folder only.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_model"]


def bundled_model() -> str:
    """Path of the bundled model, to be loaded like any other checkpoint."""
    return str(Path(__file__).resolve().parent / "data" / "bundled")
