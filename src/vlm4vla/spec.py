"""What identifies a run. ``RunSpec`` hashes to a run id; how it is executed (``Runtime``) is not part of it.

Everything that can change a number is in ``RunSpec``; worker counts, devices, paths and trackers are in ``Runtime``, so
rerunning the same spec on another machine resumes the same run instead of starting a second one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm4vla.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)
Mode = Literal["quantile", "min_max", "mean_std", "fixed", "none"]
"""Of normalisation; what each does: ``data/normalize.py``."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Treatment = Literal["full", "freeze_vision", "freeze_word_embedding", "freeze_llm", "freeze_vlm", "scratch"]

Compat = Literal["upsample_448"]


def later(default: Any, **constraints: Any) -> Any:
    """A field that later versions brought: while it has its default it is left out of dumps, so that a run keeps its
    id and its files stay readable."""
    return Field(default=default, exclude_if=lambda value: value == default, **constraints)


class HeadSpec(Strict):
    """The action head: hidden state of the query -> action chunk."""

    kind: Literal["mlp"] = "mlp"
    chunk: int = Field(default=6, ge=1)
    """H, predicted actions per observation."""
    hidden: int = Field(default=1024, ge=1)
    """Width of the trunk's output. VLM4VLA's release: 1024."""
    gripper_weight: float = Field(default=0.01, ge=0)
    """Weight of the gripper's BCE beside the pose's Huber loss. VLM4VLA's release: 0.01."""
    normalize: Mode | tuple[Mode, ...] = later("quantile")
    """What the head's [-1, 1] stands for: one mode (``data/normalize.py``), or one for each pose dimension."""
    bound: float = later(1.0, gt=0)
    """Factor on that interval. ``fixed`` with 0.65: the paper's for CALVIN; ``quantile`` with 0.65: its release's
    double normalisation of RLDS data."""


class DataSpec(Strict):
    """The demonstrations: a recording of ``protocol``'s expert, or a folder that already exists."""

    protocol: str | None = "grinningface/place/train/v1"
    """Whose simulator and variant the expert is recorded in (with demonstration seeds), e.g.
    ``grinningface/place/train/v1``."""
    episodes: int = Field(default=400, ge=1)
    seed: int = Field(default=0, ge=0, lt=100)
    image_size: int = Field(default=96, ge=16)
    noise: float = Field(default=0.02, ge=0)
    """Standard deviation in metres of the disturbance put on some executed actions (the recorded label stays clean)."""
    folder: str | None = None
    """A LeRobotDataset v3 folder to use instead of a recording."""

    @model_validator(mode="before")
    @classmethod
    def _folder_or_protocol(cls, values: Any) -> Any:
        """A folder takes the place of the default recording; to name both, or neither, is an error."""
        if not isinstance(values, dict):
            return values  # pydantic says what is wrong with it
        default = cls.model_fields["protocol"].default if values.get("folder") is None else None
        given = {"protocol": default, **values}
        if (given["protocol"] is None) == (given.get("folder") is None):
            raise ValueError("name the demonstrations by data.protocol or by data.folder, one of the two")
        return given


class TrainSpec(Strict):
    """Optimisation of the policy."""

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak, for new parameters (query, head) and, where everything is new (``scratch``), for all."""
    vlm_lr_scale: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of parameters that come from the VLM. The paper uses one rate (1.0)."""
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=40, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up. The paper: constant."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the exponential moving average that is evaluated and saved; 0 switches it off."""
    image_jitter: float = Field(default=0.06, ge=0)
    """Half range of the per-image brightness and per-channel offset, in fractions of the pixel range."""
    image_shift: int = Field(default=2, ge=0)
    """Random shift in pixels at most (edges repeated); the paper's CALVIN augmentation, scaled to the image."""
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoints: int = Field(default=1, ge=1)
    """Policies kept, equally spaced over training (the last one is the result): success over training steps."""


class RunSpec(Strict):
    """One policy: a backbone under a treatment, trained on data with a seed."""

    backbone: str = "tiny"
    """``tiny`` (the embedded VLM), a local folder, or a hub id of an image-text-to-text model."""
    treatment: Treatment = "full"
    head: HeadSpec = HeadSpec()
    data: DataSpec = DataSpec()
    training: TrainSpec = TrainSpec()
    proprioception: bool = False
    """Give the head the robot's state as well. The paper gives it nothing but one camera and the instruction."""
    compat: tuple[Compat, ...] = later(())
    """Behaviour of VLM4VLA's release to be reproduced, by name (docs/deviations.md)."""
    seed: int = Field(default=0, ge=0)

    @property
    def run_id(self) -> str:
        """``<treatment>-s<seed>-<10 hex digits of the content hash>``."""
        return f"{self.treatment}-s{self.seed}-{content_hash(self.model_dump(mode='json'))}"


class EvalSpec(Strict):
    """What is done with each trained policy."""

    protocols: tuple[str, ...] = ("grinningface/place/train/v1", "grinningface/place/val/v1")
    episodes: int = Field(default=100, ge=1)
    curve_episodes: int = Field(default=0, ge=0)
    """Episodes of each kept policy before the last (``training.checkpoints``): success over training. 0: none."""


class Runtime(Strict):
    """How to execute, never what: not part of any identity."""

    workers: int = Field(default=2, ge=1)
    """Simulator or recording processes."""
    device: str = "auto"
    """``auto`` takes the first GPU torch sees, else the CPU, and says which; else as torch names them (``cuda:1``)."""
    threads: int = Field(default=1, ge=1)
    """BLAS threads of this process."""
    checkpoint_s: float = Field(default=60.0, ge=0)
    """Seconds between training checkpoints."""
    trackers: tuple[str, ...] = ()
    """``tensorboard``, ``wandb``, ``trackio``, through accelerate; the JSONL file is always written."""
    progress: bool = True


def content_hash(values: object) -> str:
    """10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:10]


def load_yaml(path: Path | str) -> dict:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}", "a YAML file", f"check the path: ls {path.parent}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}", "valid YAML", f"mend {path}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}", "a mapping of keys to values", f"mend {path}")
    return values


def parse(model: type[Model], values: dict, source: str) -> Model:
    """Validate ``values`` against ``model``; a ``UserError`` names each wrong key, what is allowed and the source."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "(top level)"
            if item["type"] == "extra_forbidden":
                *sections, key = item["loc"]
                section: Any = model
                for name in sections:
                    field = getattr(section, "model_fields", {}).get(name)
                    section = field.annotation if field else None
                known = list(getattr(section, "model_fields", {}))
                hint = f" (nearest: {nearest(str(key), known)})" if known else ""
                problems.append(f"{where}: unknown key{hint}")
            else:
                problems.append(f"{where}: {item['msg']}, found {item['input']!r}")
        raise UserError(
            f"{source}: " + "; ".join(problems),
            f"the keys of {model.__name__} in src/vlm4vla/spec.py",
            f"mend {source}",
        ) from error
