"""Whether a VLM works as a backbone: the checks behind ``vlm4vla backbones check`` and behind the tests of each family.

B batch, L sequence, D hidden size.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm4vla.backbones import experts
from vlm4vla.backbones.treatments import groups
from vlm4vla.backbones.vlm import Backbone, auto_class, save_vlm
from vlm4vla.errors import UserError
from vlm4vla.spec import VLM_GROUPS

TEXTS = (
    "push",
    "pick up the red block",
    "place the spoon on the towel",
    "open the drawer",
    "stack the green cube on the yellow one",
    "close it",
    "move the carrot onto the plate",
    "turn on the light",
)
"""Eight instructions of different length, so that a batch of them is padded."""
TOLERANCE = 1e-5
"""Of hidden states, in fp32, where the same numbers are computed in another order."""
PIXEL_TOLERANCE = 1e-5
"""Of normalised pixels (their range is about -2 to 2): the same operations, batched."""
OURS = ("images", "query_position", "position_ids")
"""Inputs that the model's plain forward pass does not get: it finds its positions by itself."""
STEPS = 40
LEARNING_RATE = 2e-3
MEMORISED = 0.1
"""Share of the first loss below which eight samples count as learnt by heart."""


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


class Check:
    """The checks of one backbone. They leave its weights as they were, except ``memorises``, which comes last."""

    def __init__(self, backbone: Backbone, image_size: int, seed: int = 0):
        self.backbone = backbone.eval()
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (len(TEXTS), image_size, image_size, 3), np.uint8)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            rows = backbone.vlm.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=self.device))
            spread = rows.std() / backbone.scale  # a query as large as a word
            backbone.query.copy_(torch.randn(backbone.query.shape, generator=self.generator) * spread.cpu())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.encode(self.images, TEXTS)

    @cached_property
    @torch.no_grad()
    def hidden(self) -> Tensor:
        return self.backbone(self.inputs)

    @property
    def device(self) -> torch.device:
        return self.backbone.query.device

    def encode(self, images: np.ndarray, texts: Sequence[str]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.backbone.encode(images, texts).items()}

    def run(self, forward_only: bool = False) -> Iterator[Finding]:
        """One finding after another; a check that raises has failed, and the others go on.

        Raises:
            UserError: no picture and text get through the processor and the model.
        """
        try:
            _ = self.hidden
        except UserError:
            raise
        except Exception as error:  # of whatever kind: transformers is asked to do something new
            name = type(self.backbone.vlm).__name__
            raise UserError(
                f"{name}, which does not take a picture and a text the common way ({_said(error)})",
                "a decoder that reads projected pictures among its tokens",
                "choose another: vlm4vla backbones list; docs/backbones.md says how a family gets a row",
            ) from error
        checks: list[Callable[[], tuple[bool, str]]] = [
            self.inputs_are_the_processors,
            self.alone_or_in_a_batch,
            self.padded_left_or_right,
            self.like_a_real_token,
            self.nothing_sees_the_query,
            self.gradients_reach_every_part,
            self.saved_and_reopened,
        ]
        for check in checks + ([] if forward_only else [self.memorises]):
            try:
                ok, detail = check()
            except Exception as error:  # of whatever kind
                ok, detail = False, _said(error)
            yield Finding(check.__name__.replace("_", " "), ok, detail)

    def inputs_are_the_processors(self) -> tuple[bool, str]:
        """Text prepared once and pictures in a batch are what the model's own processor makes of all together."""
        inputs = self.backbone.inputs
        native = inputs.native(list(self.images), [inputs.prompt(text) for text in TEXTS])
        ours = inputs.pixels(self.inputs["images"])
        worst = 0.0
        for name, value in native.items():
            if name == "attention_mask" and not inputs.family.keeps_mask:
                continue
            if value.shape == native["input_ids"].shape:
                there = native["attention_mask"].bool()  # whichever side the processor pads on
                same = all(
                    torch.equal(value[i, there[i]], self.inputs[name][i, :length].cpu())
                    for i, length in enumerate(self.inputs["query_position"])
                )
            elif value.is_floating_point():
                difference = float((value - ours[name].cpu()).abs().max())
                worst, same = max(worst, difference), difference <= PIXEL_TOLERANCE
            else:
                same = torch.equal(value, ours[name].cpu())
            if not same:
                return False, f"{name} differs from the processor's" + (f" by {worst:.1e}" if worst else "")
        return True, f"{native['input_ids'].shape[1]} tokens at most; pixels within {worst:.1e}"

    @torch.no_grad()
    def alone_or_in_a_batch(self) -> tuple[bool, str]:
        """Neither padding nor other samples change the output."""
        alone = [self.backbone(self.encode(self.images[i : i + 1], TEXTS[i : i + 1])) for i in range(len(TEXTS))]
        return self._close(torch.cat(alone), self.hidden)

    @torch.no_grad()
    def padded_left_or_right(self) -> tuple[bool, str]:
        return self._close(self.backbone(padded_left(self.inputs)), self.hidden)

    @torch.no_grad()
    def like_a_real_token(self) -> tuple[bool, str]:
        """The hidden state is that of the model's plain forward pass, had the query been a word of its vocabulary."""
        ids, position = self.inputs["input_ids"].clone(), self.inputs["query_position"]
        rows = torch.arange(len(ids), device=self.device)
        # One of the first: the last rows of some vocabularies are sounds' and pictures' (Gemma 3n).
        used = {*ids.flatten().tolist(), *self.backbone.processor.tokenizer.all_special_ids}
        word = next(i for i in count() if i not in used)
        last = ids[rows, position]
        ids[rows, position] = word
        inputs = {name: value for name, value in self.inputs.items() if name not in OURS}
        inputs |= {
            "input_ids": ids,
            "attention_mask": mask(self.inputs),
            **self.backbone.inputs.pixels(self.inputs["images"]),
        }
        with _word_is(self.backbone, word, last), stock(self.backbone):
            hidden = self.backbone.core(**inputs, use_cache=False).last_hidden_state[rows, position]
        return self._close(hidden.float(), self.hidden)

    @torch.no_grad()
    def nothing_sees_the_query(self) -> tuple[bool, str]:
        """Another query leaves the hidden states of picture and prompt as they were."""
        states = []
        handle = self.backbone.core.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state))
        query = self.backbone.query.clone()
        try:
            self.backbone(self.inputs)
            self.backbone.query.add_(1)
            self.backbone(self.inputs)
        finally:
            handle.remove()
            self.backbone.query.copy_(query)
        places = torch.arange(states[0].shape[1], device=self.device)
        prompt = places < self.inputs["query_position"][:, None]
        return self._close(states[1][prompt], states[0][prompt])

    def gradients_reach_every_part(self) -> tuple[bool, str]:
        frozen = [parameter for parameter in self.backbone.parameters() if not parameter.requires_grad]
        try:
            self.backbone.requires_grad_(True)
            self.backbone(self.inputs).square().sum().backward()
            parts = {name: list(part.values()) for name, part in groups(self.backbone.vlm).items()}
            parts["query"] = [self.backbone.query]
            reached = {
                name: sum(p.grad is not None and bool(p.grad.any()) for p in part)
                for name, part in parts.items()
                if name in (*VLM_GROUPS, "query")
            }
        finally:
            self.backbone.zero_grad()
            for parameter in frozen:
                parameter.requires_grad_(False)
        return all(reached.values()), ", ".join(f"{name} {n} of {len(parts[name])}" for name, n in reached.items())

    @torch.no_grad()
    def saved_and_reopened(self) -> tuple[bool, str]:
        """What is saved opens with plain transformers, whole, and gives the same numbers to the last bit."""
        vlm = self.backbone.vlm
        with tempfile.TemporaryDirectory() as name:
            save_vlm(vlm, self.backbone.processor, Path(name))
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            opened: list[Any] = [
                kind.from_pretrained(name, dtype=vlm.dtype, trust_remote_code=False, output_loading_info=True)
                for kind in (AutoModelForImageTextToText, auto_class(vlm.config))
            ]
        for _, found in opened:
            if any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
                return False, f"plain transformers finds {found}"
        reopened = Backbone(opened[-1][0].to(self.device), processor).eval()
        reopened.query.data = self.backbone.query.data
        inputs = {name: value.to(self.device) for name, value in reopened.encode(self.images, TEXTS).items()}
        if not all(torch.equal(value, inputs[name]) for name, value in self.inputs.items()):
            return False, "the processor that was saved makes other inputs"
        return torch.equal(reopened(inputs), self.hidden), "the same to the last bit"

    def memorises(self) -> tuple[bool, str]:
        """Trained as a whole, with a linear readout, it learns the targets of eight samples by heart."""
        target = torch.randn(len(TEXTS), 8, generator=self.generator).to(self.device)
        readout = nn.Linear(self.backbone.hidden_size, 8).to(self.device)
        parameters = [*self.backbone.requires_grad_(True).parameters(), *readout.parameters()]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
        losses = []
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 5)
            loss = (readout(self.backbone(self.inputs)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if losses[-1] < MEMORISED * losses[0]:
                break
        return losses[-1] < MEMORISED * losses[0], f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps"

    def _close(self, found: Tensor, expected: Tensor) -> tuple[bool, str]:
        difference = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        return difference <= TOLERANCE, f"differs by {difference:.1e} at most (allowed: {TOLERANCE:.0e})"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def mask(inputs: dict[str, Tensor]) -> Tensor:
    """int64 (B, L): 1 on the prompts and their queries, 0 on the padding after them."""
    places = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    return (places <= inputs["query_position"][:, None]).long()


def padded_left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same right-padded inputs with each row's padding before it, as generation would have it."""
    inputs = {**inputs, "attention_mask": mask(inputs)}
    shape, shift = inputs["input_ids"].shape, (inputs["attention_mask"] == 0).sum(1)
    places = torch.arange(shape[1], device=shift.device)
    source = (places - shift[:, None]) % shape[1]
    rolled = {
        name: value.gather(-1, source.expand_as(value))
        for name, value in inputs.items()
        if value.shape[-2:] == shape  # position_ids have axes in front
    }
    return {**inputs, **rolled, "query_position": inputs["query_position"] + shift}


@contextmanager
def stock(backbone: Backbone) -> Iterator[None]:
    """For a while, a packed vision tower and experts run as transformers would run them."""
    ours = [] if backbone.packed is None else [(backbone.packed.tower.config, "_attn_implementation", "sdpa")]
    ours += [(part.config, "_experts_implementation", "grouped_mm") for _, part in experts.find(backbone.vlm)]
    kept = [getattr(config, name) for config, name, _ in ours]
    for config, name, theirs in ours:
        setattr(config, name, theirs)
    try:
        yield
    finally:
        for (config, name, _), value in zip(ours, kept, strict=True):
            setattr(config, name, value)


@contextmanager
def _word_is(backbone: Backbone, word: int, last: Tensor) -> Iterator[None]:
    """For a while, the embedding of ``word`` is the query. ``last`` (B,): the ids of the prompts' last tokens."""
    table = next(backbone.vlm.get_input_embeddings().parameters())  # Molmo has one more, of its added tokens
    changes = [(table, word, backbone.query)]
    # Gemma's layers look the ids up once more, in tables of their own: there the query is the prompt's last token.
    if (layers := getattr(backbone.vlm.get_decoder(), "embed_tokens_per_layer", None)) is not None:
        changes.append((layers.weight, word, layers.weight[last[0]]))
    kept = [table[at].clone() for table, at, _ in changes]
    for table, at, value in changes:
        table[at] = value
    try:
        yield
    finally:
        for (table, at, _), value in zip(changes, kept, strict=True):
            table[at] = value
