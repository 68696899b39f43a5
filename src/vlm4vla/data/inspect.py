"""What ``vlm4vla data inspect`` prints."""

import json
from pathlib import Path

import numpy as np

from vlm4vla.data.layout import OWN_KEY
from vlm4vla.data.lerobot import Dataset


def inspect(folder: Path | str) -> str:
    """What ``vlm4vla data inspect`` prints: contents, statistics and what looks suspicious.

    Raises:
        UserError: as ``Dataset.open``.
    """
    dataset = Dataset.open(folder)
    lengths = dataset.episode_to - dataset.episode_from
    own = dataset.info.get(OWN_KEY, {})
    names = dataset.info["features"]["action"].get("names")
    if not isinstance(names, list) or len(names) != dataset.actions.shape[1]:
        names = [f"action_{d}" for d in range(dataset.actions.shape[1])]
    convention = own.get("convention", {"none": "training will refuse this folder"})
    state = "none" if dataset.recorded_states is None else f"{dataset.states.shape[1]} numbers"
    size, version = sum(f.stat().st_size for f in dataset.files) / 1e6, dataset.info["codebase_version"]
    lines = [
        f"{dataset.folder}: LeRobotDataset {version}, {size:.1f} MB",
        f"episodes    {dataset.num_episodes}",
        f"frames      {dataset.num_frames} ({lengths.min()} to {lengths.max()} an episode, mean {lengths.mean():.1f})",
        f"fps         {dataset.fps:g}",
        "cameras     " + ", ".join(f"{name} {h}x{w}" for name, (h, w) in dataset.cameras.items()),
        f"action      {len(names)} numbers; state: {state}",
        f"tasks       {len(dataset.tasks)}, e.g. {dataset.tasks[0]!r}",
        f"content     sha256 {dataset.content_hash}",
        *(f"convention  {key}: {value}" for key, value in convention.items()),
        *(f"provenance  {key}: {json.dumps(value)}" for key, value in own.get("provenance", {}).items()),
        "",
    ]
    return "\n".join([*lines, *_statistics_lines(dataset.actions, names)])


def _statistics_lines(actions: np.ndarray, names: list[str]) -> list[str]:
    """A table of statistics over the finite actions, then warnings."""
    finite = np.isfinite(actions).all(1)
    lines = [f"{'dimension':12}{'mean':>10}{'std':>10}{'min':>10}{'q01':>10}{'q99':>10}{'max':>10}  at min / max"]
    warnings = []
    if not finite.all():
        warnings.append(f"warning: {int((~finite).sum())} frames have NaN or infinite actions (left out above)")
    for name, column in zip(names, actions[finite].T, strict=True):
        if not len(column):
            break
        low, high = column.min(), column.max()
        q01, q99 = np.quantile(column.astype(np.float64), [0.01, 0.99])
        numbers = (column.mean(dtype=np.float64), column.std(dtype=np.float64), low, q01, q99, high)
        at = f"{(column == low).mean():6.1%} /{(column == high).mean():6.1%}"
        lines.append(f"{name:12}" + "".join(f"{number:10.4f}" for number in numbers) + "  " + at)
        if low == high:
            warnings.append(f"note: {name} is constant ({low:g}); training predicts that constant")
    return lines + warnings
