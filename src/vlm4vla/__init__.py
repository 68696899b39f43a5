"""vlm4vla: which vision-language model should sit under a robot policy, and what of its knowledge survives?

Importing this package imports neither torch nor a simulator. Five files in order tell the main path:
``spec.py`` (what a run is), ``policy.py`` (VLM -> policy), ``training/loop.py`` (the one training loop),
``evaluation/rollout.py`` (the one episode loop), ``studies/runner.py`` (the matrix).
"""

from vlm4vla import torchvision_ops

__version__ = "0.1.0"

# Before transformers, which imports torchvision sooner or later.
torchvision_ops.install()
