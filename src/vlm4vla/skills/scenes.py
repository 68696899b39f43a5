"""Card scenes for the VLM stage: rendered in parallel, shard by shard, resumable, the same to the bit from a seed."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlm4vla.errors import UserError
from vlm4vla.files import replacing
from vlm4vla.sims.grinningface import emoji
from vlm4vla.sims.grinningface.stage import Stage, StagedScene
from vlm4vla.sims.worker import start_pool_process
from vlm4vla.skills.questions import Scenes
from vlm4vla.spec import content_hash

SHARD = 500
MAX_CARDS = 9
ROW_SHARE = 0.65
"""Scenes with three cards in a row, as in the robot task; the others have one to nine scattered cards."""
COLOUR_SHARE = 0.5
"""Scenes with random table and wall colours."""
MIN_VISIBLE = 0.6
"""A card that is hidden more than that is not asked about."""


def names() -> tuple[str, ...]:
    """All emoji names of all splits, in the order of the catalogue: the VLM has heard of every one."""
    return tuple(e.name for e in emoji.catalogue())


def version() -> str:
    """10 hex digits of what decides on the scenes of a seed and a size: emojis, their font, this module's constants."""
    emojis = [asdict(each) for each in emoji.catalogue()]
    return content_hash([emojis, emoji.font_version(), SHARD, MAX_CARDS, ROW_SHARE, COLOUR_SHARE, MIN_VISIBLE])


def make_scenes(num: int, seed: int, image_size: int, folder: Path, workers: int = 2, progress: bool = True) -> Scenes:
    """``num`` scenes (rounded up to whole shards) in ``folder``; finished shards are read, missing ones rendered.

    Raises:
        UserError: no emoji font, no OpenGL, or a rendering process died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"scenes-{version()}-{image_size}px-seed{seed}"
    paths = [folder / f"{stem}-{k:04d}.npz" for k in range(-(-num // SHARD))]
    missing = [(path, seed, k, image_size) for k, path in enumerate(paths) if not path.exists()]
    if missing:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, start_pool_process, (os.getpid(),))
        try:
            rendered = pool.map(_render_shard, *zip(*missing, strict=True))
            list(tqdm(rendered, total=len(missing), unit="shard", desc="scenes", disable=not progress))
        except BrokenProcessPool as error:
            raise UserError(
                f"a rendering process died; {sum(path.exists() for path in paths)} of {len(paths)} shards are there",
                "processes that live (is memory short?)",
                "run the same command again, perhaps with fewer workers; finished shards are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    shards = [np.load(path) for path in paths]
    columns = ("images", "cards", "card_uv", "card_size", "row", "block_uv", "gripper_uv")
    return Scenes(**{name: np.concatenate([shard[name] for shard in shards]) for name in columns}, names=names())


def _render_shard(path: Path, seed: int, shard: int, image_size: int) -> None:
    rng = np.random.default_rng((seed, shard))
    stage = Stage(image_size, seed=int(rng.integers(2**62)))
    pool, number = emoji.catalogue(), {name: i for i, name in enumerate(names())}
    images = np.empty((SHARD, image_size, image_size, 3), np.uint8)
    cards = np.full((SHARD, MAX_CARDS), -1, np.int16)
    card_uv, card_size = np.zeros((2, SHARD, MAX_CARDS, 2), np.float32)
    block_uv = np.full((SHARD, 2), np.nan, np.float32)
    gripper_uv = np.zeros((SHARD, 2), np.float32)
    row = np.zeros(SHARD, bool)
    for i in range(SHARD):
        scene, row[i] = _draw(stage, pool, rng)
        images[i] = scene.image
        seen = np.flatnonzero(scene.card_visible >= MIN_VISIBLE)
        cards[i, seen] = [number[scene.names[k]] for k in seen]
        card_uv[i, : len(scene.names)] = scene.card_uv
        card_size[i, : len(scene.names)] = scene.card_size
        gripper_uv[i] = scene.gripper_uv
        if scene.cube_uv is not None:
            block_uv[i] = scene.cube_uv
    stage.close()
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            images=images,
            cards=cards,
            card_uv=card_uv,
            card_size=card_size,
            row=row,
            block_uv=block_uv,
            gripper_uv=gripper_uv,
        )


def _draw(stage: Stage, pool: tuple[emoji.Emoji, ...], rng: np.random.Generator) -> tuple[StagedScene, bool]:
    """A scene of which at least one card can be seen, and whether it is a row."""
    while True:
        row, colours = rng.random() < ROW_SHARE, rng.random() < COLOUR_SHARE
        count = 3 if row else int(rng.integers(1, MAX_CARDS + 1))
        picked = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
        scene = (stage.row if row else stage.scatter)(picked, random_colours=colours)
        if (scene.card_visible >= MIN_VISIBLE).any():
            return scene, row
