"""Command-line arguments -> specs."""

import sys
from pathlib import Path
from typing import Any

import yaml

from vlm4vla.convention import NAMED, Convention
from vlm4vla.errors import UserError
from vlm4vla.spec import DataSpec, RunSpec, Runtime, load_yaml, parse, yaml_file


def run_spec(path: Path | None, overrides: tuple[str, ...]) -> RunSpec:
    """The run that a YAML file (defaults without one) and ``KEY=VALUE`` overrides describe."""
    values = load_yaml(path) if path else {}
    for override in overrides:
        put(values, override)
    return parse(RunSpec, values, " and ".join(filter(None, [str(path or ""), "--set" if overrides else ""])))


def put(values: dict[str, Any], override: str) -> None:
    """Apply ``a.b=VALUE`` (VALUE as YAML) to nested ``values``."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}", "KEY=VALUE", "e.g. --set training.steps=200")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}, where {parent} is no section", "SECTION.KEY=VALUE", "see spec.py")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override}, whose value is not YAML: {error}", "KEY=VALUE", "quote the value"
        ) from error


def named_convention(name: str) -> Convention:
    """A convention of a public benchmark by name, or the one in a YAML file."""
    if name in NAMED:
        return NAMED[name]
    if not Path(name).suffix:
        raise UserError(f"the convention {name!r}", f"one of {', '.join(NAMED)}, or a YAML file", "name one of them")
    return Convention.from_dict(load_yaml(name))


def pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    """``("a=b", ...)`` -> ``{"a": "b"}``."""
    if wrong := [value for value in values if not all(value.partition("="))]:
        raise UserError(f"{option} {wrong[0]}", "NAME=VALUE", f"e.g. {option} main=observation.images.image")
    return dict(value.split("=", 1) for value in values)


def trained_on(spec: RunSpec, folder: Path) -> tuple[RunSpec, str | None]:
    """What a policy of ``spec`` is when it is trained on ``folder``, and the protocol that was recorded there.

    The spec keeps its data section where the folder is exactly the recording that the section describes; otherwise it
    names the folder, for a policy's spec must not claim other demonstrations than it saw.
    """
    from vlm4vla.data.layout import OWN_KEY
    from vlm4vla.data.lerobot import Dataset
    from vlm4vla.data.record import recording

    found = Dataset.open(folder).info.get(OWN_KEY, {}).get("provenance", {}).get("recording")
    name = found["protocol"]["name"] if found else None
    if spec.data.folder != str(folder) and (spec.data.folder is not None or found != recording(spec.data)):
        size = spec.data.image_size if "image_size" in spec.data.model_fields_set else None
        data = DataSpec(folder=str(folder), image_size=size, mixture=spec.data.mixture)
        spec = spec.model_copy(update={"data": data})
    return spec, name


def with_set(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def runtime(**changes: Any) -> Runtime:
    return Runtime(progress=sys.stderr.isatty(), **changes)


def study_file(name: str) -> Path:
    """The path of a study's YAML: as given, or one shipped inside the package."""
    return yaml_file(name, "study", Path(__file__).parent / "recipes")
