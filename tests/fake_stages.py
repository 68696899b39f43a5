"""Stand-ins for recording, training and the policy, so that the study runner is tested without torch.

What they do is written to ``calls.txt`` beside the study's ``data`` folder. A learning rate above 1 makes training
fail, one of exactly 0.25 without a word; one of exactly 0.5 makes it kill its own process, once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import fake_sim
from vlm4vla.audit import Audit


def note(folder: Path, text: str) -> None:
    with (folder / "calls.txt").open("a") as file:
        file.write(text + "\n")


def record(data, folder, workers, progress):
    if (folder / "whole").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    note(folder.parent.parent, "record")
    (folder / "whole").touch()


def train(spec, data_folder, out, runtime):
    if (out / "policy").exists():
        return
    assert (data_folder / "whole").exists()
    out.mkdir(parents=True, exist_ok=True)
    note(out.parent.parent, f"train {spec.run_id}")
    if spec.training.learning_rate > 1:
        raise RuntimeError("the loss is not finite")
    if spec.training.learning_rate == 0.25:
        raise MemoryError
    for step in range(1, spec.training.steps + 1):
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        time.sleep(0.002)
    if spec.training.learning_rate == 0.5 and not (out / "died").exists():
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    number = spec.training.checkpoints
    for i in range(1, number):
        save(out / "policies" / f"step-{round(spec.training.steps * i / number):06d}", spec, i / number)
    save(out / "policy", spec, 1.0)


def save(folder, spec, skill):
    folder.mkdir(parents=True)
    skill *= 0.4 if spec.treatment == "scratch" else 1.0
    card = {"data_hash": "d" * 10, "backbone_hash": "tiny weights", "versions": {"torch": "none"}}
    values = {"skill": skill, "card": card}
    (folder / "policy.json").write_text(json.dumps(values))


def load_vlm(name):
    return f"{name} weights", None


class Sources:
    content_hash = "d" * 10

    @classmethod
    def open(cls, data, folder):
        assert (folder / "whole").exists()
        assert all(Path(source.conversations).exists() for source in data.mixture)
        return cls()


class Policy(fake_sim.FakePolicy):
    image_size = 8

    @classmethod
    def load(cls, folder):
        note(folder.parents[2] if folder.name == "policy" else folder.parents[3], f"load {folder.name}")
        policy = cls()
        policy.skill = json.loads((folder / "policy.json").read_text())["skill"]
        return policy

    def for_acting(self, device):
        return self

    def predict(self, observations):
        time.sleep(float(os.environ.get("FAKE_LATENCY", "0")))
        chunks = super().predict(observations)
        for chunk in chunks:
            chunk.actions[:] *= self.skill
        return chunks


def protocol(name):
    from vlm4vla.errors import UserError

    if not name.startswith("fake/"):
        raise UserError(f"no protocol {name!r}", "a fake one", "mend its name")
    return fake_sim.protocol(name)


def install(set_module=sys.modules.__setitem__, set_attribute=setattr) -> None:
    """Put the stand-ins where the runner looks for the real ones."""
    from vlm4vla.sims import protocols

    for name, members in {
        "vlm4vla.backbones.load": {"load_vlm": load_vlm},
        "vlm4vla.backbones.vlm": {"parameters_hash": lambda vlm: vlm},
        "vlm4vla.data.sources": {"Sources": Sources},
        "vlm4vla.data.record": {"record": record},
        "vlm4vla.training.imitation": {"train": train},
        "vlm4vla.training.examine": {"examine": lambda spec, size: Audit({"prompt": spec.backbone}, {"size": size})},
        "vlm4vla.policy": {"Policy": Policy, "torch_device": str},
        "torch": {"set_num_threads": lambda threads: None},
    }.items():
        module = ModuleType(name)
        for key, value in members.items():
            setattr(module, key, value)
        set_module(name, module)
    set_attribute(protocols, "protocol", protocol)
