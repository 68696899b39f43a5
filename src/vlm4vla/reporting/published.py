"""Published directions beside ours: agree, disagree or undecided, as the intervals decide.

Numbers of other robots and simulators are not compared with ours, only directions: which treatment did better.
``published.csv`` holds the ablation table of VLM4VLA (arXiv 2601.03309; exact values of the paper's tables).
GrinningFace (arXiv 2511.06619) publishes directions without numbers.
"""

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vlm4vla.reporting.tables import Results, setting, split
from vlm4vla.studies import stats
from vlm4vla.studies.stats import Difference

CSV = Path(__file__).with_name("published.csv")
MARGIN = 0.10
"""What counts as "no difference": a difference surely below 10 points. Our choice; the papers name none."""
Direction = Literal["lower", "higher", "similar"]
Verdict = Literal["agree", "disagree", "undecided", "not run"]


@dataclass(frozen=True)
class Claim:
    """``metric`` of the first (treatment, split) is ``direction`` against the second's. A split of None: each one."""

    source: str
    text: str
    first: tuple[str, str | None]
    second: tuple[str, str | None]
    metric: str
    direction: Direction
    published: str
    """The numbers behind it, where there are any."""


@dataclass(frozen=True)
class Comparison:
    claim: Claim
    where: str
    """Ours: setting and splits."""
    difference: Difference | None
    verdict: Verdict


GRINNINGFACE = "GrinningFace, arXiv 2511.06619"
NO_NUMBER = "direction only"
DIRECTIONS = (
    Claim(
        GRINNINGFACE,
        "Full fine-tuning forgets emoji semantics: unseen emojis are recognised less often than seen ones",
        ("full", "val"),
        ("full", "train"),
        "recognition",
        "lower",
        NO_NUMBER,
    ),
    Claim(
        GRINNINGFACE,
        "Freezing the VLM keeps the prior: unseen emojis are recognised more often than after full fine-tuning",
        ("freeze_vlm", "val"),
        ("full", "val"),
        "recognition",
        "higher",
        NO_NUMBER,
    ),
    Claim(
        GRINNINGFACE,
        "Freezing the VLM costs motor skill",
        ("freeze_vlm", "train"),
        ("full", "train"),
        "execution",
        "lower",
        NO_NUMBER,
    ),
    Claim(
        GRINNINGFACE,
        "LoRA keeps more of the prior than full fine-tuning",
        ("lora", "val"),
        ("full", "val"),
        "recognition",
        "higher",
        NO_NUMBER,
    ),
    Claim(
        GRINNINGFACE,
        "Co-training with vision-language data keeps the prior",
        ("cotrain", "val"),
        ("full", "val"),
        "recognition",
        "higher",
        NO_NUMBER,
    ),
)
TEXTS: dict[str, tuple[Direction, str]] = {
    "freeze_vision": ("lower", "Freezing the vision encoder lowers success"),
    "scratch": ("lower", "Training from scratch lowers success"),
    "freeze_word_embedding": ("similar", "Freezing the word embedding changes little"),
}


@lru_cache
def published() -> list[dict[str, str]]:
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def claims() -> list[Claim]:
    """VLM4VLA's ablations against full fine-tuning, then GrinningFace's directions."""
    values = {(row["model"], row["benchmark"], row["treatment"]): float(row["value"]) for row in published()}
    found = []
    for treatment, (direction, text) in TEXTS.items():
        pairs = [
            (values[model, benchmark, "full"], value)
            for (model, benchmark, name), value in values.items()
            if name == treatment
        ]
        lower = sum(value < full for full, value in pairs)
        numbers = f"lower in {lower} of {len(pairs)} pairs of model and benchmark"
        if direction == "similar":
            numbers = (
                f"{min((v - f) / f for f, v in pairs):+.0%} to {max((v - f) / f for f, v in pairs):+.0%}, relative"
            )
        source = "VLM4VLA, arXiv 2601.03309"
        found.append(Claim(source, text, (treatment, None), ("full", None), "success", direction, numbers))
    return [*found, *DIRECTIONS]


def judge(direction: Direction, difference: Difference) -> Verdict:
    """Agree only where the whole interval lies on the published side, disagree only where all of it does not."""
    if direction == "similar":
        if difference.low > -MARGIN and difference.high < MARGIN:
            return "agree"
        return "disagree" if difference.low > MARGIN or difference.high < -MARGIN else "undecided"
    low, high = (difference.low, difference.high) if direction == "higher" else (-difference.high, -difference.low)
    if low > 0:
        return "agree"
    return "disagree" if high < 0 else "undecided"


def compare(results: Results) -> list[Comparison]:
    """Every claim with what this study says of it, a line for each setting and split that speaks to it."""
    lines = []
    for claim in claims():
        ours = [line for where in results.settings for line in _ours(results, claim, where)]
        lines += ours or [Comparison(claim, "", None, "not run")]
    return lines


def _ours(results: Results, claim: Claim, where: str) -> list[Comparison]:
    by_split = {split(name): name for name in results.protocol_names if setting(name) == where}
    pairs = [(claim.first[1], claim.second[1])] if claim.first[1] else [(name, name) for name in by_split]
    lines = []
    for first_split, second_split in pairs:
        if first_split not in by_split or second_split not in by_split:
            continue
        first = results.rate(claim.first[0], by_split[first_split], claim.metric)
        second = results.rate(claim.second[0], by_split[second_split], claim.metric)
        if first and second:
            gap = stats.difference(first, second)
            splits = first_split if first_split == second_split else f"{first_split} against {second_split}"
            lines.append(Comparison(claim, f"{where}, {splits}", gap, judge(claim.direction, gap)))
    return lines
