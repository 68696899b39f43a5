"""Random access to training samples against lerobot's own loader, same files, same run; opening 2 M frames.

    python benchmarks/data_loading.py [--lerobot PYTHON] [--frames 2000] [--samples 600]

A sample is one 256 x 256 picture and a chunk of 4 actions. Rates are samples a second of CPU time of one process, all
its threads counted, so that other work on the machine enters little; ``--lerobot`` names the interpreter of an
environment with ``pip install lerobot``.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm4vla.convention import BRIDGE
from vlm4vla.data.cache import frames
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.normalize import Statistics
from vlm4vla.data.windows import windows
from vlm4vla.data.write import Clip, Episode, write
from vlm4vla.sims.film import Film

SIZE, CHUNK, BATCH, EPISODE = 256, 4, 32, 100
LEROBOT = """
import json, sys, time
import numpy as np, torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
torch.set_num_threads(1)
folder, samples, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
chunk = {"action": [i / 5 for i in range(4)]}
d = LeRobotDataset("local/demos", root=folder, delta_timestamps=chunk, video_backend=backend)
order = np.random.default_rng(0).integers(0, len(d), samples)
for i in order[:20]:
    d[int(i)]
start, wall = time.process_time(), time.perf_counter()
for i in order:
    d[int(i)]
print(json.dumps([samples / (time.process_time() - start), samples / (time.perf_counter() - wall)]))
"""


def record(folder: Path, num_frames: int) -> Dataset:
    """Episodes of a moving texture: about as hard to compress as a camera's pictures."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(24, 24, 3))
    texture = np.kron(coarse, np.ones((24, 24, 1))) * 40 + rng.normal(size=(576, 576, 3)) * 6 + 128
    texture = texture.clip(0, 255).astype(np.uint8)
    with Film(folder.with_name("film.mp4"), BRIDGE.control_hz, (SIZE, SIZE)) as film:
        episodes = []
        for _ in range(num_frames // EPISODE):
            x, y = rng.integers(0, 200, 2)
            at = [(x + i, y + i // 2) for i in range(EPISODE)]
            pictures = np.stack([texture[b : b + SIZE, a : a + SIZE] for a, b in at])
            numbers = rng.normal(size=(EPISODE, 9)).astype(np.float32)
            numbers[:, 6] = numbers[:, 6] > 0
            parts = {"main": pictures}, numbers[:, :7], numbers[:, 7:], "put the carrot on the plate", {"main": film}
            episodes.append(Episode.encode(*parts))
    write(folder, episodes, BRIDGE, {})
    return Dataset.open(folder)


def numbers_only(folder: Path, num_frames: int) -> None:
    """A folder of ``num_frames`` whose film is never looked into."""
    rng, film = np.random.default_rng(0), folder.with_name("empty.mp4")
    film.touch()
    length, pixels = 400, {"main": np.ones((3, 256), int)}
    sizes = {"main": (SIZE, SIZE)}

    def episode(i: int) -> Episode:
        numbers = rng.normal(size=(length, 14)).astype(np.float32)
        return Episode(
            {}, {"main": Clip(film, i * length / 5)}, pixels, sizes, numbers[:, :7], numbers[:, 7:], "a task"
        )

    write(folder, (episode(i) for i in range(num_frames // length)), BRIDGE, {})


def rate(sample: Callable[[np.ndarray], object], num_frames: int, samples: int) -> tuple[float, float]:
    """Samples a second of CPU time, and of wall time."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, num_frames, BATCH) for _ in range(max(1, samples // BATCH))]
    sample(batches[0])
    start, wall = time.process_time(), time.perf_counter()
    for batch in batches:
        sample(batch)
    count = BATCH * len(batches)
    return count / (time.process_time() - start), count / (time.perf_counter() - wall)


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot", help="an interpreter that imports lerobot")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--large", type=int, default=2_000_000, help="frames of the folder that is only opened")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "demos"
        dataset = record(folder, arguments.frames)
        film = folder / "videos/observation.images.main/chunk-000/file-000.mp4"
        print(
            f"{dataset.num_frames} frames, {film.stat().st_size / dataset.num_frames / 1024:.1f} kB a frame", flush=True
        )
        rows: dict[str, tuple[float, float]] = {}
        for backend in ("torchcodec", "pyav") if arguments.lerobot else ():
            command = [arguments.lerobot, "-c", LEROBOT, str(folder), str(arguments.samples), backend]
            env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{work}/cache"}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            if done.returncode:
                print(f"lerobot with {backend} fails: {done.stderr.strip().splitlines()[-1]}")
                continue
            rows[f"lerobot, {backend}"] = tuple(json.loads(done.stdout.splitlines()[-1]))

        def from_films(indices: np.ndarray) -> object:
            return dataset.images(indices), windows(dataset, indices, CHUNK)

        rows["ours, MP4"] = rate(from_films, dataset.num_frames, arguments.samples)
        before = memory_mb()
        rate(from_films, dataset.num_frames, dataset.num_frames)
        print(f"memory over an epoch from MP4: {before:.0f} -> {memory_mb():.0f} MB")
        cache = frames(dataset, size=224)
        rows["ours, cache (224 x 224)"] = rate(
            lambda i: (cache[i], windows(dataset, i, CHUNK)), dataset.num_frames, 50 * arguments.samples
        )
        peer = max([each[0] for name, each in rows.items() if name.startswith("lerobot")], default=None)
        for name, (cpu, wall) in rows.items():
            ratio = f"{cpu / peer:8.1f} x lerobot" if peer else ""
            print(f"{name:26}{cpu:10.0f} a CPU-second{wall:10.0f} a second{ratio}", flush=True)

        numbers_only(Path(work) / "large", arguments.large)
        start, wall = time.process_time(), time.perf_counter()
        large = Dataset.open(Path(work) / "large")
        opened = time.process_time() - start, time.perf_counter() - wall
        Statistics.of(large.actions)
        both = time.process_time() - start, time.perf_counter() - wall
        print(
            f"{large.num_frames} frames: opened in {opened[0]:.2f} CPU-s ({opened[1]:.2f} s), with exact statistics of"
        )
        print(f"{large.actions.shape[1]} dimensions in {both[0]:.2f} CPU-s ({both[1]:.2f} s)")


if __name__ == "__main__":
    main()
