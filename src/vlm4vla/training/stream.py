"""How samples are drawn for a policy, and which sources it cannot be trained on: for a training and for a dry run."""

from vlm4vla.backbones.vlm import Backbone
from vlm4vla.data.mixture import Mixture
from vlm4vla.data.sources import Sources
from vlm4vla.errors import UserError


def stream(backbone: Backbone, sources: Sources, batch_size: int, one_shape: bool) -> Mixture | None:
    """The stream of samples of several sources; None for a robot set alone. No weight of ``backbone`` is read.

    Args:
        one_shape: all batches are to have the same shape.

    Raises:
        UserError: a share is too small for batches of that size; or there are conversations, and the VLM has no words,
            cannot be given one of them, or one shape is asked for.
    """
    if sources.conversations:
        backbone.require_words()
        if one_shape:
            found = "--compile with conversations, of which every batch has another number and length"
            raise UserError(found, "demonstrations alone", "leave out --compile")
        for talks in sources.conversations:
            talks.check(backbone.inputs.require_talk)
    if len(sources.names) == 1:
        return None
    return Mixture(sources.sizes, sources.weights, batch_size, sources.names)
