"""Shared fixtures. ``study_folder`` writes a study as the runner leaves it, with episodes drawn at given rates."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw

from fake_sim import CONVENTION
from vlm4vla.evaluation.filmstrip import write_strip
from vlm4vla.sims.calvin import CHAIN
from vlm4vla.sims.protocols import protocol
from vlm4vla.studies import matrix
from vlm4vla.studies.store import Store
from vlm4vla.types import EpisodeResult

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TRAIN, VAL = "grinningface/place/train/v1", "grinningface/place/val/v1"
Behaviour = dict[str, dict[str, tuple[float, float]]]
"""Treatment -> protocol -> (probability of placing, of choosing the named card when placing). CALVIN: (probability of
each task after the one before, anything)."""


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A whole policy folder with random weights, not to be written to."""
    import torch

    from vlm4vla.backbones import tiny
    from vlm4vla.data.normalize import Normalizer
    from vlm4vla.policy import VLA, Policy
    from vlm4vla.skills.questions import words
    from vlm4vla.spec import RunSpec

    spec = RunSpec()
    torch.manual_seed(0)
    actions = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    actions[:, -1] = actions[:, -1] > 0
    vla = VLA(*tiny.build(["cat"], words(), 0), spec, 0)
    folder = tmp_path_factory.mktemp("original") / "policy"
    folder.mkdir()
    Policy(vla, spec, CONVENTION, Normalizer.fit(actions), None, 96, {}).save(folder)
    return folder


@pytest.fixture
def study_folder(tmp_path: Path) -> Callable[..., Path]:
    def build(behaviour: Behaviour, **options) -> Path:
        return write_study(tmp_path / "study", behaviour, **options)

    return build


def write_study(
    folder: Path,
    behaviour: Behaviour,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    episodes: int = 100,
    curve: bool = False,
    strips: int = 0,
    skip: Callable[[str, int, str], bool] = lambda treatment, seed, name: False,
    faults: int = 0,
) -> Path:
    """A study's folder; ``skip(treatment, seed, protocol)`` leaves a cell out, ``faults`` spoils each cell's first."""
    names = list(next(iter(behaviour.values())))
    steps = 1000
    values = {
        "name": "synthetic",
        "base": {"training": {"steps": steps, "checkpoints": 4 if curve else 1}, "head": {"chunk": 10}},
        "matrix": {"treatment": list(behaviour), "seed": list(seeds)},
        "evaluate": {"protocols": names, "episodes": episodes, "curve_episodes": episodes // 2 if curve else 0},
    }
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    rng = np.random.default_rng(0)
    with Store(folder / matrix.RESULTS) as store:
        for cell in matrix.load(folder / "study.yaml").cells():
            run = folder / "runs" / cell.run_id
            run.mkdir(parents=True)
            _training(run, steps, rng)
            store.set_run(
                cell.run_id,
                spec=cell.run.model_dump(mode="json"),
                status="done",
                data_hash="0123456789",
                versions={"torch": "2.13.0", "python": "3.11.7"},
                seconds=240.0,
            )
            for run_id, name, number in cell.wanted():
                if skip(cell.run.treatment, cell.run.seed, name):
                    continue
                place, choose = behaviour[cell.run.treatment][name]
                progress = int(run_id.partition("@step-")[2] or steps) / steps
                for i in range(number):
                    result = _episode(name, i, place * math.sqrt(progress), choose, rng, fault=i < faults)
                    store.add(run_id, result)
                    if i < strips and run_id == cell.run_id and result.success is not None:
                        write_strip(run / "strips", _frames(result, rng), result)
    return folder


def _episode(
    name: str, episode: int, place: float, choose: float, rng: np.random.Generator, fault: bool
) -> EpisodeResult:
    if protocol(name).sim == "calvin":
        length = int(np.cumprod(rng.random(CHAIN) < place).sum())
        success, credits = length == CHAIN, {f"success_{i}": length >= i for i in range(1, CHAIN + 1)}
        credits["length"] = length
    else:
        placed = bool(rng.random() < place)
        right = bool(rng.random() < choose) if placed else None
        success, credits = placed and bool(right), {"execution": placed, "recognition": right}
    return EpisodeResult(
        protocol=name,
        episode=episode,
        seed=protocol(name).first_seed + episode,
        success=None if fault else success,
        steps=0 if fault else int(rng.integers(12, 30)),
        credits={} if fault else credits,
        instruction="pick the block and place it on hot pepper",
        versions={"mujoco": "4.0.0"},
        fault="the worker died three times" if fault else None,
    )


def _training(run: Path, steps: int, rng: np.random.Generator) -> None:
    rows = [
        {
            "step": step,
            "loss": 0.3 * math.exp(-step / 250) + 0.02 + 0.01 * rng.random(),
            "grad_norm": 1.5 * math.exp(-step / 400) + 0.2 * rng.random(),
            "lr": 1e-3 * min(1, step / 40),
            "samples_per_s": 85 + 5 * rng.random(),
        }
        for step in range(10, steps + 1, 10)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = {
        "parameters": {"vision": {"trained": 600_000, "frozen": 0}, "llm": {"trained": 0, "frozen": 660_000}},
        "new_parameters": 300_000,
        "episodes": 400,
    }
    (run / "policy").mkdir()
    (run / "policy" / "policy.json").write_text(json.dumps({"card": card}))


def _frames(result: EpisodeResult, rng: np.random.Generator) -> list[np.ndarray]:
    """A cube that moves to a card."""
    target = 20 + 28 * int(rng.integers(3))
    frames = []
    for i in range(max(2, result.steps // 3)):
        image = Image.new("RGB", (96, 96), (120, 110, 100))
        draw = ImageDraw.Draw(image)
        for x in (20, 48, 76):
            draw.rectangle([x - 11, 55, x + 11, 77], fill=(245, 240, 225), outline=(60, 60, 60))
            draw.ellipse([x - 7, 59, x + 7, 73], fill=(230, 180 - x, 40 + x))
        at = 48 + (target - 48) * i / max(1, result.steps // 3 - 1)
        draw.rectangle([at - 4, 26 + 3 * i, at + 4, 34 + 3 * i], fill=(20, 30, 120))
        frames.append(np.asarray(image))
    return frames
