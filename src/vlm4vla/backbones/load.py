"""Opening a VLM by name, and saying plainly what is wrong with a name that cannot be opened."""

import os
import re
import shlex
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlm4vla.backbones import tiny
from vlm4vla.backbones.families import hub_ids
from vlm4vla.backbones.inputs import Processor
from vlm4vla.backbones.vlm import auto_class
from vlm4vla.errors import UserError
from vlm4vla.files import beside, there

EXPECTED = "`tiny`, a folder written by save_pretrained, or the hub id of an image-text-to-text model in safetensors"
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
LAYER = re.compile(r"\.\d+\.")
FAILURES = (OSError, ValueError, KeyError, ImportError, SafetensorError)
"""What transformers raises for files that it cannot find or make sense of."""


def load_vlm(name: str) -> tuple[PreTrainedModel, Processor]:
    """``tiny``, a local folder or a hub id -> fp32 model and processor.

    Only safetensors are read: nothing is ever unpickled, and no code of a model's repository is run.

    Raises:
        UserError: nothing there that transformers can open as an image-text-to-text model, or a damaged one.
    """
    config, processor = load_config(name), load_processor(name)
    try:
        vlm, found = auto_class(config).from_pretrained(
            _source(name),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,  # by default transformers asks on the terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, as an error of ours
        )
    except FAILURES as error:
        raise _cannot_open(name, error) from error
    if others := sorted(found["mismatched_keys"]):
        path, given, wanted = others[0]
        raise UserError(
            f"backbone {name!r}, of whose weights {len(others)} have another size than its config.json says "
            f"({path}: {tuple(given)} instead of {tuple(wanted)}, ...)",
            f"the weights and the configuration of one {type(vlm).__name__}",
            _mend(name),
        )
    if absent := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise UserError(
            f"backbone {name!r} lacks {len(absent)} of its weights ({', '.join(absent[:3])}, ...)",
            f"all weights of a {type(vlm).__name__}",
            _mend(name),
        )
    layers = {LAYER.sub(".N.", path) for path, _ in vlm.named_parameters()}
    if beyond := sorted(path for path in found["unexpected_keys"] if LAYER.sub(".N.", path) in layers):
        raise UserError(
            f"backbone {name!r}, with weights of layers that config.json does not have ({', '.join(beyond[:3])}, ...)",
            f"the weights and the configuration of one {type(vlm).__name__}",
            _mend(name),
        )
    return vlm, processor


def load_blank(name: str) -> PreTrainedModel:
    """The fp32 model on the meta device: nothing of its weights is read.

    Raises:
        UserError: see ``load_config``; a package that the model's classes import is not installed.
    """
    config = load_config(name)
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=torch.float32)
    except ImportError as error:
        raise _cannot_open(name, error) from error


def load_config(name: str) -> PretrainedConfig:
    """The configuration alone, without weights.

    Raises:
        UserError: no such model, one that this transformers does not know, one that takes no pictures, or one with an
            encoder for its text.
    """
    if name == "tiny" and not (tiny.FOLDER / "model.safetensors").is_file():
        raise UserError(f"no weights in {tiny.FOLDER}", "the embedded VLM", "make them: vlm4vla vlm train")
    _require_a_place(name)
    try:
        config = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
    except FAILURES as error:
        raise _cannot_open(name, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"backbone {name!r} is a {config.model_type!r} model, which takes no pictures with its text",
            EXPECTED,
            "choose a vision-language model: vlm4vla backbones list",
        )
    if config.is_encoder_decoder:
        raise UserError(
            f"backbone {name!r} is a {config.model_type!r} model, with an encoder for its text and a decoder",
            "one decoder of text and pictures: the action query is the position after the prompt",
            "choose another: vlm4vla backbones list",
        )
    return config


def load_processor(name: str) -> Processor:
    """Raises: UserError: there is none, or not of pictures and text."""
    folder = Path(_source(name))
    if folder.is_dir() and not any((folder / file).is_file() for file in PROCESSOR):
        raise UserError(
            f"backbone {name!r} without its processor: there is no {' or '.join(PROCESSOR)}",
            "all that save_pretrained writes, of the model and of its processor",
            "write it beside the weights: "
            f"AutoProcessor.from_pretrained(ID).save_pretrained({str(folder)!r}), ID being the model it was made from",
        )
    try:
        processor = AutoProcessor.from_pretrained(_source(name), trust_remote_code=False)
    except FAILURES as error:
        raise _cannot_open(name, error) from error
    if not hasattr(processor, "image_processor"):
        raise UserError(
            f"backbone {name!r}, whose processor is a {type(processor).__name__} without an image processor",
            "a processor of pictures and text (processor_config.json or preprocessor_config.json)",
            _mend(name),
        )
    if len(processor.tokenizer) <= len(processor.tokenizer.all_special_tokens):  # transformers makes an empty one
        found = f"backbone {name!r}, whose tokenizer has no words"
        raise UserError(found, "tokenizer.json, or what else its tokenizer is kept in", _mend(name))
    return processor


def _source(name: str) -> str:
    return str(tiny.FOLDER) if name == "tiny" else name


def _require_a_place(name: str) -> None:
    """Transformers would ask the hub for minutes.

    Raises:
        UserError: the name is neither a folder with a model nor can it be a hub's.
    """
    folder = Path(_source(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            below = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]  # a policy's: vlm
            mend = f"name {' or '.join(below)}" if below else "copy the whole folder, or name another"
            raise UserError(f"no model in {name}: it has no config.json", EXPECTED, mend)
    elif folder.is_file():
        raise UserError(f"{name}, a file", EXPECTED, f"name its folder: {folder.parent}")
    elif "/" not in name:
        raise UserError(f"no backbone {name!r}{_nearest(name)}", EXPECTED, "vlm4vla backbones list")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        mend = f"check the path: ls {shlex.quote(str(there(folder)))}"
        home = os.path.expanduser(folder)  # an unknown user's stays as it is
        mend = f"write the home folder out: {home}" if home != name and os.path.isdir(home) else mend
        raise UserError(f"no folder {name}{beside(folder)}", EXPECTED, mend)


def _nearest(name: str) -> str:
    """The known models that a name may have meant; neither owner nor case count."""
    short = {known.rpartition("/")[2].lower(): known for known in hub_ids()}
    close = get_close_matches(name.rpartition("/")[2].lower(), short, n=3)
    return f" (nearest: {', '.join(short[match] for match in close)})" if close else ""


def _mend(name: str) -> str:
    folder = Path(_source(name))
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return "its weights are pickled, which are never read: write them again with save_pretrained of transformers 5"
    if folder.is_dir():
        return "make or copy that folder again"
    return f"check the name, or download it: hf download {name}"


def _cannot_open(name: str, error: Exception) -> UserError:
    causes = list(_causes(error))
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    folder = Path(_source(name)).is_dir()
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return UserError(
            f"backbone {name!r} is gated",
            "an account that has accepted its licence",
            f"accept it on https://huggingface.co/{name}, then: hf auth login",
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return UserError(
            f"no folder {name} here, and no model of that name on the hub, or a private one{_nearest(name)}",
            EXPECTED,
            "vlm4vla backbones list; for a private model: hf auth login",
        )
    if not folder and any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes):
        return UserError(
            f"no folder {name} here, no model of that name in the hub's cache, and the hub cannot be reached"
            + (beside(Path(name)) if Path(name).parent.is_dir() else _nearest(name)),
            "a model in the local cache or in a folder",
            f"where the hub can be reached: hf download {name}; then copy the folder here",
        )
    if "does not recognize this architecture" in str(error):
        return UserError(
            f"backbone {name!r} is of a family that transformers {transformers.__version__} does not know ({text})",
            "a version that knows it; its config.json may name the one it was written with",
            "pip install --upgrade transformers",
        )
    if "trust_remote_code" in str(error):
        return UserError(
            f"backbone {name!r} needs Python code of its own repository, which is never run",
            f"a family that transformers {transformers.__version__} knows",
            "pip install --upgrade transformers, if a newer one has it; else another: vlm4vla backbones list",
        )
    if command := re.search(r"pip install [\w-]+", str(error)):
        return UserError(
            f"backbone {name!r} needs a package that is not installed ({text})",
            "the packages that its classes in transformers import",
            command[0],
        )
    return UserError(f"backbone {name!r}: {text}", EXPECTED, _mend(name))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
