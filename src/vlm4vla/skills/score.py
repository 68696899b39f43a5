"""What an embedded VLM knows: questions about scenes it never saw, answered through plain transformers ``generate``."""

from typing import Any

import numpy as np
import torch

from vlm4vla.backbones.vlm import Processor, prompt
from vlm4vla.skills.questions import Scenes, ask
from vlm4vla.studies.stats import Rate, rate

BATCH = 64


@torch.no_grad()
def score(vlm: Any, processor: Processor, scenes: Scenes, seed: int, per_scene: int = 4) -> dict[str, Rate]:
    """Task -> share of exact answers (greedy, whole vocabulary), with its Wilson interval.

    Args:
        per_scene: questions of each scene, drawn with ``seed``.
    """
    rng = np.random.default_rng(seed)
    asked = [(i, question) for i in range(len(scenes)) for question in ask(scenes, i, per_scene, rng)]
    right: dict[str, list[bool]] = {}
    vlm.eval()
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        texts = [prompt(processor, question.question) for _, question in part]
        # Left padding, as generation needs every prompt to end where the answer begins.
        inputs = processor(
            text=texts,
            images=[scenes.images[i] for i, _ in part],
            return_tensors="pt",
            padding=True,
            text_kwargs={"padding_side": "left"},
        )
        output = vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(part, answers, strict=True):
            right.setdefault(question.task, []).append(answer.strip() == question.answer)
    return {task: rate(results) for task, results in sorted(right.items())}
