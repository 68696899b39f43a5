"""How fast a policy trains, with random weights: this project's loop against a plain one, in the same run.

    python benchmarks/train_throughput.py                                              # the embedded VLM, on the CPU
    python benchmarks/train_throughput.py --backbone Qwen/Qwen3-VL-2B-Instruct --image-size 224 --batch-size 128 \
        --precision bf16

The plain loop is what one writes first: the model's processor in the step, the whole forward pass with logits and with
transformers' own attention, the last hidden state picked from all of them, a number read back in each step. Model,
pictures, instructions, head and loss are the same. The floor is the time that the step's matrix products take at the
rate this device reaches on large ones, measured here. Of a named backbone its configuration and processor are read, no
weight.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vlm4vla.backbones.check import stock
from vlm4vla.backbones.load import load_config, load_processor
from vlm4vla.backbones.vlm import auto_class
from vlm4vla.convention import Convention
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.normalize import Normalizer
from vlm4vla.data.sources import Sources
from vlm4vla.data.write import Episode, write
from vlm4vla.heads.mlp import action_loss
from vlm4vla.metrics import read_metrics
from vlm4vla.policy import VLA, Policy, torch_device, untrained
from vlm4vla.sims.grinningface.env import CONVENTION
from vlm4vla.spec import DataSpec, RunSpec, Runtime, TrainSpec
from vlm4vla.training.compiled import compiled
from vlm4vla.training.examine import audit
from vlm4vla.training.forecast import matrix_rate
from vlm4vla.training.imitation import Imitation
from vlm4vla.training.loop import LOG_EVERY, fit, make_batch

INSTRUCTIONS = ["place the block on cat face", "pick the block and place it on ant", "place it on red apple"]


def demonstrations(folder: Path, size: int, convention: Convention) -> Dataset:
    """24 episodes of 32 frames of noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, size, size, 3), np.uint8)
    actions = rng.normal(size=(24, 32, 7)).astype(np.float32)
    actions[..., -1] = actions[..., -1] > 0
    episodes = (Episode.encode({"main": images}, a, None, INSTRUCTIONS[i % 3]) for i, a in enumerate(actions))
    write(folder, episodes, convention, {})
    return Dataset.open(folder)


def drawn(spec: RunSpec, actions: np.ndarray, image_size: int, device: torch.device) -> Policy:
    """A policy with random weights."""
    config, processor = load_config(spec.backbone), load_processor(spec.backbone)
    torch.manual_seed(0)
    with torch.device(device):
        vlm = auto_class(config).from_config(config, dtype=torch.float32)
        vla = untrained(vlm, processor, spec)
    return Policy(vla, spec, CONVENTION, Normalizer.fit(actions), None, image_size, {})


class Plain(torch.nn.Module):
    """The whole model, its last hidden state at the last token of each prompt, the head."""

    def __init__(self, vla: VLA):
        super().__init__()
        self.vla = vla

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with stock(self.vla.backbone):
            output = self.vla.backbone.vlm(**inputs, output_hidden_states=True)
        states = output.hidden_states if output.hidden_states is not None else [output.last_hidden_state]
        last = inputs["attention_mask"].sum(1) - 1
        return self.vla.head(states[-1][torch.arange(len(last), device=last.device), last].float())


def plain(objective: Imitation, spec: RunSpec, device: torch.device, steps: int) -> float:
    """Samples a second of the loop one writes first; the first step is not counted."""
    model = Plain(objective.vla).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs_of, dtype = objective.vla.backbone.inputs, torch.bfloat16
    started = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        batch = make_batch(objective, spec.training, 0, step)
        texts = [inputs_of.prompt(INSTRUCTIONS[i % 3]) for i in range(len(batch["target"]))]
        inputs = inputs_of.native(list(objective.inputs(batch)["images"].numpy()), texts)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device.type, dtype, enabled=spec.training.precision == "bf16"):
            pose, gripper = model(inputs)
            loss, _ = action_loss(pose, gripper, batch["target"].to(device), batch["valid"].to(device), 0.01)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return steps * spec.training.batch_size / (time.perf_counter() - started)


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the process, since it began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--treatment", default="full")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=3 * LOG_EVERY, help="Of each loop; the first ten are not counted.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="In this project's loop.")
    options = parser.parse_args()
    device = torch_device(options.device)
    training = TrainSpec(steps=options.steps, batch_size=options.batch_size, precision=options.precision)
    spec = RunSpec(
        backbone=options.backbone, treatment=options.treatment, data=DataSpec(folder="noise"), training=training
    )
    how = {"accumulate": options.accumulate, "compile": options.compile}
    runtime = Runtime(device=str(device), progress=False, checkpoint_s=1e9, **how)
    rate = matrix_rate(device, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        dataset = demonstrations(Path(folder) / "data", options.image_size, CONVENTION)
        policy = drawn(spec, dataset.actions, dataset.image_size, device)
        objective = Imitation(policy, Sources((dataset,)), one_shape=options.compile)
        if options.gradient_checkpointing:
            objective.vla.backbone.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        vla = objective.vla
        tokens = vla.backbone.encode(np.zeros((1, *[options.image_size] * 2, 3), np.uint8), INSTRUCTIONS[:1])
        length = tokens["input_ids"].shape[1]
        objective.export = lambda folder, state: None  # the weights are of no use
        with compiled(vla, runtime):
            fit(objective, training, 0, Path(folder) / "out", runtime, "benchmark")
        rows = read_metrics(Path(folder) / "out" / "metrics.jsonl")[1:]
        ours = 1 / np.mean([1 / row["samples_per_s"] for row in rows])
        wait = float(np.mean([row["data_wait"] for row in rows]))
        ours_gib = peak_gib(device)
        theirs = plain(objective, spec, device, min(options.steps, 2 * LOG_EVERY))
        theirs_gib = peak_gib(device)
        flops = audit(vla, vla.backbone.processor, spec, options.image_size).sizes["training_gflop"] * 1e9
    floor = rate / flops
    print(f"{options.backbone}, {options.treatment}, {options.image_size} px, batch {options.batch_size}, {device}")
    print(f"matrix rate {rate / 1e12:.3f} TFLOP/s in {options.precision}; {flops / 1e9:.2f} GFLOP a sample (estimate)")
    print(f"{'loop':<8}{'samples/s':>12}{'tokens/s':>12}{'of the rate':>13}{'data wait':>11}{'peak GiB':>10}")
    print(f"{'floor':<8}{floor:>12.1f}{floor * length:>12.0f}{1:>13.0%}")
    print(f"{'ours':<8}{ours:>12.1f}{ours * length:>12.0f}{ours / floor:>13.1%}{wait:>11.1%}{ours_gib:>10.2f}")
    print(f"{'plain':<8}{theirs:>12.1f}{theirs * length:>12.0f}{theirs / floor:>13.1%}{'-':>11}{theirs_gib:>10.2f}")
    print(f"ours / plain: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
