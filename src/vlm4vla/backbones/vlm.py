"""The one adapter: any Hugging Face VLM, read at one learnable action query. B batch, L sequence, D hidden size.

The query is one more position right after each *unpadded* prompt. It copies the id, mask and type of the prompt's last
token, so that every family sees an ordinary text token there; during the forward pass the embedding table answers that
position with the learnable vector. The VLM's own forward, masks and positions are used; its LM head is never run.
Placed by position and not by a reserved id, because in some families the last vocabulary row is a real token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from vlm4vla.backbones import tiny
from vlm4vla.errors import UserError

# One bar a job is enough: ours.
logging.disable_progress_bar()

Processor = Any
"""A transformers processor; their call signatures are only known at run time."""

PROMPT = "what action should the robotic arm take to {instruction}"
"""VLM4VLA's question for instruction-tuned VLMs (its Qwen and InternVL templates)."""


def load_vlm(name: str) -> tuple[PreTrainedModel, Processor]:
    """``tiny``, a local folder or a hub id -> fp32 model and processor, right padding.

    Only safetensors are read: nothing is ever unpickled.

    Raises:
        UserError: nothing there that transformers can open as an image-text-to-text model, or a damaged one.
    """
    source = str(tiny.FOLDER) if name == "tiny" else name
    if name == "tiny" and not (tiny.FOLDER / "model.safetensors").is_file():
        raise UserError(f"no weights in {tiny.FOLDER}", "the embedded VLM", "make them: vlm4vla vlm train")
    if "/" not in source and not Path(source).is_dir():  # transformers would ask the hub for minutes
        raise UserError(f"no backbone {name!r}", "`tiny`, a folder, or a hub id (owner/name)", "check --set backbone=")
    try:
        processor = AutoProcessor.from_pretrained(source)
        vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        folder = Path(source).is_dir()
        mend = "make or copy that folder again" if folder else "check the name, or download it: hf download <id>"
        raise UserError(
            f"backbone {name!r}: {(str(error) or type(error).__name__).splitlines()[0]}",
            "`tiny`, a folder written by save_pretrained, or the hub id of an image-text-to-text model in safetensors",
            mend,
        ) from error
    processor.tokenizer.padding_side = "right"
    return vlm, processor


def prompt(processor: Processor, text: str, system: str | None = None) -> str:
    """One user turn with an image and ``text`` in the model's own chat template, the assistant's turn opened."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


class Backbone(nn.Module):
    """A VLM and its action query: pictures and instructions -> one hidden state each.

    Attributes:
        vlm: the transformers model, untouched.
        query: (D,) the action query, zero at first as in VLM4VLA's release.
    """

    def __init__(self, vlm: PreTrainedModel, processor: Processor):
        super().__init__()
        self.vlm = vlm
        self.processor = processor
        self.hidden_size: int = vlm.config.get_text_config().hidden_size
        self.query = nn.Parameter(torch.zeros(self.hidden_size))
        embeddings = vlm.get_input_embeddings()
        # Gemma multiplies embeddings by a constant inside the table: the query stays in units of the table's rows.
        self.scale = float(getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", 1.0)))

    @property
    def core(self) -> nn.Module:
        """The model below the LM head."""
        return getattr(self.vlm, self.vlm.base_model_prefix, self.vlm)

    def encode(self, images: Sequence[np.ndarray] | np.ndarray, instructions: Sequence[str]) -> dict[str, Tensor]:
        """uint8 (H, W, 3) pictures and instructions -> the VLM's inputs, with ``query_position`` (B,)."""
        texts = [prompt(self.processor, PROMPT.format(instruction=text)) for text in instructions]
        inputs = dict(self.processor(text=texts, images=list(images), return_tensors="pt", padding=True))
        return append_query(inputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """``encode``'s inputs -> float32 (B, D): the last layer's hidden state at the query."""
        inputs = dict(inputs)
        position = inputs.pop("query_position")
        rows = torch.arange(len(position), device=position.device)
        with self._query_at(inputs["input_ids"].shape, rows, position):
            hidden = self.core(**inputs, use_cache=False).last_hidden_state
        return hidden[rows, position].float()

    @contextmanager
    def _query_at(self, shape: torch.Size, rows: Tensor, position: Tensor) -> Iterator[None]:
        def swap(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if args[0].shape != shape:
                return output
            query = (self.query * self.scale).to(output.dtype).expand(len(rows), -1)
            return output.index_put((rows, position), query)

        # Per call and not for good: a permanent hook is copied along when peft wraps the table.
        handle = self.vlm.get_input_embeddings().register_forward_hook(swap)
        try:
            yield
        finally:
            handle.remove()


def append_query(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right-padded (B, L) inputs -> (B, L + 1) with a query slot after each prompt, and ``query_position`` (B,)."""
    shape, length = inputs["input_ids"].shape, inputs["attention_mask"].sum(1)
    rows = torch.arange(shape[0])
    result = dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            result[name] = torch.cat([value, value[:, -1:]], 1)
            result[name][rows, length] = value[rows, length - 1]
    return {**result, "query_position": length}


def save_vlm(vlm: PreTrainedModel, processor: Processor, folder: Path) -> None:
    """A folder that plain transformers opens."""
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)
