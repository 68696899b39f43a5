"""The embedded VLM from nothing: scenes -> alignment -> questions -> scores -> a folder with its model card."""

import json
import shutil
from pathlib import Path

import torch

from vlm4vla.backbones import tiny
from vlm4vla.backbones.vlm import load_vlm
from vlm4vla.sims.grinningface import emoji
from vlm4vla.skills.questions import Scenes, words
from vlm4vla.skills.scenes import make_scenes, names
from vlm4vla.skills.score import score
from vlm4vla.skills.stage import Stage
from vlm4vla.spec import Runtime, TrainSpec, content_hash
from vlm4vla.training.loop import fit

SEED = 0
TRAIN_SCENES, TRAIN_SCENE_SEED = 24_000, 0
TEST_SCENES, TEST_SCENE_SEED = 1_000, 1
"""Scores are on scenes of another seed than any that was trained on."""
ALIGN = TrainSpec(steps=900, batch_size=64, learning_rate=2e-3, warmup_steps=40)
INSTRUCT = TrainSpec(steps=2600, batch_size=32, learning_rate=2e-3, warmup_steps=40, schedule="cosine", checkpoints=4)


def build_vlm(work: Path, folder: Path, runtime: Runtime) -> dict:
    """Make the embedded VLM in ``folder``, with intermediate results in ``work``; resumes after a kill.

    Returns:
        The model card's values, also in ``folder/scores.json``.
    """
    torch.set_num_threads(runtime.threads)
    size = tiny.IMAGE_SIZE
    train = make_scenes(TRAIN_SCENES, TRAIN_SCENE_SEED, size, work / "scenes", runtime.workers, runtime.progress)
    test = make_scenes(TEST_SCENES, TEST_SCENE_SEED, size, work / "scenes", runtime.workers, runtime.progress)
    identity = content_hash([names(), words(), ALIGN.model_dump(), INSTRUCT.model_dump(), TRAIN_SCENES])
    vlm, processor = tiny.build(names(), words(), SEED)
    fit(Stage(vlm, processor, train, instruct=False), ALIGN, SEED, work / "align", runtime, identity)
    vlm, processor = load_vlm(str(work / "align" / "policy"))
    fit(Stage(vlm, processor, train, instruct=True), INSTRUCT, SEED, work / "instruct", runtime, identity)
    scores = score_folder(work / "instruct" / "policy", test)
    shutil.copytree(work / "instruct" / "policy", folder, dirs_exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    return scores


def score_folder(folder: Path, scenes: Scenes) -> dict:
    """Scores by task over all emojis, and of ``where`` and ``what`` by emoji split."""
    vlm, processor = load_vlm(str(folder))
    split_of = {e.name: e.split for e in emoji.catalogue()}
    return score(vlm, processor, scenes, TEST_SCENE_SEED, split_of)
