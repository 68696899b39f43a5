"""What a comparison holds equal: an audit of each run as it is executed, and the differences that nobody declared.

Choices are compared: where two runs of a study differ in one, the study must say so, by varying the key of the run that
decides it or by naming the choice in ``differs``. Sizes follow from the choices and from the model, and are shown only.
No torch here: reports read audits out of policy folders (``training/examine.py`` makes them).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlm4vla.errors import UserError

CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "picture": ("size of the picture that the policy is given", ("data.image_size",)),
    "resampling": ("what the model's processor makes of it", ("data.image_size", "compat")),
    "visual_tokens": ("tokens of the picture in the LLM's sequence", ("data.image_size", "compat")),
    "prompt": ("text around the instruction", ()),
    "query": ("where the action query sits, and what it is at first", ("query_init",)),
    "positions": ("how the LLM tells positions", ()),
    "mask": ("who attends to whom", ()),
    "attention": ("implementation of attention", ()),
    "precision": ("of weights and computation", ("training.precision",)),
    "parts": ("what is trained, frozen, adapted or drawn anew", ("treatment",)),
    "learning_rates": ("peak by group", ("treatment", "training.learning_rate", "training.vlm_lr_scale")),
    "optimisation": ("steps, batch, schedule", ("training.steps", "training.batch_size", "training.schedule")),
    "augmentation": ("of pictures", ("training.image_jitter", "training.image_shift", "training.augment")),
    "mixture": ("what is drawn beside the demonstrations", ("data.mixture", "training.language_weight")),
    "head": ("kind, widths, chunk", ("head.kind", "head.hidden", "head.chunk", "head.gripper_weight")),
    "proprioception": ("whether the head sees the robot's state", ("proprioception",)),
}
"""Name of a choice -> what it is, and the keys of a run that decide it."""


@dataclass(frozen=True)
class Audit:
    """One run: the values of ``CHOICES``, and the sizes that follow."""

    choices: dict[str, str]
    sizes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Audit":
        return cls(dict(values["choices"]), dict(values["sizes"]))


def differences(audits: Mapping[str, Audit]) -> dict[str, dict[str, list[str]]]:
    """Choice -> value -> names of the runs that have it, for the choices in which the runs are not all equal."""
    found: dict[str, dict[str, list[str]]] = {}
    for choice in CHOICES:
        values: dict[str, list[str]] = {}
        for name, audit in audits.items():
            values.setdefault(audit.choices.get(choice, "unknown"), []).append(name)
        if len(values) > 1:
            found[choice] = values
    return found


def require_declared(audits: Mapping[str, Audit], keys: Iterable[str], differs: Iterable[str]) -> None:
    """Stop a comparison of runs that differ in what was not declared.

    Args:
        keys: of a run, dotted, that the study varies on purpose.
        differs: choices that the study says are not equal.

    Raises:
        UserError: naming each such choice with its values and the line that declares it.
    """
    varied = set(keys)
    hidden = {
        choice: values
        for choice, values in differences(audits).items()
        if choice not in set(differs) and not varied & set(CHOICES[choice][1])
    }
    if hidden:
        told = "".join(
            f"\n  {choice}: " + "; ".join(f"{value!r} in {', '.join(runs)}" for value, runs in values.items())
            for choice, values in hidden.items()
        )
        raise UserError(
            f"runs that differ in more than the study varies:{told}",
            "runs that are equal but for what is declared",
            f"make them equal, or add to the study: differs: [{', '.join(sorted({*differs, *hidden}))}]",
        )


def rows(audits: Mapping[str, Audit]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every choice, then every size, each with its values and the runs that have it ("" where all have)."""
    sizes = dict.fromkeys(name for audit in audits.values() for name in audit.sizes)
    result = []
    for source, keys in (("choices", CHOICES), ("sizes", sizes)):
        for key in keys:
            runs: dict[str, list[str]] = {}
            for name, audit in audits.items():
                runs.setdefault(_text(getattr(audit, source).get(key, "unknown")), []).append(name)
            values = [(value, "" if len(runs) == 1 else ", ".join(names)) for value, names in runs.items()]
            result.append((key.replace("_", " "), values))
    return result


def text(audits: Mapping[str, Audit]) -> str:
    """``rows`` for a terminal."""
    lines = []
    for name, values in rows(audits):
        for value, runs in values:
            lines.append(f"{name:<16} {value}" + (f"   [{runs}]" if runs else ""))
            name = ""
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items()) or "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
