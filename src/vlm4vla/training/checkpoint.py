"""Training checkpoints: safetensors, replaced atomically, nothing is ever unpickled.

One file, ``checkpoint.safetensors``; with sharded parameters one more for each further process, which holds that
process's rows. The first process writes its file last and names the others in it: with it the checkpoint is there. Any
number of processes can go on from it, for each reads the rows that it needs from whichever files hold them.
"""

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm4vla.errors import UserError
from vlm4vla.files import replacing
from vlm4vla.training.processes import local

NAME = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
Barrier = Callable[[], None]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``path`` so that it is whole or absent."""
    try:
        with replacing(path) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    except (SafetensorError, OSError) as error:
        mend = "free some space (df -h) and run the same command again: what is finished is kept"
        raise UserError(f"{path} could not be written: {error}", "room and permission to write it", mend) from error


def shard_name(step: int, rank: int, shards: int) -> str:
    """Of the further processes' files."""
    return f"checkpoint-{step:06d}-{rank}-of-{shards}.safetensors"


def save(
    out: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
    rank: int = 0,
    barrier: Barrier = lambda: None,
) -> None:
    """Everything that ``load`` needs to go on after ``step`` finished steps; every process calls it.

    A parameter that no gradient has reached yet has no moments, and none are written.
    """
    shards = max((p.device_mesh.size() for p in trained.values() if isinstance(p, DTensor)), default=1)
    tensors: dict[str, Tensor] = {f"model.{name}": local(value) for name, value in trained.items()}
    tensors |= {f"average.{name}": local(value) for name, value in average.items()}
    for name, parameter in trained.items():
        tensors |= {f"{moment}.{name}": local(value) for moment, value in optimizer.state[parameter].items()}
    metadata = {"step": str(step), "identity": identity, "shards": str(shards)}
    if 0 < rank < shards:
        save_tensors(out / shard_name(step, rank, shards), tensors, metadata)
    barrier()
    if rank == 0:
        save_tensors(out / NAME, tensors, metadata)
        for old in out.glob("checkpoint-*.safetensors"):
            if not old.name.startswith(f"checkpoint-{step:06d}-"):
                old.unlink()
    barrier()


def load(
    out: Path,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
) -> int:
    """Restore ``out``'s checkpoint in place; returns the number of finished steps, 0 where there is no checkpoint.

    Raises:
        UserError: the checkpoint is damaged, of another run, or of a version that trained other parameters.
    """
    path = out / NAME
    if not path.exists():
        return 0
    mend = f"train again from the start: rm -r {shlex.quote(str(out))}"
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, "pt"))]
            metadata = files[0].metadata()
            step, shards = int(metadata["step"]), int(metadata.get("shards", "1"))
            others = [out / shard_name(step, rank, shards) for rank in range(1, shards)]
            files += [stack.enter_context(safe_open(other, "pt")) for other in others]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {error}", "a whole checkpoint", mend) from error
        if metadata["identity"] != identity:
            raise UserError(
                f"{path} belongs to the run {metadata['identity']}",
                f"a checkpoint of {identity}, or none",
                f"train into another folder, or remove this one: rm -r {shlex.quote(str(out))}",
            )
        present = set(files[0].keys())
        if absent := [name for name in trained if f"model.{name}" not in present]:
            found = f"{path} without {len(absent)} of the parameters that this version trains ({absent[0]}, ...)"
            raise UserError(found, "a checkpoint of the version that goes on from it", mend)
        with torch.no_grad():
            for name, parameter in trained.items():
                _read(files, f"model.{name}", parameter)
                if f"step.{name}" in present:
                    optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                    for moment in MOMENTS:
                        _read(files, f"{moment}.{name}", optimizer.state[parameter][moment])
                    count = files[0].get_tensor(f"step.{name}")
                    # AdamW keeps its step count on the CPU, but for its fused form.
                    fused = optimizer.defaults.get("fused")
                    optimizer.state[parameter]["step"] = count.to(parameter.device if fused else "cpu")
            for name, value in average.items():
                _read(files, f"average.{name}", value)
    return step


def remove(out: Path) -> None:
    """Three times the weights, and of no more use to a finished training."""
    for path in (out / NAME, *out.glob("checkpoint-*.safetensors")):
        path.unlink(missing_ok=True)


def _read(files: list, name: str, target: Tensor) -> None:
    """Fill ``target``, or this process's rows of it, from the files' rows: both are cut as ``torch.chunk`` cuts."""
    own = local(target)
    if target.ndim == 0:
        own.copy_(files[0].get_tensor(name))
        return
    rows = len(target)
    first, last = 0, rows
    if isinstance(target, DTensor):
        first, last = _rows(rows, target.device_mesh.get_local_rank(), target.device_mesh.size())
        assert last - first == len(own)
    for rank, file in enumerate(files):
        start, stop = _rows(rows, rank, len(files))
        low, high = max(first, start), min(last, stop)
        if low < high:
            own[low - first : high - first].copy_(file.get_slice(name)[low - start : high - start])


def _rows(rows: int, rank: int, count: int) -> tuple[int, int]:
    size = -(-rows // count)
    return min(rank * size, rows), min((rank + 1) * size, rows)
