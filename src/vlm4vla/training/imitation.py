"""Imitation learning of a policy: the objective behind ``vlm4vla train``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla.backbones import treatments
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import parameters_hash
from vlm4vla.data.augment import augmentation
from vlm4vla.data.cache import pictures
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.mixture import shuffled
from vlm4vla.data.normalize import Normalizer
from vlm4vla.data.windows import windows
from vlm4vla.heads.mlp import action_loss
from vlm4vla.policy import VLA, Policy, untrained, versions
from vlm4vla.spec import RunSpec, Runtime, content_hash
from vlm4vla.training import memory
from vlm4vla.training.examine import audit, on_meta
from vlm4vla.training.forecast import gib_needed
from vlm4vla.training.loop import fit


class Imitation:
    """Predict the recorded chunk from one picture and the instruction (see ``training.loop.Objective``)."""

    def __init__(self, policy: Policy, dataset: Dataset, cached: bool = True):
        self.policy, self.dataset, self.spec = policy, dataset, policy.spec
        self.vla = policy.vla
        self.module: nn.Module = policy.vla
        self.augment = augmentation(self.spec.training)
        self.pictures = pictures(dataset, policy.image_size, cached)
        # Once, before batches are made in a thread: a tokenizer may not be used by two threads at a time.
        self.vla.backbone.inputs.rows("", policy.image_size, policy.image_size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        vlm = self.vla.backbone.vlm
        groups = {"head": self.vla.new_parameters(), **treatments.groups(vlm)}
        scales = treatments.lr_scales(vlm, self.spec.treated, self.spec.training)
        return [
            {"params": [p for p in groups[name].values() if p.requires_grad], "lr_scale": scale}
            for name, scale in scales.items()
        ]

    def draw(self, positions: np.ndarray, seed: int) -> np.ndarray:
        return shuffled(self.dataset.num_frames, positions, seed)

    def batch(self, samples: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        inputs = self.vla.backbone.encode(self.pictures(samples), self.dataset.instructions(samples))
        actions, valid = windows(self.dataset, samples, self.spec.head.chunk)
        target = self.policy.actions.normalize(actions).astype(np.float32)
        batch = {f"inputs.{name}": value for name, value in inputs.items()}
        batch |= {f"augment.{name}": value for name, value in self.augment.draw(len(samples), rng).items()}
        batch |= {"target": torch.from_numpy(target), "valid": torch.from_numpy(valid)}
        if self.policy.state is not None:
            batch["state"] = torch.from_numpy(self.policy.state.normalize(self.dataset.states[samples]))
        return batch

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The VLM's inputs, their pictures augmented where the batch is."""
        inputs = _named(batch, "inputs.")
        return inputs | {"images": self.augment.apply(inputs["images"], _named(batch, "augment."))}

    def amounts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"steps": batch["valid"].sum()}

    def loss(self, batch: dict[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pose, gripper = self.vla(self.inputs(batch), batch.get("state"))
        weight = self.spec.head.gripper_weight
        return action_loss(pose, gripper, batch["target"], batch["valid"], weight, whole["steps"])

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        self.policy.save(folder, state)


def _named(batch: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def train(spec: RunSpec, data_folder: Path, out: Path, runtime: Runtime) -> None:
    """Train ``spec`` on the data set in ``data_folder`` into ``out``: resumes, and does nothing when finished.

    The result is the policy folder ``out/policy``, whose card says what was run.

    Raises:
        UserError: unreadable data, an unknown backbone, or ``out`` belonging to another run.
    """
    torch.set_num_threads(runtime.threads)
    dataset = Dataset.open(data_folder)
    recorded_size = dataset.camera_size("main")
    vla, backbone_hash = _begin(spec, dataset.states.shape[1] if spec.proprioception else 0)
    vlm, processor = vla.backbone.vlm, vla.backbone.processor
    actions = Normalizer.fit(dataset.actions, mode=spec.head.normalize, bound=spec.head.bound)
    card = {
        "run_id": spec.run_id,
        "versions": versions(),
        "data_hash": dataset.content_hash,
        "backbone_hash": backbone_hash,
        "parameters": treatments.count(vlm),
        "new_parameters": sum(p.numel() for p in vla.new_parameters().values()),
        "episodes": dataset.num_episodes,
        "frames": dataset.num_frames,
        "fraction_clipped": actions.fraction_clipped(dataset.actions),
    }
    if runtime.gradient_checkpointing:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    state = Normalizer.fit(dataset.states, gripper=False) if spec.proprioception else None
    size = spec.data.image_size or dataset.image_size
    policy = Policy(vla, spec, dataset.convention, actions, state, size, card)
    audited = audit(vla, processor, spec, size)
    card["audit"] = audited.to_dict()
    out.mkdir(parents=True, exist_ok=True)
    # By content: the same demonstrations under another path are the same run.
    recipe = spec.model_dump(mode="json", exclude={"data", "backbone"})
    resized = [size] if recorded_size != (size, size) else []
    identity = content_hash([recipe, dataset.content_hash, backbone_hash, *resized])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    samples = spec.training.batch_size // processes
    with memory.told(lambda: gib_needed(vla, audited.sizes, runtime, processes), samples, runtime):
        fit(Imitation(policy, dataset, runtime.cache), spec.training, spec.seed, out, runtime, identity)


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
