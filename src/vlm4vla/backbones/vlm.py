"""The one adapter: any Hugging Face VLM, read at one learnable action query. B batch, L sequence, D hidden size.

The query is one more position right after each *unpadded* prompt (``backbones.inputs``). During the forward pass the
embedding table answers that position with the learnable vector. The VLM's own forward, masks and positions are used;
its LM head runs for conversations alone. Placed by position and not by a reserved id, because in some families the last
vocabulary row is a real token. What differs between families is a row in ``backbones.families``.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from vlm4vla.backbones import experts
from vlm4vla.backbones.families import family
from vlm4vla.backbones.inputs import Inputs, Processor
from vlm4vla.backbones.packed_vision import packed_vision
from vlm4vla.errors import UserError
from vlm4vla.spec import Compat, QueryInit
from vlm4vla.types import Turns

# One bar a job is enough: ours.
logging.disable_progress_bar()


def auto_class(config: PretrainedConfig) -> type:
    """The transformers class that opens this model, or draws it anew (``from_config``)."""
    return AutoModel if family(config).base_only else AutoModelForImageTextToText


class Backbone(nn.Module):
    """A VLM and its action query: pictures and instructions -> one hidden state each.

    Attributes:
        vlm: the transformers model, untouched.
        query: (D,) the action query; ``RunSpec.query_init`` says what it is at first.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        processor: Processor,
        compat: Sequence[Compat] = (),
        query_init: QueryInit = "zero",
    ):
        """Raises: UserError: the model cannot be read below its LM head, or takes no picture in its prompt."""
        super().__init__()
        self.vlm = vlm
        if self.core is vlm and vlm.get_output_embeddings() is not None:
            raise UserError(
                f"{type(vlm).__name__}, whose LM head is within the model that takes pictures",
                "a class with a model below its LM head: what a policy reads is the state before it",
                "choose another backbone: vlm4vla backbones list",
            )
        self.processor = processor
        self.inputs = Inputs(processor, family(vlm.config), compat, getattr(self.core, "get_rope_index", None))
        self.packed = packed_vision(vlm)
        experts.use(vlm)
        self.hidden_size: int = vlm.config.get_text_config().hidden_size
        self.query = nn.Parameter(torch.zeros(self.hidden_size))
        embeddings: Any = vlm.get_input_embeddings()
        if query_init == "normal" and not embeddings.weight.is_meta:
            nn.init.normal_(self.query, std=float(embeddings.weight.detach().std()))
        # Gemma multiplies embeddings by a constant inside the table: the query stays in units of the table's rows.
        self.scale = float(getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", 1.0)))

    @property
    def core(self) -> nn.Module:
        """The model below the LM head."""
        return getattr(self.vlm, self.vlm.base_model_prefix, self.vlm)

    def encode(self, images: Sequence[np.ndarray] | np.ndarray, instructions: Sequence[str]) -> dict[str, Tensor]:
        """uint8 (H, W, 3) pictures of one size and instructions -> ``forward``'s inputs, on the CPU.

        ``images`` uint8 (B, H, W, 3), the prompts' token ids, mask and types (B, L), ``query_position`` (B,).
        """
        pictures = torch.from_numpy(np.ascontiguousarray(np.stack(list(images))))
        return {"images": pictures, **self.inputs.tokens(instructions, *pictures.shape[1:3])}

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """``encode``'s inputs, moved to the model's device -> float32 (B, D): the last hidden state at the query."""
        inputs = dict(inputs)
        position = inputs.pop("query_position")
        inputs |= self._seen(inputs.pop("images"))
        rows = torch.arange(len(position), device=position.device)
        with self._query_at(inputs["input_ids"].shape, rows, position):
            hidden = self.core(**inputs, use_cache=False).last_hidden_state
        return hidden[rows, position].float()

    def encode_answers(self, images: np.ndarray, talks: Sequence[Turns]) -> dict[str, Tensor]:
        """uint8 (B, H, W, 3) pictures and a conversation about each -> ``answer_losses``'s inputs, on the CPU.

        The model is one that ``require_words``, the conversations are such as ``Inputs.require_talk`` lets pass.
        """
        return {"images": torch.from_numpy(images), **self.inputs.answers(talks, *images.shape[1:3])}

    def require_words(self) -> None:
        """Raises: UserError: this model is opened without an LM head."""
        if auto_class(self.vlm.config) is AutoModel:
            title = family(self.vlm.config).title
            raise UserError(
                f"conversations for {title}, which is opened without its LM head",
                "a model that can be trained to answer",
                "choose another backbone, or leave conversations out of data.mixture",
            )

    def answer_losses(self, inputs: dict[str, Tensor]) -> Tensor:
        """``encode_answers``'s inputs, moved to the model's device -> float32 (B,): the sum of the cross-entropies of
        the tokens that each conversation's answers have, from the model's own forward with its LM head."""
        inputs = dict(inputs)
        labels, kept = inputs.pop("labels"), inputs.pop("kept")
        inputs |= self._seen(inputs.pop("images"))
        with self._said_of(kept):
            logits = self.vlm(**inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, kept + 1], ignore_index=-100, reduction="none")
        return losses.sum(1)

    def _seen(self, images: Tensor) -> dict[str, Any]:
        """What the model's forward is given of pictures."""
        pixels = self.inputs.pixels(images)
        return pixels if self.packed is None else pixels | self.packed.prepared(pixels["image_grid_thw"], images.device)

    @contextmanager
    def _said_of(self, kept: Tensor) -> Iterator[None]:
        """The LM head sees the positions ``kept`` (P,) alone: logits of all would be large, a vocabulary for each token
        of each picture. By a hook, for ``logits_to_keep`` is not every family's (MiniCPM-V)."""
        head: Any = self.vlm.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _module, args: (args[0][:, kept], *args[1:]))
        try:
            yield
        finally:
            handle.remove()

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


def save_vlm(
    vlm: PreTrainedModel, processor: Processor, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """A folder that plain transformers opens; ``state`` takes the place of the VLM's own weights."""
    vlm.save_pretrained(folder, state_dict=None if state is None else dict(state))
    processor.save_pretrained(folder)


def parameters_hash(vlm: nn.Module) -> str:
    """10 hex digits of the SHA-256 over names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(vlm.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]
