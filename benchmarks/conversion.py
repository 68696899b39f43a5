"""Converting raw data sets to LeRobotDataset v3: frames a second of CPU time, and whether memory stays flat.

    python benchmarks/conversion.py [--frames 400]

Raw data are made in the exact layouts of CALVIN, LIBERO and Bridge (RLDS), with pictures of a camera's sizes and about
its texture, once with ``--frames`` and once with four times as many; one worker converts each, in processes of its own.
Rates are those of the additional frames, so that starting up does not enter, in CPU time of all processes, so that
other work on the machine enters little. The floor: the same pictures, in memory, through the films' encoder alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import raw_data
from vlm4vla.data.convert.base import Source, convert
from vlm4vla.data.convert.calvin import Calvin
from vlm4vla.data.convert.libero import Libero
from vlm4vla.data.convert.rlds import Rlds, load_mapping
from vlm4vla.sims.film import Film

EPISODE, MORE = 50, 4
TEXTURE = 700
SIZES = {"calvin": (200, 84), "libero": (128, 128), "bridge": (256,)}
"""Sides of the cameras' pictures in the raw data."""
SOURCES: dict[str, Callable[[Path], Source]] = {
    "calvin": Calvin,
    "libero": Libero,
    "bridge": lambda folder: Rlds(folder, load_mapping("bridge")),
}


def pictures(frames: int, side: int) -> np.ndarray:
    """uint8 (frames, side, side, 3): a moving texture, about as hard to compress as a camera's pictures."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.normal(size=(28, 28, 3)), np.ones((25, 25, 1)))
    texture = (coarse * 40 + rng.normal(size=(TEXTURE, TEXTURE, 3)) * 6 + 128).clip(0, 255).astype(np.uint8)
    room = TEXTURE - side
    return np.stack([texture[i // 2 % room :, i % room :][:side, :side] for i in range(frames)])


def write_raw(kind: str, folder: Path, frames: int) -> None:
    rng, number = np.random.default_rng(0), frames // EPISODE
    shown = [pictures(EPISODE, side) for side in SIZES[kind]]
    if kind == "calvin":
        segments = [(i * EPISODE, (i + 1) * EPISODE - 1, "lift the red block") for i in range(number)]
        rows = {"rgb_static": shown[0], "rgb_gripper": shown[1]}
        raw_data.calvin(folder, segments, {name: np.concatenate([each] * number) for name, each in rows.items()})
        return
    folder.mkdir()
    actions = rng.uniform(0.1, 1, (EPISODE, 7))
    actions[:, 6] = 1
    if kind == "libero":
        seen = raw_data.libero_seen(EPISODE, 16) | {"agentview_rgb": shown[0], "eye_in_hand_rgb": shown[1]}
        raw_data.libero(folder / "turn_on_the_stove_demo.hdf5", [actions] * number, seen=[seen] * number)
    else:
        record = raw_data.example(raw_data.episode(shown[0], actions, np.zeros((EPISODE, 7)), "put it on the plate"))
        raw_data.tfrecord(folder / "bridge_orig-train.tfrecord-00000-of-00001", [record] * number)


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def one(kind: str, raw: Path, out: Path) -> None:
    """Convert, and print CPU seconds, frames and the largest process's peak in MiB."""
    began = cpu_s()
    summary = convert(SOURCES[kind](raw), out, 1, progress=False)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps([cpu_s() - began, summary.frames, peak / 1024]))


def films(kind: str, folder: Path) -> float:
    """Frames a CPU-second of the encoder alone, all cameras of a frame together."""
    shown, began = [pictures(EPISODE, side) for side in SIZES[kind]], time.process_time()
    for i, each in enumerate(shown):
        with Film(folder / f"{kind}-{i}.mp4", 10, each.shape[1:3]) as film:
            for _ in range(MORE):
                film.add(each)
    return MORE * EPISODE / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--raw", nargs=3, metavar=("KIND", "RAW", "FRAMES"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "RAW", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw:
        kind, raw, frames = options.raw
        return write_raw(kind, Path(raw), int(frames))
    if options.one:
        kind, raw, out = options.one
        return one(kind, Path(raw), Path(out))

    def apart(*arguments: object) -> str:
        """In a process of its own: a process begins with the peak memory of the one that starts it."""
        command = [sys.executable, __file__, *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    print(f"{'raw data':<10} {'frames a CPU-s':>15} {'encoder alone':>15} {'share':>7} {'peak MiB':>18}")
    for kind in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            rows = []
            for frames in (options.frames, MORE * options.frames):
                raw, out = (Path(folder) / f"{name}-{frames}" for name in ("raw", "out"))
                apart("--raw", kind, raw, frames)
                rows.append(json.loads(apart("--one", kind, raw, out)))
            (first_s, first, before), (second_s, second, after) = rows
            rate, floor = (second - first) / (second_s - first_s), films(kind, Path(folder))
            memory = f"{before:.0f} -> {after:.0f}"
        print(f"{kind:<10} {rate:>15.0f} {floor:>15.0f} {rate / floor:>7.0%} {memory:>18}", flush=True)


if __name__ == "__main__":
    main()
