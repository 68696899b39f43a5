"""The VLM stage of the embedded VLM, in steps that all run through ``training.loop.fit``.

1. ``Align``: each cell of the projected feature map is classified against the *word embeddings* of the emoji names
   (region-text alignment, as CLIP does for whole pictures) and must tell its own row and column, and block and gripper
   are located. The LLM waits. Without row and column "what is on the left" is learned and "where is X" is not: rotary
   positions steer attention, but what attention then reads says nothing of the place.
2. Questions and answers about the scenes, next-token loss on the answers; everything is trained. First short questions,
   then half of ``where`` and ``point`` as free sentences: mixed from the start, no look-up formed in 2,000 steps.

B batch, N image tokens, L sequence, D hidden size, Q questions of a scene.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm4vla.backbones import tiny
from vlm4vla.backbones.inputs import Processor
from vlm4vla.backbones.treatments import groups
from vlm4vla.backbones.vlm import save_vlm
from vlm4vla.data.augment import JitterAndShift
from vlm4vla.data.mixture import shuffled
from vlm4vla.skills.questions import Scenes, ask

VLM = Any
"""A LlavaForConditionalGeneration; its parts are typed too loosely to be checked."""
QUESTIONS = 8
"""Questions of a scene in one packed sequence: they share the picture's tokens and do not see each other."""
ALIGN_WEIGHT = 0.5
"""Weight of the alignment loss beside the answers' loss in the second step."""
BACKGROUND_WEIGHT = 0.15
"""Most cells show no card."""
MAX_SHIFT = 2
AUGMENT = JitterAndShift(jitter=0.08, shift=MAX_SHIFT)
TOKENS_KEPT = 1 << 15
"""Short questions come again and again; free sentences hardly ever, and would fill the memory."""


class Align(nn.Module):
    """Alignment loss on the projected features, with its own small parameters."""

    def __init__(self, vlm: VLM, name_ids: Tensor):
        super().__init__()
        width = vlm.get_input_embeddings().weight.shape[1]
        self.background = nn.Parameter(torch.randn(width))
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.keypoints = nn.Linear(width, 2 * 3)
        """Per cell, for block and gripper: a logit and an offset inside the cell."""
        self.own_place = nn.Linear(width, 2 * tiny.GRID)
        """Row and column of the cell."""
        self.name_ids: Tensor
        self.register_buffer("name_ids", name_ids)
        rows, columns = torch.meshgrid(torch.arange(tiny.GRID), torch.arange(tiny.GRID), indexing="ij")
        self.place: Tensor
        self.register_buffer("place", torch.stack([columns, rows], -1).reshape(-1, 2))
        self.centres: Tensor
        self.register_buffer("centres", (self.place + 0.5) / tiny.GRID)

    def forward(
        self, features: Tensor, table: Tensor, cells: Tensor, points: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, N, D), word embeddings (V, D), cell labels (B, N) and key points (B, 2, 2; NaN absent)."""
        classes = torch.cat([table[self.name_ids], self.background[None]])
        scale = self.log_scale.exp().clamp(max=40)
        logits = F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).T * scale
        weight = torch.ones(len(classes), device=logits.device)
        weight[-1] = BACKGROUND_WEIGHT
        loss_cells = F.cross_entropy(logits.flatten(0, 1), cells.flatten(), weight=weight)
        raw = self.keypoints(features).unflatten(-1, (2, 3))  # (B, N, 2, 3)
        where = raw[..., 0].softmax(1).unsqueeze(-1) * (self.centres[:, None] + raw[..., 1:] / tiny.GRID)
        own = self.own_place(features).unflatten(-1, (2, tiny.GRID)).flatten(0, 2)
        loss_place = F.cross_entropy(own, self.place.repeat(len(features), 1).flatten())
        there = ~points.isnan().any(-1)
        loss_points = (where.sum(1) - points)[there].abs().mean()
        card = cells < len(classes) - 1
        accuracy = (logits.argmax(-1) == cells)[card].float().mean()
        parts = {"loss_cells": loss_cells.detach(), "loss_points": loss_points.detach()}
        parts |= {"loss_place": loss_place.detach(), "cell_accuracy": accuracy}
        return loss_cells + loss_place + 5 * loss_points, parts


class Stage:
    """Objective of every step (see ``training.loop.Objective``); ``instruct`` switches the questions on."""

    def __init__(self, vlm: VLM, processor: Processor, scenes: Scenes, instruct: bool, free_share: float = 0.0):
        self.vlm, self.processor, self.scenes, self.instruct = vlm, processor, scenes, instruct
        self.free_share = free_share
        name_ids = processor.tokenizer.convert_tokens_to_ids(list(scenes.names))
        self.align = Align(vlm, torch.tensor(name_ids))
        self.module: nn.Module = nn.ModuleDict({"vlm": vlm, "align": self.align})
        parts = groups(vlm)
        for group, parameters in parts.items():
            for parameter in parameters.values():
                parameter.requires_grad_(instruct or group in ("vision", "projector", "word_embedding"))
        self.cells = cell_labels(scenes)
        self.tokens = lru_cache(TOKENS_KEPT)(self._tokens)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": trained, "lr_scale": 1.0}]

    def draw(self, positions: np.ndarray, seed: int) -> np.ndarray:
        return shuffled(len(self.scenes), positions, seed)

    def batch(self, samples: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        draws = AUGMENT.draw(len(samples), rng)
        images = AUGMENT.apply(torch.from_numpy(self.scenes.images[samples]), draws)
        shift = draws["shift"].numpy() / images.shape[1]
        points = np.stack([self.scenes.block_uv[samples], self.scenes.gripper_uv[samples]], 1) + shift[:, None]
        batch = {
            "pixel_values": tiny.pixels(images),
            "cells": torch.from_numpy(self.cells[samples]),
            "points": torch.from_numpy(points.astype(np.float32)),
        }
        return batch | (self._pack(samples, rng) if self.instruct else {})

    def amounts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scenes": torch.tensor(len(batch["cells"]))}

    def loss(self, batch: dict[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = self._means(batch)
        share = len(batch["cells"]) / whole["scenes"]
        return loss * share, {name: value * share for name, value in parts.items()}

    def _means(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Over the scenes of ``batch``."""
        table = self.vlm.get_input_embeddings().weight
        if not self.instruct:
            output: Any = self.vlm.get_image_features(batch["pixel_values"])
            features = torch.stack(list(output.pooler_output))
            return self.align(features, table, batch["cells"], batch["points"])
        output = self.vlm.model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        )
        features = output.image_hidden_states.reshape(len(batch["cells"]), -1, table.shape[1])
        align, parts = self.align(features, table, batch["cells"], batch["points"])
        answered = batch["labels"] >= 0
        logits = self.vlm.lm_head(output.last_hidden_state[answered])
        labels = batch["labels"][answered]
        answer = F.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).float().mean()
        return answer + ALIGN_WEIGHT * align, parts | {"loss_answer": answer.detach(), "answer_accuracy": right}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        save_vlm(self.vlm, self.processor, folder, {n[4:]: v for n, v in state.items() if n.startswith("vlm.")})

    def _tokens(self, question: str, answer: str) -> tuple[list[int], int]:
        """Ids of question, ``<answer>``, answer and ``<eos>``, and the length of the part before the answer."""
        encode = self.processor.tokenizer.encode
        before = encode(f"{question} <answer>", add_special_tokens=False)
        after = encode(f"{answer} <eos>", add_special_tokens=False)
        return before + after, len(before)

    def _pack(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """``<bos>``, the picture, then ``QUESTIONS`` questions that each see the picture and themselves only."""
        tokenizer, count = self.processor.tokenizer, tiny.GRID**2
        prefix = [tokenizer.bos_token_id] + [self.vlm.config.image_token_id] * count
        rows = [
            [self.tokens(q.question, q.answer) for q in ask(self.scenes, i, QUESTIONS, rng, self.free_share)]
            for i in indices
        ]
        length = len(prefix) + max(sum(len(ids) for ids, _ in row) for row in rows)
        shape = (len(rows), length)
        ids = np.full(shape, tokenizer.pad_token_id)
        labels, segment = np.full(shape, -100), np.full(shape, -1)
        position = np.zeros(shape, int)
        ids[:, : len(prefix)], segment[:, : len(prefix)] = prefix, 0
        position[:, : len(prefix)] = np.arange(len(prefix))
        for b, row in enumerate(rows):
            at = len(prefix)
            for k, (tokens, before) in enumerate(row):
                end = at + len(tokens)
                ids[b, at:end], segment[b, at:end] = tokens, k + 1
                position[b, at:end] = np.arange(len(tokens)) + len(prefix)
                labels[b, at + before - 1 : end - 1] = tokens[before:]
                at = end
        seen = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        mask = torch.from_numpy(seen & np.tri(length, dtype=bool))[:, None]
        mask[:, :, range(length), range(length)] = True  # padding sees itself, or its softmax would be empty
        names = ("input_ids", "labels", "position_ids")
        tensors = dict(zip(names, map(torch.from_numpy, (ids, labels, position)), strict=True))
        return tensors | {"attention_mask": mask}


def cell_labels(scenes: Scenes) -> np.ndarray:
    """int64 (N, cells): index of the name whose card covers the cell's centre, else ``len(names)``."""
    grid = (np.arange(tiny.GRID) + 0.5) / tiny.GRID
    u, v = np.tile(grid, tiny.GRID), np.repeat(grid, tiny.GRID)
    labels = np.full((len(scenes), tiny.GRID**2), len(scenes.names))
    for c in range(scenes.cards.shape[1]):
        offset_u = np.abs(u - scenes.card_uv[:, c, :1])
        offset_v = np.abs(v - scenes.card_uv[:, c, 1:])
        # A cell counts where its centre lies within half a card plus a quarter of a cell of the card's centre.
        slack = 0.25 / tiny.GRID
        inside = (offset_u < scenes.card_size[:, c, :1] / 2 + slack) & (
            offset_v < scenes.card_size[:, c, 1:] / 2 + slack
        )
        labels = np.where(inside & (scenes.cards[:, c, None] >= 0), scenes.cards[:, c, None], labels)
    return labels
