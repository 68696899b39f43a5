"""Success of the scripted expert per level, with its Wilson interval, and the CPU time per step, render and reset.

``python benchmarks/expert.py [--episodes 1000] [--noise 0.02] [--variant base]``
"""

import argparse
import time

import numpy as np

from vlm4vla.sims.grinningface.env import GrinningFace
from vlm4vla.sims.grinningface.episode import LEVELS, VARIANTS
from vlm4vla.sims.protocols import DEV_SEED

DISTURBED = 0.4
"""Fraction of executed actions that are disturbed, as in recordings."""


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    p, d = k / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (p + z * z / (2 * n) - half) / d, (p + z * z / (2 * n) + half) / d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--noise", type=float, default=0.0, help="std in metres of the disturbance of executed actions")
    parser.add_argument("--variant", choices=VARIANTS, default="base")
    parser.add_argument("--split", choices=("train", "val", "hard"), default="train")
    args = parser.parse_args()
    for level in LEVELS:
        env = GrinningFace(level, args.split, args.variant, max_steps=50 if level == "pick_place" else 30)
        rng, lengths, failed, limited = np.random.Generator(np.random.PCG64(0)), [], [], 0
        reset_s = step_s = 0.0
        for seed in range(DEV_SEED, DEV_SEED + args.episodes):
            start = time.process_time()
            env.reset(seed)
            reset_s += time.process_time() - start
            start, outcome = time.process_time(), None
            while outcome is None or not outcome.done:
                action = env.expert()
                if args.noise and rng.random() < DISTURBED:
                    action[:3] += rng.normal(0, args.noise, 3)
                outcome = env.execute(action[None])
            step_s += time.process_time() - start
            lengths.append(env.steps)
            limited += env.limited_steps
            if not outcome.success:
                failed.append((seed, outcome.credits))
        env.observe()
        start = time.process_time()
        for _ in range(50):
            env.observe()
        render_ms = (time.process_time() - start) / 50 * 1e3
        won = args.episodes - len(failed)
        low, high = wilson(won, args.episodes)
        print(
            f"{level}: {won}/{args.episodes} = {won / args.episodes:.2%} [{low:.2%}, {high:.2%}]; steps mean "
            f"{np.mean(lengths):.1f}, most {max(lengths)}, limited {limited}; per control step "
            f"{step_s / sum(lengths) * 1e3:.2f} ms, reset {reset_s / args.episodes * 1e3:.2f} ms, "
            f"render {render_ms:.2f} ms"
        )
        for seed, credit in failed[:10]:
            print("  failed:", seed, credit)


if __name__ == "__main__":
    main()
