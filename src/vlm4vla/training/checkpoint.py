"""Training checkpoints: one safetensors file, replaced atomically. Nothing is ever unpickled."""

import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm4vla.errors import UserError
from vlm4vla.files import replacing

NAME = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``path`` so that it is whole or absent."""
    try:
        with replacing(path) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    except (SafetensorError, OSError) as error:
        mend = "free some space (df -h) and run the same command again: what is finished is kept"
        raise UserError(f"{path} could not be written: {error}", "room and permission to write it", mend) from error


def save(
    out: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
) -> None:
    """Everything that ``load`` needs to go on after ``step`` finished steps."""
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in trained.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in trained.items():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state[parameter].items()}
    save_tensors(out / NAME, tensors, {"step": str(step), "identity": identity})


def load(
    out: Path,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
) -> int:
    """Restore ``out``'s checkpoint in place; returns the number of finished steps, 0 where there is no checkpoint.

    Raises:
        UserError: the checkpoint is damaged or of another run.
    """
    path = out / NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: {error}", "a whole checkpoint", f"train again from the start: rm -r {shlex.quote(str(out))}"
        ) from error
    if metadata["identity"] != identity:
        raise UserError(
            f"{path} belongs to the run {metadata['identity']}",
            f"a checkpoint of {identity}, or none",
            f"train into another folder, or remove this one: rm -r {shlex.quote(str(out))}",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"model.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            # AdamW keeps its step count on the CPU.
            optimizer.state[parameter] = {**moments, "step": moments["step"].cpu()}
        for name, value in average.items():
            value.copy_(tensors[f"average.{name}"])
    return int(metadata["step"])
