"""What a VLM knows of card scenes: questions about scenes it never saw, answered through plain ``generate``."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vlm4vla.backbones.inputs import Processor, prompt
from vlm4vla.evaluation.interval import wilson
from vlm4vla.skills.questions import Scenes, ask

BATCH = 64
MAX_ANSWER = 3
"""The longest answer is a point, "x3 y7", and the end."""


@torch.no_grad()
def score(
    vlm: Any,
    processor: Processor,
    scenes: Scenes,
    seed: int,
    splits: Mapping[str, str],
    per_scene: int = 4,
    free_share: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Share of exact answers (greedy, whole vocabulary) by task, and of ``where`` and ``what`` by emoji split too.

    Args:
        splits: emoji name -> split.
        per_scene: questions of each scene, drawn with ``seed``.
        free_share: see ``questions.ask``.

    Returns:
        ``task`` or ``task/split`` -> ``{"right", "n", "estimate", "low", "high"}``, the last two Wilson's at 95 %.
    """
    rng = np.random.default_rng(seed)
    asked = [(i, question) for i in range(len(scenes)) for question in ask(scenes, i, per_scene, rng, free_share)]
    right: dict[str, list[bool]] = {}
    vlm.eval()
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        # Left padding: generation needs every prompt to end where its answer begins.
        inputs = processor(
            text=[prompt(processor, question.question) for _, question in part],
            images=[scenes.images[i] for i, _ in part],
            return_tensors="pt",
            padding=True,
            text_kwargs={"padding_side": "left"},
        )
        output = vlm.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(part, answers, strict=True):
            correct = answer.strip() == question.answer
            right.setdefault(question.task, []).append(correct)
            if question.task in ("where", "what"):
                right.setdefault(f"{question.task}/{splits[question.name]}", []).append(correct)
    rows = {}
    for task, results in sorted(right.items()):
        low, high = wilson(sum(results), len(results))
        rows[task] = {"right": sum(results), "n": len(results), "estimate": float(np.mean(results))}
        rows[task] |= {"low": low, "high": high}
    return rows
