"""Audits a run before it is trained: from the configuration and the processor alone, no weight is read.

The model is built on torch's meta device, so a 30 B model costs what a small one does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm4vla.audit import Audit
from vlm4vla.backbones import adapters, experts, treatments
from vlm4vla.backbones.inputs import Processor
from vlm4vla.backbones.load import load_blank, load_processor
from vlm4vla.backbones.show import num_visual_tokens
from vlm4vla.policy import VLA, untrained
from vlm4vla.spec import RunSpec, TreatmentSpec
from vlm4vla.types import Turns

INSTRUCTION = "pick up the red block and place it on the table"
"""Shown in the audit, and what sizes are counted with."""
ACTIVATION_FACTOR = 1.3
"""Bytes kept for the way back over bytes that go in and out of linear layers. Fitted to five VLMs measured at their
true width (bf16, eager, 224 and 448 px; 1.15 to 3.3 GiB a sample), each of which it gives within a tenth, and a mixture
within a fifth."""
STATE_BYTES = 16
"""Of a trained parameter in fp32: itself, its gradient and Adam's two moments."""
CAST = (nn.Linear, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast copies."""
LOGITS_BYTES = 3 * 4
"""Of a logit, at most: its logarithm's share of the softmax and the gradients of both, in fp32. Measured on a CPU, in
fp32 and bf16 (8 x 64 positions, 150,000 words): the peak is 3.0 times the logits in fp32."""
GIB = 2**30


def examine(spec: RunSpec, image_size: int) -> Audit:
    """The audit of ``spec``, whose pictures are ``image_size`` pixels high and wide.

    Raises:
        UserError: no such backbone, or a treatment that it cannot have.
    """
    return audit(*on_meta(spec), spec, image_size)


def on_meta(spec: RunSpec, state_size: int = 0) -> tuple[VLA, Processor]:
    """The policy of ``spec`` before its first step, without a number in it."""
    vlm, processor = load_blank(spec.backbone), load_processor(spec.backbone)
    with torch.device("meta"):
        return untrained(vlm, processor, spec, state_size), processor


def audit(vla: VLA, processor: Processor, spec: RunSpec, image_size: int) -> Audit:
    """What ``vla`` is, and what one sample of it takes; its parameters are looked at, not read."""
    vlm, backbone, training = vla.backbone.vlm, vla.backbone, spec.training
    inputs = backbone.encode(np.zeros((1, image_size, image_size, 3), np.uint8), [INSTRUCTION])
    pictures = backbone.inputs.pixels(inputs["images"])
    ids = inputs["input_ids"][0].tolist()
    tokens = num_visual_tokens({**inputs, **pictures}, vlm.config)
    scales = treatments.lr_scales(vlm, spec.treated, training)
    parts = {**{n: g.mode for n, g in spec.treated.groups().items()}, "head": spec.treated.head.mode}
    work = forward_flops(vlm, pictures, len(ids), tokens)
    head = 2 * sum(p.numel() for p in vla.head.parameters())
    counts = treatments.count(vlm)
    new = sum(p.numel() for p in vla.new_parameters().values())
    choices = {
        "picture": f"{image_size} x {image_size}",
        "resampling": _resampling(processor, pictures),
        "visual_tokens": str(tokens),
        "prompt": backbone.inputs.prompt("{instruction}"),
        "query": f"one position, right after the unpadded prompt; at first {spec.query_init}",
        "positions": _positions(vlm.config.get_text_config()),
        "mask": _mask(vlm, backbone.inputs.family.query_type, inputs),
        "attention": str(vlm.config._attn_implementation),
        "precision": {"fp32": "fp32", "bf16": "bf16 computation, fp32 weights and moments"}[training.precision],
        "parts": ", ".join(f"{name} {mode}" for name, mode in parts.items()),
        "learning_rates": ", ".join(f"{name} {scale * training.learning_rate:g}" for name, scale in scales.items()),
        "optimisation": f"{training.steps} steps of {training.batch_size}, {training.schedule}, "
        f"warm-up {training.warmup_steps}, weight decay {training.weight_decay:g}, clip {training.max_grad_norm:g}",
        "augmentation": _augmentation(spec),
        "mixture": _mixture(spec),
        "head": f"{spec.head.kind}, width {spec.head.hidden}, chunk {spec.head.chunk}, "
        f"gripper weight {spec.head.gripper_weight:g}",
        "proprioception": "yes" if spec.proprioception else "no",
    }
    sizes = {
        "example": f"{INSTRUCTION!r} -> {len(ids)} positions, the last one the query",
        "token_ids": ids[:-1],
        "trained": {name: values["trained"] for name, values in counts.items()} | {"head": new},
        "frozen": {name: values["frozen"] for name, values in counts.items()},
        "without_adapter": {
            f"{name} {end}": number
            for name, group in spec.treated.groups().items()
            if group.mode == "lora"
            for end, number in adapters.without(vlm, treatments.groups(vlm)[name]).items()
        },
        "forward_gflop": round((sum(work.values()) + head) / 1e9, 4),
        "training_gflop": round((training_flops(work, spec.treated) + 3 * head) / 1e9, 4),
        "states_gib": round(states_bytes(vla, bool(training.ema)) / GIB, 3),
        "activations_gib": round(activation_bytes(vlm, spec, pictures, len(ids), tokens) / GIB, 4),
    }
    return Audit(choices, sizes)


# ---------------------------------------------------------------------------------------------------------- what it is


def _resampling(processor: Processor, pictures: Mapping[str, torch.Tensor]) -> str:
    """The filter, and the shape of what comes out."""
    method = getattr(processor.image_processor, "resample", None)
    method = Resampling(method) if isinstance(method, int) else method  # configurations hold PIL's number
    name = getattr(method, "name", "none").lower()
    shapes = {key: "x".join(map(str, value.shape)) for key, value in pictures.items() if value.is_floating_point()}
    return f"{name} -> " + ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))


def _positions(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or {}
    if sections := rope.get("mrope_section"):
        return f"rotary in time, height and width (sections {list(sections)})"
    return "rotary" if rope else "absolute"


def _mask(vlm: PreTrainedModel, query_type: int | None, inputs: Mapping[str, torch.Tensor]) -> str:
    if query_type is not None:
        return "prefix: picture and prompt see each other, the query sees both"
    if vlm.config.get_text_config().model_type.startswith(("gemma3", "gemma4")) and "token_type_ids" in inputs:
        return "causal, and both ways within the picture"
    return "causal"


def _augmentation(spec: RunSpec) -> str:
    training = spec.training
    if training.augment == "crop_and_colour":
        return "random resized crop and colours"
    return f"jitter within {training.image_jitter:g}, shift of at most {training.image_shift} px"


def _mixture(spec: RunSpec) -> str:
    if not spec.data.mixture:
        return "none"
    told = [
        f"{each.weight:g} of {each.folder or each.conversations}"
        + (f" (pictures: {each.images})" if each.images else "")
        for each in spec.data.mixture
    ]
    asked = any(each.conversations for each in spec.data.mixture)
    weight = f"; language weight {spec.training.language_weight:g}" if asked else ""
    return f"for each demonstrated frame {', '.join(told)}{weight}"


# ---------------------------------------------------------------------------------------------------- what it takes


def forward_flops(
    vlm: PreTrainedModel, pictures: Mapping[str, torch.Tensor], length: int, tokens: int
) -> dict[str, float]:
    """FLOPs of one sample's forward pass by group, the LM head left out: 2 for each weight that a token meets, and
    attention's two products. An estimate; encoders of several stages are counted, not estimated."""
    groups, config = treatments.groups(vlm), vlm.config
    patches = _patches(vlm, pictures)
    text, vision = config.get_text_config(), config.vision_config
    heads = text.num_attention_heads
    inner = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers = _layers(vlm.get_decoder())
    met = _weights(groups["llm"], experts.share(vlm))
    llm = 2 * met * length + 2 * length**2 * inner * layers  # half the square: causal
    encoder = vlm.get_encoder(modality="image")
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if len(convolutions) > 1:
        eyes = _counted(encoder, next(value for value in pictures.values() if value.ndim == 4))
    else:
        width = getattr(vision, "hidden_size", None) or vision.embed_dim
        eyes = 2 * _weights(groups["vision"]) * patches + 4 * _attended(vision, patches) * width
    return {"vision": eyes, "projector": 2 * _weights(groups["projector"]) * tokens, "llm": llm}


def _patches(vlm: PreTrainedModel, pictures: Mapping[str, torch.Tensor]) -> int:
    """Tokens in the vision encoder."""
    pixels = next(value for name, value in pictures.items() if name.startswith("pixel_values"))
    if pixels.ndim < 4 or pixels.shape[-3] != 3:  # patches already, (P, values) or (tiles, P, values)
        return pixels.shape[:-1].numel()
    convolutions = [m for m in vlm.get_encoder(modality="image").modules() if isinstance(m, nn.Conv2d)]
    strides = convolutions[0].stride if convolutions else (vlm.config.vision_config.patch_size,) * 2
    return pixels.shape[:-3].numel() * (pixels.shape[-2] // int(strides[0])) * (pixels.shape[-1] // int(strides[1]))


def _attended(vision: Any, patches: int) -> int:
    """Pairs of patches that attend to each other, over all layers."""
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    full = getattr(vision, "fullatt_block_indexes", None)
    if full is None:
        return layers * patches**2
    window = (vision.window_size // vision.patch_size) ** 2
    return len(full) * patches**2 + (layers - len(full)) * patches * min(window, patches)


def _weights(parameters: Mapping[str, nn.Parameter], share: float = 1.0) -> float:
    """Numbers of weight matrices that one token is multiplied with; of a mixture's experts this ``share``."""
    total = 0.0
    for name, parameter in parameters.items():
        if parameter.ndim < 2 or "pos_embed" in name or "position_embedding" in name or "embed_positions" in name:
            continue
        total += parameter.numel() * (share if ".experts." in name else 1.0)
    return total


def _layers(module: nn.Module) -> int:
    return sum(isinstance(part, GradientCheckpointingLayer) for part in module.modules())


def _counted(encoder: nn.Module, pixels: torch.Tensor) -> float:
    device = next(encoder.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels.to(device))
    return counter.get_total_flops()


def training_flops(forward: Mapping[str, float], treatment: TreatmentSpec) -> float:
    """Of one sample's step: a pass back through a group costs another forward pass, and its weights' gradients a third.

    Nothing goes back through a group when nothing in it or before it is trained; the query stands before the LLM.
    """
    modes = {name: group.mode for name, group in treatment.groups().items()}
    before = False
    total = 0.0
    for name in ("vision", "projector", "llm"):
        if name == "llm":
            before = before or modes["word_embedding"] != "frozen" or treatment.head.mode == "trained"
        before = before or modes[name] != "frozen"
        total += forward[name] * (1 + before + (modes[name] in ("trained", "scratch")))
    return total


def states_bytes(vla: VLA, average: bool) -> int:
    """Weights, gradients, moments (and the moving average) of all processes together."""
    trained = sum(p.numel() for p in vla.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in vla.parameters() if not p.requires_grad)
    return trained * (STATE_BYTES + 4 * average) + 4 * frozen


def activation_bytes(
    vlm: PreTrainedModel, spec: RunSpec, pictures: Mapping[str, torch.Tensor], length: int, tokens: int
) -> float:
    """Kept for the way back of one sample: nothing in groups that nothing goes back through."""
    own, back = _owners(vlm), _gone_back_through(spec.treated)
    used = {"vision": _patches(vlm, pictures), "projector": tokens, "llm": length}
    size = 2 if spec.training.precision == "bf16" else 4
    total = float(experts.width(vlm) * length * size)
    for name, module in vlm.named_modules():
        if ".experts." in name:
            continue  # adapters of experts: a token meets some of them
        if isinstance(module, nn.Linear) and back.get(group := own[id(module.weight)], False):
            total += (module.in_features + module.out_features) * used[group] * size
    return ACTIVATION_FACTOR * total


def copies_bytes(vla: VLA, spec: RunSpec) -> int:
    """Copies in bf16 of the fp32 weights that a bf16 run multiplies with: those of layers and experts that gradients
    pass are all there when the forward pass ends (with gradient checkpointing, a layer's at a time)."""
    if spec.training.precision != "bf16":
        return 0
    vlm, back = vla.backbone.vlm, _gone_back_through(spec.treated)
    passed = {at for at, group in _owners(vlm).items() if back.get(group, False)}
    head: Any = vlm.get_output_embeddings()
    layers = [module for module in vla.modules() if isinstance(module, CAST) and module is not head]
    kept = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad or id(p) in passed]
    mixed = [matrix for _, mixture in experts.find(vlm) for matrix in experts.matrices(mixture).values()]
    return 2 * sum(p.numel() for p in [*kept, *(matrix for matrix in mixed if id(matrix) in passed)])


def _owners(vlm: PreTrainedModel) -> dict[int, str]:
    """The group of each parameter, by its id."""
    return {id(p): name for name, parameters in treatments.groups(vlm).items() for p in parameters.values()}


def _gone_back_through(treatment: TreatmentSpec) -> dict[str, bool]:
    """By group of layers, whether gradients pass it: where it is trained, or what comes before it is."""
    modes = {name: group.mode for name, group in treatment.groups().items()}
    vision = modes["vision"] != "frozen"
    return {"vision": vision, "projector": vision or modes["projector"] != "frozen", "llm": True}


def answers_bytes(vla: VLA, spec: RunSpec, image_size: int, talks: Sequence[Turns]) -> tuple[float, float]:
    """What conversations of one batch take beyond as many frames: activations of further positions, and logits, which
    are made of each at every position that is in an answer of any."""
    vlm, inputs = vla.backbone.vlm, vla.backbone.inputs
    made = inputs.answers(talks, image_size, image_size)
    frame = inputs.tokens([INSTRUCTION], image_size, image_size)["input_ids"].shape[1]
    pictures = inputs.pixels(torch.zeros((1, image_size, image_size, 3), dtype=torch.uint8))
    kept = [activation_bytes(vlm, spec, pictures, length, 0) for length in (made["labels"].shape[1], frame)]
    head: Any = vlm.get_output_embeddings()
    logits = len(talks) * len(made["kept"]) * len(head.weight)
    return len(talks) * (kept[0] - kept[1]), LOGITS_BYTES * logits
