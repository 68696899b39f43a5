"""VLM -> VLA: backbone + action query + head; and the policy folder that opens alone. B batch, H chunk, A action.

Native units outside, normalised inside. A policy folder holds ``policy.json`` (spec, statistics, convention, versions),
``action.safetensors`` (query and head) and ``vlm/`` (a plain transformers folder with its processor). Where a treatment
has adapters, ``adapter/`` takes the place of ``vlm/``: peft's files, and ``beside.safetensors`` with what else was
trained in the VLM; such a folder needs the VLM that it was trained on, whose weights are compared by their hash.
"""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm4vla import __version__, hub
from vlm4vla.backbones import adapters, experts, treatments
from vlm4vla.backbones.inputs import Processor
from vlm4vla.backbones.load import load_vlm
from vlm4vla.backbones.vlm import Backbone, parameters_hash, save_vlm
from vlm4vla.convention import Convention
from vlm4vla.data.normalize import Normalizer
from vlm4vla.errors import UserError
from vlm4vla.heads.mlp import MLPHead, decode
from vlm4vla.spec import RunSpec, parse
from vlm4vla.types import ActionChunk, Observation

FORMAT = 1
ACTION, ADAPTER, BESIDE = "action.safetensors", "adapter", "beside.safetensors"
VLM = "backbone.vlm."
"""Where a ``VLA`` keeps the VLM: the prefix of its parameters' names."""


class VLA(nn.Module):
    """A VLM with one action query and a head."""

    def __init__(self, vlm: PreTrainedModel, processor: Processor, spec: RunSpec, state_size: int):
        super().__init__()
        self.backbone = Backbone(vlm, processor, spec.compat, spec.query_init)
        self.state_size = state_size
        self.head = MLPHead(self.backbone.hidden_size, spec.head.chunk, spec.head.hidden, state_size)

    def forward(self, inputs: dict[str, Tensor], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs of ``Backbone.encode`` (and normalised state (B, S) with proprioception) -> the head's predictions."""
        return self.read(self.backbone(inputs), state)

    def read(self, hidden: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The query's hidden state (B, D) -> the head's predictions."""
        return self.head(hidden if state is None else torch.cat([hidden, state], -1))

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What the VLM did not have: query and head."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(VLM)}


def untrained(vlm: PreTrainedModel, processor: Processor, spec: RunSpec, state_size: int = 0) -> VLA:
    """The policy of ``spec`` under its treatment, before its first step. ``vlm`` itself may be changed.

    Raises:
        UserError: see ``treatments.treat``.
    """
    vla = VLA(treatments.treat(vlm, spec.treated), processor, spec, state_size)
    for parameter in vla.new_parameters().values():
        parameter.requires_grad_(spec.treated.head.mode == "trained")
    return vla


class Policy:
    """A trained VLA with everything needed to act: observations -> action chunks in native units."""

    def __init__(
        self,
        vla: VLA,
        spec: RunSpec,
        convention: Convention,
        actions: Normalizer,
        state: Normalizer | None,
        image_size: int,
        card: dict,
    ):
        self.vla, self.spec, self.convention, self.actions, self.state = vla, spec, convention, actions, state
        self.image_size = image_size
        self.card = card
        """Provenance: versions, hashes of data and backbone, parameter counts."""

    @property
    def device(self) -> torch.device:
        return self.vla.backbone.query.device

    @torch.no_grad()
    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk (H, A) in native units for each observation. Deterministic; the VLM computes in the precision that
        it was trained in, the head in fp32.

        Raises:
            UserError: an observation lacks the camera, or has another size than the policy was trained on.
        """
        images = [self._image(observation) for observation in observations]
        inputs = self.vla.backbone.encode(images, [observation.instruction for observation in observations])
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        state = None
        if self.state is not None:
            states = np.stack([self._state(observation) for observation in observations])
            state = torch.from_numpy(self.state.normalize(states)).to(self.device)
        if self.vla.training:
            self.vla.eval()  # goes through a thousand modules
        half = self.spec.training.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            hidden = self.vla.backbone(inputs)
        chunks = decode(*self.vla.read(hidden, state)).cpu().numpy()
        return [ActionChunk(self.actions.unnormalize(chunk), self.convention) for chunk in chunks]

    def for_acting(self, device: torch.device) -> "Policy":
        """Give linear layers and experts the weights that they compute with, where training kept more: as they are,
        each call of ``predict`` casts them anew. The actions stay the same to the last bit; what is saved would not.

        Only then the policy is moved to ``device``, which never holds the wider weights.
        """
        if self.spec.training.precision == "bf16":
            head = self.vla.backbone.vlm.get_output_embeddings()  # not used, and often the embedding table itself
            for module in self.vla.backbone.modules():
                if isinstance(module, nn.Linear) and module is not head:
                    module.to(torch.bfloat16)
            for _, mixture in experts.find(self.vla.backbone):
                for matrix in experts.matrices(mixture).values():
                    matrix.data = matrix.data.to(torch.bfloat16)
        self.vla.to(device)
        return self

    def _image(self, observation: Observation) -> np.ndarray:
        image = observation.images.get("main")
        if image is None or image.shape != (self.image_size, self.image_size, 3) or image.dtype != np.uint8:
            found = {name: (value.dtype.name, value.shape) for name, value in observation.images.items()}
            raise UserError(
                f"an observation with the images {found}",
                f"the camera 'main' as uint8 ({self.image_size}, {self.image_size}, 3), as in training",
                f"render at {self.image_size} pixels",
            )
        return image

    def _state(self, observation: Observation) -> np.ndarray:
        if observation.state is None or observation.state.shape != (self.vla.state_size,):
            raise UserError(
                "an observation without the robot's state",
                f"float32 ({self.vla.state_size},), as this policy was trained with proprioception",
                "give Observation.state, or train without proprioception",
            )
        return observation.state

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the policy folder (into an empty one; the caller makes it appear whole).

        ``state`` takes the place of the weights of ``vla``: whole, where those are spread over several processes.
        """
        state = self.vla.state_dict() if state is None else state
        vlm_state = {name.removeprefix(VLM): value for name, value in state.items() if name.startswith(VLM)}
        _save_tensors(folder / ACTION, {name: state[name] for name in self.vla.new_parameters()})
        vlm = self.vla.backbone.vlm
        if adapters.present(vlm):
            adapters.save(vlm, vlm_state, folder / ADAPTER)
            names = treatments.overwritten(vlm, self.spec.treated)
            _save_tensors(folder / ADAPTER / BESIDE, {name: vlm_state[name] for name in names})
        else:
            save_vlm(vlm, self.vla.backbone.processor, folder / "vlm", vlm_state)
        values = {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "convention": self.convention.to_dict(),
            "actions": self.actions.to_dict(),
            "state": self.state.to_dict() if self.state else None,
            "state_size": self.vla.state_size,
            "image_size": self.image_size,
            "card": self.card,
        }
        (folder / "policy.json").write_text(json.dumps(values, indent=2))

    def merge(self) -> None:
        """Add what adapters add to the weights below them: ``save`` then writes a whole VLM. Equal up to rounding.

        Raises:
            UserError: there are none.
        """
        if not adapters.present(self.vla.backbone.vlm):
            raise UserError("no adapters to merge", "a policy with adapters", "use it as it is: its VLM is whole")
        adapters.merge(self.vla.backbone.vlm)

    @classmethod
    def load(cls, folder: Path | str, *, backbone: str | None = None) -> "Policy":
        """Open a policy folder, or ``hub:owner/name``, on the CPU; nothing is unpickled, and nothing else is needed but
        for adapters the VLM that they were trained on.

        Args:
            backbone: where that VLM is here, if not where it was in training.

        Raises:
            UserError: not a policy folder, a damaged one, one of another format, or adapters without their VLM.
        """
        name, folder = str(folder), hub.policy_folder(folder)
        path = folder / "policy.json"
        try:
            values = json.loads(path.read_text())
            known = values.get("format") == FORMAT
        except (ValueError, AttributeError) as error:
            raise _damaged(path, error) from error
        if not known:
            raise UserError(
                f"{path} has format {values.get('format')!r}", f"format {FORMAT}", "train it again with this version"
            )
        try:
            spec = parse(RunSpec, values["spec"], str(path))
            convention = Convention.from_dict(values["convention"])
            actions = Normalizer.from_dict(values["actions"])
            state = Normalizer.from_dict(values["state"]) if values["state"] else None
            state_size, image_size, card = (values[name] for name in ("state_size", "image_size", "card"))
        except (KeyError, TypeError, UserError) as error:
            raise _damaged(path, error) from error
        if (folder / ADAPTER).is_dir():
            vlm, processor = _adapted(spec, folder / ADAPTER, card, name, backbone or spec.backbone)
        else:
            if backbone is not None:
                raise UserError(f"a backbone for {name}, which has its own", "a policy with adapters", "leave it out")
            try:
                vlm, processor = load_vlm(str(folder / "vlm"))
            except UserError as error:
                raise _damaged(folder / "vlm", error) from error
        vla = VLA(vlm, processor, spec, state_size)
        path = folder / ACTION
        try:
            action = load_file(path)
            if action.keys() != vla.new_parameters().keys():
                raise ValueError(f"it holds {sorted(action)}")
            vla.load_state_dict(action, strict=False)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: other shapes
            raise _damaged(path, error) from error
        return cls(vla.eval(), spec, convention, actions, state, image_size, card)


def _adapted(spec: RunSpec, folder: Path, card: dict, policy: str, backbone: str) -> tuple[PreTrainedModel, Processor]:
    """The VLM that a policy's adapters were trained on, with the adapters and whatever else was trained in it."""
    merge = f"vlm4vla policy merge {shlex.quote(policy)} --backbone NAME --out FOLDER"
    mend = f"say where they are: --backbone NAME (a folder or a hub id); or once and for all: {merge}"
    try:
        vlm, processor = load_vlm(backbone)
    except UserError as error:
        expected = f"the weights that the adapters in {policy} were trained on (hash {card['backbone_hash']})"
        raise UserError(error.found, expected, f"{error.next_step}; or {mend}") from error
    if (found := parameters_hash(vlm)) != card["backbone_hash"]:
        raise UserError(
            f"other weights in the backbone {backbone!r} (hash {found}) than the adapters in {policy} sit on",
            f"the weights with the hash {card['backbone_hash']}",
            mend,
        )
    try:
        adapters.load(vlm, folder)
        beside = load_file(folder / BESIDE)
        if beside.keys() != set(treatments.overwritten(vlm, spec.treated)):
            raise ValueError(f"{BESIDE} holds {len(beside)} tensors of another treatment")
        vlm.load_state_dict(beside, strict=False)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    return vlm, processor


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _damaged(path: Path, error: Exception) -> UserError:
    why = error.found if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return UserError(
        f"{path}, damaged ({why})", "what training wrote there", "copy the policy again, or train it again"
    )


def torch_device(name: str) -> torch.device:
    """``auto`` -> the first GPU (CUDA, then Apple's), else the CPU, said on stderr; anything else must exist.

    Raises:
        UserError: no such device here.
    """
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
    if name == "auto":
        print(f"device: {there[0]}", file=sys.stderr)
        return torch.device(there[0])
    if name not in there and not (name == "cuda" and "cuda:0" in there):
        raise UserError(f"no device {name!r} here", f"auto, or one of {there}", f"use --device {there[0]}")
    return torch.device("cuda:0" if name == "cuda" else name)


def weights_hash(folder: Path) -> str:
    """10 hex digits of the SHA-256 over a policy folder's weights files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:10]


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "mujoco")
    found = {name: version(name) for name in packages if _installed(name)}
    return {"vlm4vla": __version__, "python": platform.python_version(), "machine": platform.machine(), **found}


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
