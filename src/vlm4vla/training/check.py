"""What a training refuses before its first step: asked by the training and by its dry run alike.

Told by a training only: what is in its folder already (another run's checkpoint, known by the hash of weights),
pictures that are damaged, layers that do not compile, and memory that runs out.
"""

from dataclasses import dataclass

from accelerate.tracking import get_available_trackers

from vlm4vla.backbones.vlm import Backbone
from vlm4vla.convention import Convention
from vlm4vla.data.mixture import Mixture
from vlm4vla.data.normalize import Normalizer
from vlm4vla.data.sources import Sources
from vlm4vla.errors import UserError
from vlm4vla.policy import torch_device
from vlm4vla.spec import RunSpec, Runtime, TrainSpec


def execution(training: TrainSpec, runtime: Runtime, processes: int) -> None:
    """What can be said without a model.

    Raises:
        UserError: no such device or tracker, a batch that ``processes`` x ``runtime.accumulate`` parts cannot share
            evenly, or ``compile`` with ``shard``.
    """
    if runtime.device != "auto":
        torch_device(runtime.device)
    missing = set(runtime.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
    if missing:  # Accelerate passes over what is not installed
        what = " ".join(sorted(missing))
        raise UserError(f"no tracker {what} installed", "an installed tracker, or none", f"pip install {what}")
    if training.batch_size % (processes * runtime.accumulate):
        raise UserError(
            f"a batch of {training.batch_size} for {processes} processes x {runtime.accumulate} parts",
            "a batch that they can share evenly",
            "choose another number of processes, or another --accumulate",
        )
    if runtime.compile and runtime.shard:  # it would have to see through the hooks that gather weights
        raise UserError("--compile with --shard", "one of the two", "leave one out")


@dataclass(frozen=True)
class Material:
    """What a policy is trained on, as it needs it."""

    image_size: int
    convention: Convention
    actions: Normalizer
    state: Normalizer | None
    """With proprioception."""
    mixture: Mixture | None
    """The stream of samples of several sources; None for a robot set alone."""


def material(spec: RunSpec, sources: Sources, backbone: Backbone, one_shape: bool) -> Material:
    """No weight of ``backbone`` is read.

    Args:
        one_shape: all batches are to have the same shape.

    Raises:
        UserError: the demonstrations' pictures, actions, states or instructions cannot be trained on, or a share is too
            small for batches of that size; or there are conversations, and the VLM has no words, cannot be given one of
            them, or one shape is asked for.
    """
    demonstrations = sources.sets[0]
    for each in sources.sets:
        each.camera_size("main")
        for task in each.tasks:
            backbone.inputs.prompt(task)
    if sources.conversations:
        backbone.require_words()
        if one_shape:
            found = "--compile with conversations, of which every batch has another number and length"
            raise UserError(found, "demonstrations alone", "leave out --compile")
        for talks in sources.conversations:
            talks.check(backbone.inputs.require_talk)
    several = len(sources.names) > 1
    drawn, head = sources.frame_weights, spec.head
    return Material(
        spec.data.image_size or demonstrations.image_size,
        demonstrations.convention,
        Normalizer.fit(sources.actions, mode=head.normalize, bound=head.bound, weights=drawn),
        Normalizer.fit(sources.states, gripper=False, weights=drawn) if spec.proprioception else None,
        Mixture(sources.sizes, sources.weights, spec.training.batch_size, sources.names) if several else None,
    )
