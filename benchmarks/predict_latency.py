"""How long a policy takes to answer, with random weights: this project's way, a plain one and the floor, in one run.

    python benchmarks/predict_latency.py                                           # the embedded VLM, on the CPU
    python benchmarks/predict_latency.py --backbone Qwen/Qwen3-VL-2B-Instruct --image-size 224 --precision bf16 \
        --compile

`predict` is `Policy.predict`, from observations to actions in native units. The floor is the same VLM's forward pass
alone, on inputs that lie on the device. The plain way is what one writes first: the model's whole processor on each
observation, the whole forward pass with logits. They take turns, so that other work on the machine meets all alike.
Below stands where the time of `predict` goes (means, measured apart, for on a GPU measuring waits for each part).
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from train_throughput import INSTRUCTIONS, Plain, drawn

import vlm4vla.policy
from vlm4vla.policy import Policy, torch_device
from vlm4vla.spec import DataSpec, RunSpec, Runtime, TrainSpec
from vlm4vla.training.compiled import compiled
from vlm4vla.types import Observation

WARM_UP = 3
"""Rounds that are not counted: kernels are chosen, instructions tokenised."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return (time.perf_counter() - started) * 1000


def computing(policy: Policy) -> torch.autocast:
    """The precision that ``predict`` computes in."""
    half = policy.spec.training.precision == "bf16"
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=half)


def floor(policy: Policy, look: list[Observation]) -> Callable[[], Any]:
    """The forward pass of the model below the LM head, on what ``predict`` gives it for ``look``."""
    core, seen = policy.vla.backbone.core, {}
    hook = core.register_forward_pre_hook(lambda _module, _args, values: seen.update(values), with_kwargs=True)
    policy.predict(look)
    hook.remove()

    @torch.no_grad()
    def call() -> None:
        with computing(policy):
            core(**seen)

    return call


def plain(policy: Policy, look: list[Observation]) -> Callable[[], Any]:
    model, inputs_of = Plain(policy.vla), policy.vla.backbone.inputs

    @torch.no_grad()
    def call() -> np.ndarray:
        texts = [inputs_of.prompt(observation.instruction) for observation in look]
        inputs = inputs_of.native([observation.images["main"] for observation in look], texts)
        with computing(policy):
            predicted = model({name: value.to(policy.device) for name, value in inputs.items()})
        return vlm4vla.policy.decode(*predicted).cpu()

    return call


@contextmanager
def parts(policy: Policy) -> Iterator[Counter[str]]:
    """While it lasts, the milliseconds that ``predict`` spends in each of its parts are added up."""
    spent: Counter[str] = Counter()
    backbone = policy.vla.backbone
    places = {
        "text": (backbone.inputs, "tokens"),
        "pictures": (backbone.inputs, "pixels"),
        "forward": (backbone.core, "forward"),
        "head": (policy.vla.head, "forward"),
    }

    def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result: list[Any] = []
            spent[name] += milliseconds(lambda: result.append(inner(*arguments, **options)), policy.device)
            return result[0]

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="And `predict` with compiled layers.")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, rng = torch_device(options.device), np.random.default_rng(0)
    training = TrainSpec(precision=options.precision)
    spec = RunSpec(backbone=options.backbone, data=DataSpec(folder="noise"), training=training)
    actions = rng.normal(size=(100, 7)).astype(np.float32)
    actions[:, -1] = actions[:, -1] > 0
    policy = drawn(spec, actions, options.image_size, device).for_acting(device)
    fast = drawn(spec, actions, options.image_size, device).for_acting(device) if options.compile else policy
    for each in (policy, fast):
        each.vla.eval()
    print(f"{options.backbone}, {options.image_size} px, {options.precision}, {device}; milliseconds")
    for batch in options.batches:
        images = rng.integers(0, 256, (batch, options.image_size, options.image_size, 3), np.uint8)
        look = [Observation({"main": image}, INSTRUCTIONS[i % len(INSTRUCTIONS)]) for i, image in enumerate(images)]
        calls = {
            "predict": partial(policy.predict, look),
            "floor": floor(policy, look),
            "plain": plain(policy, look),
        }
        if options.compile:
            calls["compiled"] = partial(fast.predict, look)
        with compiled(fast.vla, Runtime(compile=options.compile)):
            rounds = [[milliseconds(call, device) for call in calls.values()] for _ in range(WARM_UP + options.repeats)]
        with parts(policy) as spent:
            whole = sum(milliseconds(calls["predict"], device) for _ in range(options.repeats))
        spent["rest"] = whole - sum(spent.values())
        p50, p95 = np.percentile(rounds[WARM_UP:], [50, 95], axis=0)
        print(f"batch {batch}")
        for name, median, high in zip(calls, p50, p95, strict=True):
            print(f"  {name:<9} p50 {median:8.2f}   p95 {high:8.2f}   {median / p50[1]:5.2f} x the floor")
        print("  of which " + ", ".join(f"{name} {total / options.repeats:.2f}" for name, total in spent.items()))


if __name__ == "__main__":
    main()
