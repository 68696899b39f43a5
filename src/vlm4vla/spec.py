"""What identifies a run. ``RunSpec`` hashes to a run id; how it is executed (``Runtime``) is not part of it.

Everything that can change a number is in ``RunSpec``; worker counts, devices, paths and trackers are in ``Runtime``, so
rerunning the same spec on another machine resumes the same run instead of starting a second one.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vlm4vla.errors import UserError, nearest
from vlm4vla.metrics import Tracker

Model = TypeVar("Model", bound=BaseModel)
Mode = Literal["quantile", "min_max", "mean_std", "fixed", "none"]
"""Of normalisation; what each does: ``data/normalize.py``."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Compat = Literal["upsample_448"]
QueryInit = Literal["zero", "normal"]


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


class SourceSpec(Strict):
    """One more source of samples beside a run's demonstrations: a robot set, or conversations about pictures."""

    folder: str | None = None
    """A LeRobotDataset folder whose actions mean what those of the demonstrations mean."""
    conversations: str | None = None
    """A ``.json`` or ``.jsonl`` file in LLaVA's or ShareGPT's form (``data/vqa.py``)."""
    images: str | None = None
    """Folder that the paths of the conversations' pictures start from; without it, the file's own."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Samples of it that are drawn for each one of the demonstrations."""

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceSpec":
        if (self.folder is None) == (self.conversations is None):
            raise ValueError("name a source by folder or by conversations, one of the two")
        if self.images is not None and self.conversations is None:
            raise ValueError("images given, which conversations have and a folder has not")
        return self


class DataSpec(Strict):
    """The demonstrations: a recording of ``protocol``'s expert, or a folder that already exists."""

    protocol: str | None = "grinningface/place/train/v1"
    """Whose simulator and variant the expert is recorded in (with demonstration seeds), e.g.
    ``grinningface/place/train/v1``."""
    episodes: int = Field(default=400, ge=1)
    seed: int = Field(default=0, ge=0, lt=100)
    image_size: int | None = Field(default=96, ge=16)
    """Side in pixels: of what is recorded, or of what a folder's pictures are resized to (None, the default there: they
    stay as they are and must be square)."""
    noise: float = Field(default=0.02, ge=0)
    """Standard deviation in metres of the disturbance put on some executed actions (the recorded label stays clean)."""
    folder: str | None = None
    """A LeRobotDataset v3 folder to use instead of a recording."""
    mixture: tuple[SourceSpec, ...] = later(())
    """What is drawn beside the demonstrations; frames have the action loss, conversations the language loss."""

    @model_validator(mode="before")
    @classmethod
    def _folder_or_protocol(cls, values: Any) -> Any:
        """A folder takes the place of the default recording; to name both, or neither, is an error."""
        if not isinstance(values, dict):
            return values  # pydantic says what is wrong with it
        default = cls.model_fields["protocol"].default if values.get("folder") is None else None
        given = {"protocol": default, **values}
        if given.get("folder") is not None:
            given.setdefault("image_size", None)
        elif given.get("image_size", 0) is None:
            raise ValueError("data.image_size is missing: the recording needs one")
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
    augment: Literal["jitter_and_shift", "crop_and_colour"] = later("jitter_and_shift")
    """``jitter_and_shift``: by the two numbers above. ``crop_and_colour``: the paper's for Bridge and LIBERO."""
    language_weight: float = later(1.0, gt=0)
    """Weight of the language loss (a mean over answers' tokens) beside the action loss."""
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoints: int = Field(default=1, ge=1)
    """Policies kept, equally spaced over training (the last one is the result): success over training steps."""

    @model_validator(mode="after")
    def _augmentation(self) -> "TrainSpec":
        fields = type(self).model_fields
        given = [n for n in ("image_jitter", "image_shift") if getattr(self, n) != fields[n].default]
        if given and self.augment != "jitter_and_shift":
            raise ValueError(f"{', '.join(given)} given, which the augmentation jitter_and_shift has and no other")
        return self


class GroupSpec(Strict):
    """What happens to one group of a VLM's parameters. ``frozen`` alone is short for ``{mode: frozen}``."""

    mode: Literal["trained", "frozen", "lora", "scratch"] = "trained"
    """``lora``: frozen, with low-rank adapters beside it that are trained. ``scratch``: drawn anew, then trained."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak of this group's own. Without one: ``training.learning_rate``, times ``training.vlm_lr_scale`` where the
    parameters come from the VLM (adapters and new draws do not)."""
    rank: int | None = Field(default=None, ge=1)
    """Of the adapters; 32 where none is given, as in OpenVLA's fine-tuning."""
    alpha: int | None = Field(default=None, ge=1)
    """The adapters' output is scaled by alpha / rank; 16 where none is given, as in OpenVLA's fine-tuning."""
    targets: tuple[str, ...] | None = None
    """Linear layers that get an adapter, by the last part of their name (``q_proj``); without any: all of the group."""

    @model_validator(mode="before")
    @classmethod
    def _by_mode(cls, values: Any) -> Any:
        values = {"mode": values} if isinstance(values, str) else values
        if not isinstance(values, dict):
            return values  # pydantic says what is wrong with it
        if values.get("mode") == "lora":
            return {"rank": 32, "alpha": 16, **{name: value for name, value in values.items() if value is not None}}
        if given := [name for name in ("rank", "alpha", "targets") if values.get(name) is not None]:
            raise ValueError(f"{', '.join(given)} given, which mode lora has and no other")
        if values.get("mode") == "frozen" and values.get("learning_rate") is not None:
            raise ValueError("a learning rate for frozen parameters")
        return values


class HeadGroupSpec(Strict):
    """What happens to the action query and the head, which are always new."""

    mode: Literal["trained", "frozen"] = "trained"
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak of their own; without one, ``training.learning_rate``."""

    @model_validator(mode="before")
    @classmethod
    def _by_mode(cls, values: Any) -> Any:
        return {"mode": values} if isinstance(values, str) else values


VLM_GROUPS = ("vision", "projector", "llm", "word_embedding")


class TreatmentSpec(Strict):
    """Which parameters are trained, kept, adapted or drawn anew, by group (``backbones/treatments.py``)."""

    name: str = Field(default="composed", pattern="^[a-z0-9_]+$")
    """What run ids and reports call it."""
    vision: GroupSpec = GroupSpec()
    projector: GroupSpec = GroupSpec()
    llm: GroupSpec = GroupSpec()
    word_embedding: GroupSpec = GroupSpec()
    head: HeadGroupSpec = HeadGroupSpec()

    @model_validator(mode="after")
    def _possible(self) -> "TreatmentSpec":
        if self.word_embedding.mode == "lora":
            raise ValueError("adapters are for linear layers: train or freeze word_embedding")
        if {self.head.mode, *(group.mode for group in self.groups().values())} == {"frozen"}:
            raise ValueError("every group is frozen, so nothing would be trained: leave the head trained at least")
        if self.name in TREATMENTS and self != TREATMENTS[self.name]:
            raise ValueError(f"{self.name!r} is the name of another treatment")
        return self

    def groups(self) -> dict[str, GroupSpec]:
        """The VLM's, without the head's."""
        return {name: getattr(self, name) for name in VLM_GROUPS}


TREATMENTS: dict[str, TreatmentSpec] = {}
"""The named ones. ``freeze_vlm`` trains query and head only; ``lora`` has adapters on every linear layer of the VLM."""
for _name, _groups in {
    "full": {},
    "freeze_vision": {"vision": "frozen"},
    "freeze_word_embedding": {"word_embedding": "frozen"},
    "freeze_llm": {"llm": "frozen"},
    "freeze_vlm": dict.fromkeys(VLM_GROUPS, "frozen"),
    "lora": {"vision": "lora", "projector": "lora", "llm": "lora", "word_embedding": "frozen"},
    "scratch": dict.fromkeys(VLM_GROUPS, "scratch"),
    "scratch_vision": {"vision": "scratch"},
}.items():
    TREATMENTS[_name] = TreatmentSpec.model_validate({"name": _name, **_groups})


def _known_treatment(name: Any) -> Any:
    if name not in TREATMENTS:
        known = nearest(str(name), list(TREATMENTS))
        raise PydanticCustomError("treatment", "no treatment of that name (nearest: {known})", {"known": known})
    return name


NAMED, COMPOSED = "named", "composed"
Treatment = Annotated[
    Annotated[str, BeforeValidator(_known_treatment), Tag(NAMED)] | Annotated[TreatmentSpec, Tag(COMPOSED)],
    Discriminator(lambda value: COMPOSED if isinstance(value, dict | TreatmentSpec) else NAMED),
]
"""One of ``TREATMENTS``, or the groups of a ``TreatmentSpec``."""


class RunSpec(Strict):
    """One policy: a backbone under a treatment, trained on data with a seed."""

    backbone: str = "tiny"
    """``tiny`` (the embedded VLM), a local folder, or a hub id of an image-text-to-text model."""
    treatment: Treatment = "full"
    """A name, or ``{name: ..., vision: frozen, llm: {mode: lora, rank: 8}, ...}``: groups left out are trained."""
    head: HeadSpec = HeadSpec()
    data: DataSpec = DataSpec()
    training: TrainSpec = TrainSpec()
    proprioception: bool = False
    """Give the head the robot's state as well. The paper gives it nothing but one camera and the instruction."""
    compat: tuple[Compat, ...] = later(())
    """Behaviour of VLM4VLA's release to be reproduced, by name (docs/deviations.md)."""
    query_init: QueryInit = later("zero")
    """The action query at first: zero as in VLM4VLA's release, or drawn with the spread of the word embeddings."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _language(self) -> "RunSpec":
        weight = TrainSpec.model_fields["language_weight"].default
        if any(source.conversations for source in self.data.mixture):
            if all(group.mode == "frozen" for group in self.treated.groups().values()):
                raise ValueError("conversations in data.mixture, and a treatment that trains nothing of the VLM")
        elif self.training.language_weight != weight:
            raise ValueError("training.language_weight given, and no conversations in data.mixture")
        return self

    @property
    def run_id(self) -> str:
        """``<treatment>-s<seed>-<10 hex digits of the content hash>``."""
        return f"{self.treated.name}-s{self.seed}-{content_hash(self.model_dump(mode='json'))}"

    @property
    def treated(self) -> TreatmentSpec:
        """The treatment in full, named or composed."""
        return TREATMENTS[self.treatment] if isinstance(self.treatment, str) else self.treatment


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
    accumulate: int = Field(default=1, ge=1)
    """Parts in which each process works through its share of a batch: less memory, the same batch."""
    gradient_checkpointing: bool = False
    """Layers' activations are computed once more on the way back instead of being kept: less memory, a third slower."""
    compile: bool = False
    """Layers are compiled (``training/compiled.py``): faster where a family's layers allow it."""
    shard: bool = False
    """Spread weights, gradients and moments over the processes (FSDP2) instead of repeating them in each (DDP)."""
    trackers: tuple[Tracker, ...] = ()
    """What ``metrics.jsonl`` has is told them as well, through accelerate."""
    cache: bool = True
    """Decode all pictures once into a file beside the data set (3 bytes a pixel), instead of each time."""
    progress: bool = True


def content_hash(values: object) -> str:
    """10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:10]


def yaml_file(name: str, what: str, folder: Path) -> Path:
    """The path of ``what`` by its name: a YAML file as given, else one that ships in ``folder``.

    Raises:
        UserError: neither; the nearest names are told.
    """
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if path := Path(name) if Path(name).is_file() else shipped.get(name):
        return path
    raise UserError(
        f"no {what} {name!r} (nearest: {nearest(name, list(shipped))})",
        f"one of {', '.join(shipped)}, or a YAML file",
        "name one of them, or check the path",
    )


def load_yaml(path: Path | str) -> dict:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}", "a YAML file", f"check the path: ls {path.parent}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}", "valid YAML", f"mend {path}") from error
    if not isinstance(values, dict):
        held = type(values).__name__ if values else "nothing"
        raise UserError(f"{path} holds {held}", "a mapping of keys to values", f"mend {path}")
    return values


def parse(model: type[Model], values: dict, source: str) -> Model:
    """Validate ``values`` against ``model``; a ``UserError`` names each wrong key, what is allowed and the source."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = [part for part in item["loc"] if part not in (NAMED, COMPOSED)]  # a union's tags are no keys
            where = ".".join(map(str, place)) or "(top level)"
            if item["type"] == "extra_forbidden":
                *sections, key = place
                section: Any = model
                for name in (part for part in sections if isinstance(part, str)):  # a list's places are no keys
                    field = getattr(section, "model_fields", {}).get(name)
                    section = _section(field.annotation) if field else None
                known = list(getattr(section, "model_fields", {}))
                hint = f" (nearest: {nearest(str(key), known)})" if known else ""
                problems.append(f"{where}: unknown key{hint}")
            else:
                said = item["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
                problems.append(f"{where}: {said}, found {item['input']!r}")
        raise UserError(
            f"{source}: " + "; ".join(problems),
            f"the keys of {model.__name__} in src/{model.__module__.replace('.', '/')}.py",
            f"mend {source}",
        ) from error


def _section(annotation: Any) -> Any:
    """The model in a field's annotation, also where it is one of a union's."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
