"""The one training loop: policies and the VLM stage alike. Read it from top to bottom.

All randomness of step ``s`` (which samples, which augmentation, dropout) derives from ``(seed, s)``, and the learning
rate from ``s``. So a checkpoint needs only the step, the trained parameters, their average and the optimiser's moments,
and a run that is killed at any moment and started again ends with the weights of an uninterrupted one.
"""

import json
import math
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, patch_environment
from torch import Tensor, nn
from tqdm import tqdm

from vlm4vla.errors import UserError
from vlm4vla.files import new_folder, write_text
from vlm4vla.locks import locked
from vlm4vla.metrics import read_metrics
from vlm4vla.policy import torch_device
from vlm4vla.spec import Runtime, TrainSpec
from vlm4vla.training import check, checkpoint, processes

LOG_EVERY = 10
"""Steps between rows of ``metrics.jsonl``; the device is synchronised only then."""
FINISHED = "finished.json"
"""Says whose ``policy`` it stands beside. Not inside: an exported folder holds what the objective exports."""


class Objective(Protocol):
    """What the loop trains: it asks which samples come next, for a batch of them, then for the loss on it."""

    @property
    def module(self) -> nn.Module:
        """Holds every parameter; those with ``requires_grad`` are trained."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with the keys ``params`` and ``lr_scale``; a partition of the trained parameters."""
        ...

    def draw(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The samples at ``positions`` (B,) of an endless stream: a function of these and ``seed`` alone. Called, as
        ``batch`` is, in a thread."""
        ...

    def batch(self, samples: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """The samples (B,) as named tensors on the CPU; one draw of ``rng`` a sample."""
        ...

    def amounts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How much there is in ``batch`` of what losses are means of, by name; the same names for every batch."""
        ...

    def loss(self, batch: dict[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss, and detached scalars worth logging, of ``batch`` as one part of a step's batch that has the
        amounts ``whole``: those of all parts add up to the whole's. NaN is logged for what a step had nothing of."""
        ...

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write what the training was for into an empty folder; ``state`` is the module's, to be used for its own."""
        ...


def fit(objective: Objective, spec: TrainSpec, seed: int, out: Path, runtime: Runtime, identity: str) -> None:
    """Train to ``spec.steps`` and export to ``out/policy``; start again to resume.

    Writes ``metrics.jsonl`` (one row each ``LOG_EVERY`` steps), ``checkpoint*.safetensors`` (until it is finished),
    ``policies/step-*`` (where ``spec.checkpoints`` > 1) and at last ``policy``, with what it is of in
    ``finished.json``. Started by ``torchrun`` or ``accelerate launch``, its processes share each batch; their number
    may change from one start to the next.

    Args:
        identity: what this training is of; a checkpoint or policy of another one in ``out`` is refused. That of the
            first process counts, as do the weights of its module: in the others it may be on ``meta``.

    Raises:
        UserError: loss, gradient or weights are not finite (the batch is saved), ``out`` belongs to another run, or
            another process trains into it, or what ``check.execution`` refuses.
    """
    check.execution(spec, runtime, processes.number())
    accelerator = _accelerator(torch_device(runtime.device), spec, runtime, out)
    alone = locked(out / "training.lock", "training") if accelerator.is_main_process else nullcontext()
    with alone:
        identity = processes.first_says(accelerator, identity)
        if (out / "policy").is_dir():
            _require_same(out, identity)
        else:
            _fit(objective, spec, seed, out, runtime, identity, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.remove(out)
    accelerator.end_training()


class Step(nn.Module):
    """The loss as a module's forward pass: what DDP wraps, and what FSDP2 gathers weights for."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.module, self.objective = objective.module, objective

    def forward(self, batch: dict[str, Tensor], whole: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(batch, whole)


def _fit(
    objective: Objective,
    spec: TrainSpec,
    seed: int,
    out: Path,
    runtime: Runtime,
    identity: str,
    accelerator: Accelerator,
) -> None:
    device, rank, main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    parts = accelerator.num_processes * runtime.accumulate
    mine = range(rank * runtime.accumulate, (rank + 1) * runtime.accumulate)
    model: Any = Step(objective)
    processes.place(model, accelerator, runtime.shard, spec.precision == "bf16")
    model = accelerator.prepare_model(model, evaluation_mode=runtime.shard)  # evaluation: no DDP around it
    groups, fused = objective.parameter_groups(), True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=fused)
    trained = {name: p for name, p in objective.module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()} if spec.ema else {}
    done = checkpoint.load(out, trained, average, optimizer, identity)
    if runtime.trackers:  # not before: a training that is refused is no run
        _track(accelerator, out, {"identity": identity, **spec.model_dump()})
    metrics = Metrics(out / "metrics.jsonl", done) if main else None
    exports = {round(spec.steps * (i + 1) / spec.checkpoints) for i in range(spec.checkpoints)}

    def batches(step: int) -> list[dict[str, Tensor]]:
        made = [make_batch(objective, spec, seed, step, part, parts) for part in mine]
        return [{k: v.pin_memory() if device.type == "cuda" else v for k, v in batch.items()} for batch in made]

    model.train()
    saved_at, window_start, waited, pending = time.monotonic(), time.monotonic(), 0.0, []
    shown = runtime.progress and main
    bar = tqdm(total=spec.steps, initial=done, unit="step", desc=out.name, disable=not shown)
    with processes.ahead(batches, range(done, spec.steps)) as coming:
        for step in range(done, spec.steps):
            started = time.monotonic()
            micro = next(coming)
            waited += time.monotonic() - started
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, step) * group["lr_scale"]
            whole = _whole(objective, micro, accelerator)
            logged = []
            for part, batch in zip(mine, micro, strict=True):
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                torch.manual_seed(seed * 1_000_003 + step + (part << 40))  # dropout: each part its own
                with nullcontext() if part == mine[-1] else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss, terms = model(batch, whole)
                    accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over them
                logged.append({"loss": loss.detach(), **terms})
            norm = processes.whole(torch.nn.utils.clip_grad_norm_(trained.values(), spec.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
            if average:
                decay = min(spec.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    for name, value in average.items():
                        value.lerp_(trained[name], 1 - decay)
            terms = {name: torch.stack([row[name] for row in logged]).sum(0) for name in logged[0]}
            pending.append((terms, norm))
            bar.update()

            last = step + 1 == spec.steps
            if (step + 1) % LOG_EVERY == 0 or last or step + 1 in exports:
                rows = {name: torch.stack([row[name] for row, _ in pending]).float() for name in terms}
                if accelerator.num_processes > 1:
                    rows = {name: processes.reduce(accelerator, values, "sum") for name, values in rows.items()}
                rows = {name: values.cpu() for name, values in rows.items()}
                rows["grad_norm"] = torch.stack([value for _, value in pending]).float().cpu()
                finite = {name: rows[name].isfinite() for name in ("loss", "grad_norm")}
                bad = (~(finite["loss"] & finite["grad_norm"])).nonzero()
                if len(bad):
                    what = "gradient" if finite["loss"][bad[0]] else "loss"
                    _stop(what, objective, spec, seed, step + 1 - len(pending) + int(bad[0]), out, main)
                seconds = time.monotonic() - window_start
                means = {name: float(values.nanmean()) for name, values in rows.items()}
                row = {name: round(mean, 6) for name, mean in means.items() if not math.isnan(mean)}
                row |= {
                    "lr": learning_rate(spec, step),
                    "samples_per_s": round(len(pending) * spec.batch_size / seconds, 1),
                    "data_wait": round(waited / seconds, 4),
                }
                if metrics:
                    metrics.write(step + 1, row)
                accelerator.log(row, step=step + 1)
                bar.set_postfix(loss=f"{row['loss']:.4f}", rate=f"{row['samples_per_s']:.0f}/s")
                since = processes.reduce(accelerator, torch.tensor(time.monotonic() - saved_at, device=device), "mean")
                window_start, waited, pending = time.monotonic(), 0.0, []
                keep = last or step + 1 in exports or float(since) > runtime.checkpoint_s
                values = (processes.local(value) for value in (*trained.values(), *average.values()))
                if keep and not all(value.isfinite().all() for value in values):
                    _stop("weights", objective, spec, seed, step, out, main)
                if step + 1 in exports and not last:
                    # Before the checkpoint: who goes on after it does not come by here again.
                    _export(objective, average, out / "policies" / f"step-{step + 1:06d}", main)
                if keep:
                    everyone = accelerator.wait_for_everyone
                    checkpoint.save(out, step + 1, trained, average, optimizer, identity, rank, everyone)
                    saved_at = time.monotonic()
    bar.close()
    if main:
        write_text(out / FINISHED, json.dumps({"identity": identity}))
    _export(objective, average, out / "policy", main)


def _whole(objective: Objective, micro: list[dict[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """The amounts of all parts together, of this process and of the others."""
    parts = [objective.amounts(batch) for batch in micro]
    held = torch.stack([torch.stack([part[name] for part in parts]).sum().float() for name in parts[0]])
    held = held.to(accelerator.device, non_blocking=True)
    whole = processes.reduce(accelerator, held, "sum") if accelerator.num_processes > 1 else held
    return dict(zip(parts[0], whole, strict=True))


def make_batch(
    objective: Objective, spec: TrainSpec, seed: int, step: int, part: int = 0, parts: int = 1
) -> dict[str, Tensor]:
    """One of ``parts`` of a step's batch: consecutive samples of the objective's stream."""
    positions = np.arange(step * spec.batch_size, (step + 1) * spec.batch_size)
    size = spec.batch_size // parts
    rng: Any = np.random.default_rng((seed, 1, step))
    if parts > 1:
        rows = slice(part * size, (part + 1) * size)
        positions, rng = positions[rows], processes.PartOf(rng, spec.batch_size, rows)
    return objective.batch(objective.draw(positions, seed), rng)


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
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda" and processes.number() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    with patch_environment(accelerate_torch_device=str(device)):
        return Accelerator(
            cpu=device.type == "cpu",
            kwargs_handlers=[
                # Some VLMs have parameters that no forward pass reaches (LLaVA's last vision layer).
                DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
                # It would keep a copy of each trained weight, which checkpointing lets go with its layer.
                AutocastKwargs(cache_enabled=not runtime.gradient_checkpointing),
            ],
            mixed_precision="bf16" if spec.precision == "bf16" else "no",
            log_with=list(runtime.trackers) or None,
            project_dir=out,
        )


def _track(accelerator: Accelerator, out: Path, config: dict[str, Any]) -> None:
    """Start one new run with each tracker. wandb and tensorboard write their own files into ``out``; the others have no
    setting for that.

    A training that is resumed gets a new run too, of the same name and group. It cannot go on in its old run: that one
    already has the steps between the last checkpoint and the kill, and trackers reject, or drop, a step that they are
    told again.
    """
    name = f"{out.resolve().name}-{config['identity']}"
    own = {
        "wandb": {"name": name, "group": config["identity"], "dir": str(out)},
        "trackio": {"name": f"{name}-{int(time.time())}", "group": config["identity"]},  # names are ids there
        "mlflow": {"run_name": name},
    }
    try:
        accelerator.init_trackers("vlm4vla", config=config, init_kwargs=own)
    except Exception as error:  # each has its own: no account, no server, no place
        raise UserError(
            f"a tracker that does not start ({type(error).__name__}: {error})",
            "an account or a server that can be reached",
            "log in as its documentation says, or for wandb: export WANDB_MODE=offline",
        ) from error


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


def _export(objective: Objective, average: dict[str, Tensor], folder: Path, main: bool) -> None:
    """Export the averaged weights where there are any; the folder appears whole or not at all."""
    state = processes.whole_state(objective.module, average, main)
    if main:
        with new_folder(folder) as partial:
            objective.export(partial, state)


def _stop(what: str, objective: Objective, spec: TrainSpec, seed: int, step: int, out: Path, main: bool) -> NoReturn:
    path = out / f"bad-batch-{step:06d}.safetensors"
    if main:
        checkpoint.save_tensors(path, make_batch(objective, spec, seed, step), {"step": str(step)})
    raise UserError(
        f"{what} not finite at step {step}, whose batch is in {path}",
        "finite loss, gradient and weights",
        f"look at the batch; if it is sound, lower learning_rate (now {spec.learning_rate}) and use a new folder",
    )
