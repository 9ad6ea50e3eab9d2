"""What was published about RICE, to stand beside what was measured here.

Knows no measurement of ours. None of these figures was read in the paper's own text; each says
where it was read.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DOUBTS", "PAPER", "PUBLISHED", "Published"]

PAPER = "RICE (Wang et al., NeurIPS 2025, arXiv 2505.14681)"
_NOTES, _REVIEW = "third-party notes", "OpenReview review"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure; accuracies in percent."""

    what: str
    without: str
    steered: str
    read_in: str
    doubt: str = ""


PUBLISHED = (
    Published(
        what="DeepSeek-R1, AIME24",
        without="73.3",
        steered="83.3",
        read_in=_NOTES,
        doubt="3 problems of 30; beta and experts were chosen on these same problems",
    ),
    Published(
        what="… tokens; thoughts",
        without="9,219; 12.0",
        steered="8,317; 10.2",
        read_in=_NOTES,
    ),
    Published(
        what="DeepSeek-R1, AIME25",
        without="63.3",
        steered="73.3",
        read_in=_NOTES,
        doubt="3 problems of 30",
    ),
    Published(
        what="Qwen3-235B-A22B, AIME25",
        without="66.7",
        steered="73.3",
        read_in=_NOTES,
        doubt="2 problems of 30",
    ),
    Published(
        what="DeepSeek-R1, mean of other domains", without="73.4", steered="75.6", read_in=_NOTES
    ),
    Published(
        what="AIME mean: prompt 75.0, TIP 76.7",
        without="",
        steered="78.7",
        read_in=_NOTES,
        doubt="83.3 and 73.3 have the mean 78.3",
    ),
    Published(
        what="GPQA physics, experts of that domain",
        without="91.9",
        steered="89.5",
        read_in=_REVIEW,
        doubt="steering made it worse",
    ),
    Published(
        what="GPQA biology, experts of that domain",
        without="79.0",
        steered="73.9",
        read_in=_REVIEW,
        doubt="steering made it worse",
    ),
    Published(what="ArenaHard, 50 prompts", without="91", steered="92 to 94", read_in=_NOTES),
)

DOUBTS = (
    "two models, single runs, no error bars; two experts at beta 64, chosen from 2 to 512 on "
    "AIME24, where 4, 32 and 128 gave the same; steering random experts is not among what was found"
)
