"""Data sets on the Hugging Face Hub: ``hub:owner/name`` or ``hub:owner/name@revision``.

Downloads lie under ``files.cache()`` and go on where they were interrupted. Of the films only those of the cameras that
the folder's description names are fetched; without one, all.
"""

import json
from pathlib import Path

from vlm4vla.data.layout import OWN_KEY, description, read_info
from vlm4vla.errors import UserError
from vlm4vla.files import cache, write_text
from vlm4vla.hub import PREFIX, snapshot, split

COMPLETE = ".complete.json"
"""Beside the files: what has been downloaded. It is written last, so where it is, the hub need not be asked again."""


def local(source: Path | str, only_meta: bool = False) -> Path:
    """A folder as it is; of ``hub:owner/name`` the local copy, downloaded if it is not there yet.

    Raises:
        UserError: no such data set, no access, or the download was interrupted.
    """
    if not str(source).startswith(PREFIX):
        return Path(source)
    name, revision = split(str(source))
    folder = place(name, revision)
    features = description(folder).get("cameras", {}).values()
    wanted = ["meta/*"] if only_meta else ["meta/*", "data/*", *([f"videos/*{f}/*" for f in features] or ["videos/*"])]
    record = folder / COMPLETE
    there = json.loads(record.read_text()) if record.is_file() else []
    if not set(wanted) <= set(there):
        snapshot(str(source), wanted, data_set=True, folder=folder)
        read_info(folder)
        write_text(record, json.dumps(sorted({*there, *wanted})))
    return folder


def place(name: str, revision: str) -> Path:
    """Where a data set of the hub lies on this machine."""
    if name.count("/") != 1 or not all(part.strip(".") for part in name.split("/")):
        raise UserError(f"{PREFIX}{name}", f"{PREFIX}owner/name or {PREFIX}owner/name@revision", "mend the name")
    return cache() / "datasets" / "--".join([*name.split("/"), *([revision.replace("/", "-")] if revision else [])])


def describe(source: Path | str, convention: dict | None, cameras: dict[str, str]) -> Path:
    """Say what a foreign folder's files do not, in ``meta/vlm4vla.json``; lerobot's own files stay as they are.

    Args:
        convention: ``Convention.to_dict()``, or None to leave it.
        cameras: feature by camera name, e.g. ``{"main": "observation.images.image"}``.
    """
    folder = local(source, only_meta=True)
    info = read_info(folder)
    own = description(folder)
    pictures = [name for name, each in info["features"].items() if each.get("dtype") in ("image", "video")]
    if unknown := set(cameras.values()) - set(pictures):
        raise UserError(f"the features {sorted(unknown)}", f"of {pictures}", "name one that is there")
    own |= ({"convention": convention} if convention else {}) | ({"cameras": cameras} if cameras else {})
    write_text(folder / "meta" / f"{OWN_KEY}.json", json.dumps(own, indent=2))
    return folder
