"""Imitation learning of a policy: the objective behind ``vlm4vla train``. B samples of a batch, N frames (``Sources``).

Frames have the action loss. Conversations, where there are any beside the demonstrations, have the language loss of the
same VLM: its own forward with its LM head, on answers' tokens only.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla.backbones import treatments
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import parameters_hash
from vlm4vla.data.augment import Draws, augmentation
from vlm4vla.data.mixture import Mixture, shuffled
from vlm4vla.data.sources import Sources
from vlm4vla.data.windows import windows
from vlm4vla.heads.mlp import action_loss
from vlm4vla.policy import VLA, Policy, untrained, versions
from vlm4vla.spec import RunSpec, Runtime, content_hash
from vlm4vla.training import check, memory, processes
from vlm4vla.training.compiled import compiled
from vlm4vla.training.examine import audit, on_meta
from vlm4vla.training.forecast import gib_needed
from vlm4vla.training.loop import fit

LANGUAGE = "language."
"""Prefix of a batch's tensors that are of conversations."""
FILLER = -1
"""Source of a sample that counts nothing: processes that share a model must all run all of it, so a part of a batch
without a frame, or without a conversation, is given the first one there is."""


class Imitation:
    """Predict the recorded chunk from one picture and the instruction (see ``training.loop.Objective``)."""

    def __init__(
        self,
        policy: Policy,
        sources: Sources,
        mixture: Mixture | None = None,
        cached: bool = True,
        one_shape: bool = False,
    ):
        """``mixture``: of several sources. ``one_shape``: every prompt is padded to the longest."""
        self.policy, self.sources, self.spec = policy, sources, policy.spec
        self.vla = policy.vla
        self.module: nn.Module = policy.vla
        self.augment = augmentation(self.spec.training)
        self.pictures = sources.pictures(policy.image_size, cached)
        self.mixture = mixture
        # Once, before batches are made in a thread: a tokenizer may not be used by two threads at a time.
        inputs, size = self.vla.backbone.inputs, policy.image_size
        inputs.rows("", size, size)
        if one_shape:
            tasks = {task for each in sources.sets for task in each.tasks}
            inputs.length = max(len(inputs.rows(task, size, size)["input_ids"]) for task in tasks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        vlm = self.vla.backbone.vlm
        groups = {"head": self.vla.new_parameters(), **treatments.groups(vlm)}
        scales = treatments.lr_scales(vlm, self.spec.treated, self.spec.training)
        return [
            {"params": [p for p in groups[name].values() if p.requires_grad], "lr_scale": scale}
            for name, scale in scales.items()
        ]

    def draw(self, positions: np.ndarray, seed: int) -> np.ndarray:
        if self.mixture is None:
            return shuffled(self.sources.num_frames, positions, seed)
        source, within = self.mixture.draw(positions, seed)
        return self.sources.first[source] + within

    def batch(self, samples: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        draws = self.augment.draw(len(samples), rng)
        frames = samples < self.sources.num_frames
        batch = self._frames(samples[frames], {name: value[torch.from_numpy(frames)] for name, value in draws.items()})
        if self.sources.conversations:
            records = self._records(samples[~frames])
            batch |= {f"{LANGUAGE}{name}": value for name, value in records.items()}
        return batch

    def _frames(self, frames: np.ndarray, draws: Draws) -> dict[str, Tensor]:
        if none := not len(frames):
            frames, draws = np.array([0]), self.augment.draw(1, np.random.default_rng(0))
        inputs = self.vla.backbone.encode(self.pictures(frames), self.sources.instructions(frames))
        actions, valid = windows(self.sources, frames, self.spec.head.chunk)
        target = self.policy.actions.normalize(actions).astype(np.float32)
        batch = {f"inputs.{name}": value for name, value in inputs.items()}
        batch |= {f"augment.{name}": value for name, value in draws.items()}
        batch |= {"target": torch.from_numpy(target), "valid": torch.from_numpy(valid & (not none))}
        if self.policy.state is not None:
            batch["state"] = torch.from_numpy(self.policy.state.normalize(self.sources.states[frames]))
        return batch | self._sources(frames, none)

    def _records(self, samples: np.ndarray) -> dict[str, Tensor]:
        if none := not len(samples):
            samples = np.array([self.sources.num_frames])
        batch = self.vla.backbone.encode_answers(*self.sources.records(samples, self.policy.image_size))
        if none:
            batch["labels"].fill_(-100)
        return batch | self._sources(samples, none)

    def _sources(self, samples: np.ndarray, none: bool) -> dict[str, Tensor]:
        """The number of each sample's source."""
        if self.mixture is None:
            return {}
        source = self.sources.source(samples)
        return {"source": torch.from_numpy(np.full_like(source, FILLER) if none else source)}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The VLM's inputs of the frames, their pictures augmented where the batch is."""
        inputs = _named(batch, "inputs.")
        return inputs | {"images": self.augment.apply(inputs["images"], _named(batch, "augment."))}

    def amounts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Valid ``steps`` of frames and tokens of ``answers``; in a mixture also what each source has, and ``samples``
        of all."""
        held = {"steps": batch["valid"].sum(1)}
        if self.sources.conversations:
            held["answers"] = (batch[f"{LANGUAGE}labels"] >= 0).sum(1)
        amounts = {name: values.sum() for name, values in held.items()}
        if self.mixture is None:
            return amounts
        each = torch.cat([*held.values()])
        source = torch.cat([batch[name] for name in ("source", f"{LANGUAGE}source") if name in batch])
        amounts |= {f"of/{name}": each[source == k].sum() for k, name in enumerate(self.sources.names)}
        return amounts | {"samples": (source != FILLER).sum()}

    def loss(self, batch: dict[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over valid steps, and ``language_weight`` times the mean over answers' tokens."""
        pose, gripper = self.vla(self.inputs(batch), batch.get("state"))
        weight, target, valid = self.spec.head.gripper_weight, batch["target"], batch["valid"]
        loss, terms = action_loss(pose, gripper, target, valid, weight, whole["steps"].clamp(min=1))
        if self.mixture is None:
            return loss, terms
        terms = {name: _or_nothing(value, whole["steps"]) for name, value in terms.items()}
        first = len(self.sources.sets)
        with torch.no_grad():
            for k, name in enumerate(self.sources.names[:first]):
                own = batch["source"] == k
                part, _ = action_loss(pose, gripper, target, valid & own[:, None], weight, whole[f"of/{name}"])
                terms |= {f"loss/{name}": part, f"share/{name}": own.sum() / whole["samples"]}
        if self.sources.conversations:
            talks = _named(batch, LANGUAGE)
            source = talks.pop("source")
            losses = self.vla.backbone.answer_losses(talks)
            language = losses.sum() / whole["answers"].clamp(min=1)
            loss = loss + self.spec.training.language_weight * language
            terms["loss_language"] = _or_nothing(language.detach(), whole["answers"])
            for k, name in enumerate(self.sources.names[first:], first):
                own = source == k
                terms[f"loss/{name}"] = (losses.detach() * own).sum() / whole[f"of/{name}"]
                terms[f"share/{name}"] = own.sum() / whole["samples"]
        return loss, terms

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        self.policy.save(folder, state)


def _named(batch: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def _or_nothing(mean: Tensor, amount: Tensor) -> Tensor:
    """NaN for a mean over nothing."""
    return mean.where(amount > 0, torch.nan)


def train(spec: RunSpec, data_folder: Path, out: Path, runtime: Runtime) -> None:
    """Train ``spec`` on the demonstrations in ``data_folder`` and what ``data.mixture`` puts beside them: resumes, and
    does nothing when ``out`` is finished.

    The result is the policy folder ``out/policy``, whose card says what was run.

    Raises:
        UserError: unreadable data, an unknown backbone, what ``training.check`` refuses, or ``out`` belonging to
            another run.
    """
    check.execution(spec.training, runtime, processes.number())
    torch.set_num_threads(runtime.threads)
    sources = Sources.open(spec.data, data_folder)
    demonstrations = sources.sets[0]
    recorded_size = demonstrations.camera_size("main")
    vla, backbone_hash = _begin(spec, sources.states.shape[1] if spec.proprioception else 0)
    vlm, processor = vla.backbone.vlm, vla.backbone.processor
    material = check.material(spec, sources, vla.backbone, runtime.compile)
    card = {
        "run_id": spec.run_id,
        "versions": versions(),
        "data_hash": sources.content_hash,
        "backbone_hash": backbone_hash,
        "parameters": treatments.count(vlm),
        "new_parameters": sum(p.numel() for p in vla.new_parameters().values()),
        "episodes": sources.num_episodes,
        "frames": sources.num_frames,
        "fraction_clipped": material.actions.fraction_clipped(sources.actions, sources.frame_weights),
        "sources": sources.described(),
    }
    if runtime.gradient_checkpointing:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    size = material.image_size
    policy = Policy(vla, spec, material.convention, material.actions, material.state, size, card)
    audited = audit(vla, processor, spec, size)
    card["audit"] = audited.to_dict()
    out.mkdir(parents=True, exist_ok=True)
    # By content: the same demonstrations under another path are the same run.
    recipe = spec.model_dump(mode="json", exclude={"data", "backbone"})
    resized = [size] if recorded_size != (size, size) else []
    identity = content_hash([recipe, sources.content_hash, backbone_hash, *resized])
    needed = partial(gib_needed, vla, audited.sizes, spec, runtime, processes.number(), sources, material)
    told = memory.told(needed, spec.training.batch_size // processes.number(), runtime)
    with told, compiled(vla, runtime):
        objective = Imitation(policy, sources, material.mixture, runtime.cache, runtime.compile)
        fit(objective, spec.training, spec.seed, out, runtime, identity)


def _begin(spec: RunSpec, state_size: int) -> tuple[VLA, str]:
    """The policy before its first step, and the hash of its VLM's weights.

    Of several processes only the first reads weights, or the machine's memory would have to hold them that often; the
    others have neither until ``processes.place``.
    """
    if os.environ.get("RANK", "0") != "0":
        return on_meta(spec, state_size)[0], ""
    vlm, processor = load_vlm(spec.backbone)
    backbone_hash = parameters_hash(vlm)
    torch.manual_seed(spec.seed)
    return untrained(vlm, processor, spec, state_size), backbone_hash
