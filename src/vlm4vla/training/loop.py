"""The one training loop: policies and the VLM stage alike. Read it from top to bottom.

All randomness of step ``s`` (which samples, which augmentation, dropout) derives from ``(seed, s)``, and the learning
rate from ``s``. So a checkpoint needs only the step, the trained parameters, their average and the optimiser's moments,
and a run that is killed at any moment and started again ends with the weights of an uninterrupted one.
"""

import json
import math
import shlex
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import patch_environment
from torch import Tensor, nn
from tqdm import tqdm

from vlm4vla.errors import UserError
from vlm4vla.files import write_text
from vlm4vla.locks import locked
from vlm4vla.metrics import read_metrics
from vlm4vla.policy import torch_device
from vlm4vla.spec import Runtime, TrainSpec
from vlm4vla.training import checkpoint

LOG_EVERY = 10
"""Steps between rows of ``metrics.jsonl``; the device is synchronised only then."""
FINISHED = "finished.json"
"""Says whose ``policy`` it stands beside. Not inside: an exported folder holds what the objective exports."""


class Objective(Protocol):
    """What the loop trains: it asks for a batch, then for the loss on it."""

    num_samples: int

    @property
    def module(self) -> nn.Module:
        """Holds every parameter; those with ``requires_grad`` are trained."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with the keys ``params`` and ``lr_scale``; a partition of the trained parameters."""
        ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """The samples (B,) as named tensors on the CPU."""
        ...

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss, and detached scalars worth logging."""
        ...

    def export(self, folder: Path) -> None:
        """Write what the training was for into an empty folder."""
        ...


def fit(objective: Objective, spec: TrainSpec, seed: int, out: Path, runtime: Runtime, identity: str) -> None:
    """Train to ``spec.steps`` and export to ``out/policy``; start again to resume.

    Writes ``metrics.jsonl`` (one row each ``LOG_EVERY`` steps), ``checkpoint.safetensors`` (until it is finished),
    ``policies/step-*`` (where ``spec.checkpoints`` > 1) and at last ``policy``, with what it is of in
    ``finished.json``.

    Args:
        identity: what this training is of; a checkpoint or policy of another one in ``out`` is refused.

    Raises:
        UserError: loss, gradient or weights are not finite (the batch is saved), ``out`` belongs to another run, or
            another process trains into it, or device or tracker is not there.
    """
    with locked(out / "training.lock", "training"):
        if (out / "policy").is_dir():
            _require_same(out, identity)
        else:
            _fit(objective, spec, seed, out, runtime, identity)
        (out / checkpoint.NAME).unlink(missing_ok=True)  # three times the weights, and of no more use


def _fit(objective: Objective, spec: TrainSpec, seed: int, out: Path, runtime: Runtime, identity: str) -> None:
    accelerator = _accelerator(torch_device(runtime.device), spec, runtime, out)
    if runtime.trackers:
        accelerator.init_trackers("vlm4vla", config={"identity": identity, **spec.model_dump()})
    groups = objective.parameter_groups()
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    module, optimizer = accelerator.prepare(objective.module, optimizer)
    trained = {name: p for name, p in objective.module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()} if spec.ema else {}
    done = checkpoint.load(out, trained, average, optimizer.optimizer, identity)
    metrics = Metrics(out / "metrics.jsonl", done)
    exports = {round(spec.steps * (i + 1) / spec.checkpoints) for i in range(spec.checkpoints)}

    module.train()
    saved_at, window_start, pending = time.monotonic(), time.monotonic(), []
    bar = tqdm(total=spec.steps, initial=done, unit="step", desc=out.name, disable=not runtime.progress)
    for step in range(done, spec.steps):
        batch = make_batch(objective, spec, seed, step)
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step) * group["lr_scale"]
        with accelerator.autocast():
            loss, parts = objective.loss(batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained.values(), spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            decay = min(spec.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in average.items():
                    value.lerp_(trained[name], 1 - decay)
        pending.append({"loss": loss.detach(), "grad_norm": norm, **parts})
        bar.update()

        last = step + 1 == spec.steps
        if (step + 1) % LOG_EVERY == 0 or last or step + 1 in exports:
            rows = {name: torch.stack([row[name] for row in pending]).float().cpu() for name in pending[0]}
            finite = {name: rows[name].isfinite() for name in ("loss", "grad_norm")}
            bad = (~(finite["loss"] & finite["grad_norm"])).nonzero()
            if len(bad):
                what = "gradient" if finite["loss"][bad[0]] else "loss"
                _stop(what, objective, spec, seed, step + 1 - len(pending) + int(bad[0]), out)
            seconds = time.monotonic() - window_start
            row = {name: round(float(values.mean()), 6) for name, values in rows.items()}
            row |= {
                "lr": learning_rate(spec, step),
                "samples_per_s": round(len(pending) * spec.batch_size / seconds, 1),
            }
            metrics.write(step + 1, row)
            accelerator.log(row, step=step + 1)
            bar.set_postfix(loss=f"{row['loss']:.4f}", rate=f"{row['samples_per_s']:.0f}/s")
            window_start, pending = time.monotonic(), []
            keep = last or step + 1 in exports or time.monotonic() - saved_at > runtime.checkpoint_s
            if keep and not all(value.isfinite().all() for value in (*trained.values(), *average.values())):
                _stop("weights", objective, spec, seed, step, out)
            if step + 1 in exports and not last:
                # Before the checkpoint: who goes on after it does not come by here again.
                _export(objective, trained, average, out / "policies" / f"step-{step + 1:06d}")
            if keep:
                checkpoint.save(out, step + 1, trained, average, optimizer.optimizer, identity)
                saved_at = time.monotonic()
    bar.close()
    accelerator.end_training()
    write_text(out / FINISHED, json.dumps({"identity": identity}))
    _export(objective, trained, average, out / "policy")


def make_batch(objective: Objective, spec: TrainSpec, seed: int, step: int) -> dict[str, Tensor]:
    """The batch of a step: consecutive samples of seeded permutations, one permutation an epoch."""
    positions = np.arange(step * spec.batch_size, (step + 1) * spec.batch_size)
    epochs = positions // objective.num_samples
    orders = {e: np.random.default_rng((seed, 0, e)).permutation(objective.num_samples) for e in np.unique(epochs)}
    indices = np.array([orders[e][p % objective.num_samples] for e, p in zip(epochs, positions, strict=True)])
    return objective.batch(indices, np.random.default_rng((seed, 1, step)))


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, spec.warmup_steps))
    if spec.schedule == "constant":
        return spec.learning_rate * warm
    return spec.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / spec.steps))


class Metrics:
    """``metrics.jsonl``: rows after the checkpoint that training resumes from are dropped, as they are made again."""

    def __init__(self, path: Path, done: int):
        rows = read_metrics(path)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= done))
        self.path = path

    def write(self, step: int, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")


def _accelerator(device: torch.device, spec: TrainSpec, runtime: Runtime, out: Path) -> Accelerator:
    """One for this training: Accelerate keeps the first device and precision of a process, and knows no ``cuda:1``."""
    missing = set(runtime.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
    if missing:  # Accelerate passes over what is not installed
        what = ", ".join(sorted(missing))
        raise UserError(f"no tracker {what} installed", "an installed tracker, or none", f"pip install {what}")
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(accelerate_torch_device=str(device)):
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if spec.precision == "bf16" else "no",
            log_with=list(runtime.trackers) or None,
            project_dir=out,
        )


def _require_same(out: Path, identity: str) -> None:
    """``out/policy`` is of this training."""
    path, own = out / FINISHED, json.dumps({"identity": identity})
    found = json.loads(path.read_text())["identity"] if path.is_file() else "unknown"
    if found != identity:
        vouch = "" if path.is_file() else f"; or, if you know it to be of this run, write {own} to {path}"
        raise UserError(
            f"{out / 'policy'} belongs to the run {found}",
            f"a policy of {identity}, or none",
            f"train into another folder, or remove this one: rm -r {shlex.quote(str(out))}{vouch}",
        )


def _export(objective: Objective, trained: dict[str, nn.Parameter], average: dict[str, Tensor], folder: Path) -> None:
    """Export with the averaged weights in place; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.no_grad():
        kept = {name: trained[name].detach().clone() for name in average}
        for name, value in average.items():
            trained[name].copy_(value)
        objective.export(partial)
        for name, value in kept.items():
            trained[name].copy_(value)
    partial.rename(folder)


def _stop(what: str, objective: Objective, spec: TrainSpec, seed: int, step: int, out: Path) -> NoReturn:
    path = out / f"bad-batch-{step:06d}.safetensors"
    checkpoint.save_tensors(path, make_batch(objective, spec, seed, step), {"step": str(step)})
    raise UserError(
        f"{what} not finite at step {step}, whose batch is in {path}",
        "finite loss, gradient and weights",
        f"look at the batch; if it is sound, lower learning_rate (now {spec.learning_rate}) and use a new folder",
    )
