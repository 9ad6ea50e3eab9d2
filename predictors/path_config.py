"""Sizes of the routing-path network, and the named ones.

Knows no network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_runtime.errors import ConfigError

__all__ = ["PRESETS", "PathConfig", "preset"]

MOST, MOST_LAYERS = 1 << 16, 64  # sizes come from files too, and nothing is built of absurd ones


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Sizes of the network. Names are T5's.

    Args:
        d_model, d_ff, d_kv, heads: widths of the residual stream, of the feed-forward layers and
            of one head; heads.
        encoder_layers: layers that read the prompt. 0: the decoder reads it, before what was
            generated, and then forecasts the prompt's own routing too.
        decoder_layers: layers that read the generated tokens.
        window: a token attends to so many tokens, itself included.
        prior: the token's own embedding is read by a second head whose logits are added; before
            training the two give the token-id table.
        dropout: share of entries left out in training.
        buckets, max_distance: of the relative position bias.
    """

    d_model: int = 128
    d_ff: int = 512
    d_kv: int = 32
    heads: int = 4
    encoder_layers: int = 0
    decoder_layers: int = 2
    window: int = 128
    prior: bool = True
    dropout: float = 0.0
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in {"prior", "dropout"}:
                continue
            least = 0 if name == "encoder_layers" else 1
            most = MOST_LAYERS if name.endswith("layers") else MOST
            if not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be an integer {least} to {most}, found {value!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be from 0 to below 1, found {self.dropout!r}")
        # Half of the encoder's buckets look back, and half of these are single distances.
        if self.buckets < 4 or self.max_distance <= self.buckets:
            raise ConfigError(
                f"buckets must be 4 or more and fewer than max_distance, found {self.buckets} "
                f"and {self.max_distance}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)


# `expertflow` are the sizes of ExpertFlow (He), arXiv 2410.17954, and of its code: T5-small with
# the width 32 and a prompt that only the encoder sees. `compact` is ours; bench/routing_path.py
# has both on the same rows.
PRESETS: dict[str, PathConfig] = {
    "compact": PathConfig(),
    "expertflow": PathConfig(
        d_model=32,
        d_ff=2048,
        d_kv=64,
        heads=8,
        encoder_layers=6,
        decoder_layers=6,
        window=512,
        prior=False,
        dropout=0.1,
    ),
}


def preset(name: str) -> PathConfig:
    """The sizes of this name; ConfigError with the known names if there are none."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
