"""Scripts run by the interpreter of a simulator's own environment, with this project's source."""

import os
import subprocess
from pathlib import Path

import vlm4vla
from vlm4vla.sims import environments


def run_in(sim, code, *arguments):
    """What ``code`` prints; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm4vla.__file__).parents[1])}
    command = [environments.interpreter(sim), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
