"""A simulator without physics and a policy for it: quick, seeded, and able to fail on demand."""

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.errors import UserError
from vlm4vla.sims.base import StepOutcome
from vlm4vla.sims.protocols import Protocol
from vlm4vla.types import ActionChunk, Observation

CONVENTION = Convention(
    names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    control="delta_ee",
    frame="base",
    rotation="euler_xyz",
    position_unit="metre",
    gripper="1=open,0=closed",
    control_hz=5.0,
    camera="upright",
)
FIRST_SEED = 1000


class FakeSim:
    """A point on a line must come to 0; how strongly it obeys depends on the seed, so that some episodes fail.

    ``trouble`` maps a seed to what happens in the second ``execute`` of its episode: ``crash``, ``hang`` or ``raise``;
    with a ``scar`` folder, only on the first start of that episode. ``deaths`` is a folder: each file in it kills one
    process that builds a simulator, and is gone.
    """

    convention = CONVENTION

    def __init__(
        self,
        image_size=8,
        max_steps=12,
        trouble=None,
        scar=None,
        step_s=0.0,
        reset_s=0.0,
        refuse=False,
        deaths=None,
        cameras=("main",),
    ):
        for death in Path(deaths).iterdir() if deaths else ():
            with contextlib.suppress(FileNotFoundError):
                death.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        if refuse:
            raise UserError("a simulator without assets", "assets", "fetch them")
        print("a library that prints to stdout")
        self.image_size, self.max_steps, self.step_s, self.reset_s = image_size, max_steps, step_s, reset_s
        self.trouble, self.scar, self.cameras = trouble or {}, scar, cameras

    def reset(self, seed):
        if seed < 0:
            raise ValueError("negative seed")
        time.sleep(self.reset_s)
        rng = np.random.default_rng(seed)
        self.seed, self.steps, self.calls = seed, 0, 0
        self.x, self.gain = rng.uniform(0.2, 1.0), rng.uniform(0.05, 0.6)

    def execute(self, actions):
        self.calls += 1
        if self.calls == 2:
            self._act_up(self.trouble.get(str(self.seed)))
        done = success = False
        count = 0
        for action in actions:
            self.x += self.gain * float(action[0])
            time.sleep(self.step_s)
            self.steps += 1
            count += 1
            success = abs(self.x) < 0.1
            done = success or self.steps >= self.max_steps
            if done:
                break
        return StepOutcome(count, done, success, {"execution": True, "recognition": np.bool_(success)})

    def _act_up(self, how):
        if how is None or (self.scar and (Path(self.scar) / str(self.seed)).exists()):
            return
        if self.scar:
            (Path(self.scar) / str(self.seed)).touch()
        if how == "crash":
            os.write(2, b"last words of the simulator")
            os.abort()
        elif how == "hang":
            time.sleep(600)
        raise RuntimeError("the physics exploded")

    def observe(self):
        image = np.full((self.image_size, self.image_size, 3), round(np.clip(self.x * 100 + 63, 0, 255)), np.uint8)
        return Observation({camera: image for camera in self.cameras}, f"go to 0 (seed {self.seed})")

    def close(self):
        pass


class OneEyed(FakeSim):
    def __init__(self, image_size=8, max_steps=12):
        super().__init__(image_size, max_steps)


class FakePolicy:
    """Moves by what the picture shows; counts what it was asked."""

    def __init__(self, convention=CONVENTION, chunk=4, delay_s=0.0):
        self.convention, self.chunk, self.delay_s, self.batches = convention, chunk, delay_s, []

    def predict(self, observations):
        self.batches.append(len(observations))
        time.sleep(self.delay_s)
        chunks = []
        for observation in observations:
            actions = np.zeros((self.chunk, 7), np.float32)
            actions[:, 0] = 0.63 - float(observation.images["main"][0, 0, 0]) / 100
            chunks.append(ActionChunk(actions, self.convention))
        return chunks


class FakeProtocol(Protocol):
    def to_dict(self):
        """Trouble is the machine's and no part of what is measured."""
        return super().to_dict() | {"sim_args": {}}


def protocol(name="fake/line/v1", execute=3, ensemble=None, num_episodes=None, **sim_args):
    return FakeProtocol(
        name=name,
        sim="fake_sim:FakeSim",
        sim_args=sim_args,
        first_seed=FIRST_SEED,
        max_steps=12,
        execute=execute,
        ensemble=ensemble,
        num_episodes=num_episodes,
    )


def die(*_):
    """A rendering process that ends."""
    os._exit(1)


def hang(path, *_):
    """A rendering process that writes its id to ``path`` and does not end by itself."""
    path.write_text(str(os.getpid()))
    time.sleep(600)
