"""Lets PyPI's torchvision be imported beside a CPU build of torch (docs/adr/0003-torchvision.md).

The compiled part of PyPI's Linux wheel wants CUDA libraries. Beside a CPU torch it cannot load, and then the import as
a whole fails, because torchvision describes operators to the compiler that nobody has declared. The image processors of
transformers need only its tensor transforms, which are Python: with those operators declared, they work.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

declared: list[object] = []
"""Keeps the declarations alive; empty where torchvision's own library loads."""


class DeclareBeforeImport(MetaPathFinder):
    """Waits for the first ``import torchvision``, and so costs nothing before."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            if (found := PathFinder.find_spec(name)) and found.submodule_search_locations:
                declare(found.submodule_search_locations)
        return None  # the usual finders import it


def declare(folder: Sequence[str]) -> None:
    """Load the compiled part of the torchvision in ``folder``; where that fails, declare what its import asks for."""
    import torch

    compiled = PathFinder.find_spec("_C", folder)
    try:
        if compiled is None or compiled.origin is None:
            raise OSError
        torch.ops.load_library(compiled.origin)
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.append(library)


def install() -> None:
    """Watch for the import of torchvision in this process."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, DeclareBeforeImport())
