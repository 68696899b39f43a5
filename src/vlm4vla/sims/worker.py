"""One environment per process: the worker that runs a simulator, and the parent's handle on it.

The worker runs in this interpreter or in a simulator's own (``sims/environments.py``), where this package need not be
installed: ``BOOTSTRAP`` imports it from its folder, and nothing else of its surroundings. It needs numpy and no torch.
Parent and worker exchange frames (``sims/frames.py``) over the worker's stdin and stdout. Inside the worker, stdout is
stderr, so a library that prints cannot corrupt the stream. A request is a dict with ``do``:

    make(sim, kwargs)  reset(seed, look)  execute(actions, look, then)  observe()

where ``look`` asks for the observation in the same reply (never after the end of an episode). A reply holds what was
asked for and the ``seconds`` spent in ``sim`` and ``render``, or an error. Where ``execute`` ends the episode and
``then`` is a seed, the worker goes on as if ``reset(then, look)`` had followed, and a second reply comes: it need not
wait for a parent that is busy. The worker ends when its stdin closes or its parent dies.
"""

import contextlib
import errno
import fcntl
import os
import platform
import select
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vlm4vla import sims
from vlm4vla.errors import UserError
from vlm4vla.sims.base import Sim, StepOutcome
from vlm4vla.sims.environments import interpreter
from vlm4vla.sims.frames import Arrays, FrameReader, frame, write
from vlm4vla.types import Observation

STDERR_TAIL = 4000
"""Bytes of a worker's stderr that a fault message quotes."""
PIPE_BYTES = 1 << 18
"""Wanted of a pipe: a picture crosses in one piece then, and not in 64 KiB ones between which processes take turns."""
POLITE_EXIT_S = 2.0
BOOTSTRAP = """
import importlib.util, sys
folder, parent = sys.argv[1:]
spec = importlib.util.spec_from_file_location("vlm4vla", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["vlm4vla"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from vlm4vla.sims.worker import main
main(int(parent))
"""
"""Not ``-m``: to put this package's ``site-packages`` on a foreign interpreter's path would shadow its own packages."""


class WorkerFault(Exception):  # noqa: N818 (a fault is what the results call it)
    """The worker crashed, hung, raised or broke the protocol: the infrastructure's fault, not the policy's."""

    told = False
    """Whether it is an exception that the worker itself could tell: another start would most likely raise it again."""
    refused = False
    """Whether the simulator refused the request with a ``ValueError`` and lives on."""


# ---------------------------------------------------------------------------------------------------- parent's side


@dataclass(frozen=True)
class Reply:
    """What a worker answered."""

    outcome: StepOutcome | None = None
    observation: Observation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By part: ``sim``, ``render``."""
    made: dict[str, Any] = field(default_factory=dict)
    """After ``make``: ``convention`` and ``versions``."""


class Worker:
    """The parent's handle on one worker process. One request is under way at a time; ``make`` is the first.

    Args:
        sim: a key of ``vlm4vla.sims.SIMS`` or ``module:Class``.
        kwargs: its keyword arguments, plain JSON values.
        timeout_s: a reply that takes longer is a fault. Time in which the parent does not listen must be given back
            with ``postpone``.
        python: the interpreter to run in; see ``environments.interpreter``, which also says what it raises.
    """

    def __init__(self, sim: str, kwargs: dict, timeout_s: float = 120.0, python: str | None = None):
        self._sim, self._kwargs, self._timeout_s = sim, kwargs, timeout_s
        self._python = interpreter(sim, python)
        self.start()

    def start(self) -> None:
        """Start the process and send it ``make``. Where the system has no room for a process, ``poll`` says so."""
        self._unstarted: OSError | None = None
        # Of its own session: Ctrl-C reaches only the parent, which ends its workers in order, and a simulator's own
        # child processes die with it.
        try:
            self._process = subprocess.Popen(
                [self._python, "-c", BOOTSTRAP, str(Path(sims.__file__).parents[1]), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ},
                start_new_session=True,
            )
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOMEM):  # a system short of processes or memory
                self._unstarted, self.deadline = error, time.monotonic()
                return
            if error.errno != errno.ENOEXEC:
                raise
            found = f"{self._python}, which is no program"
            raise UserError(found, "a Python interpreter", "name one: --sim-python /path/to/bin/python") from error
        stdin, out, err = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert out is not None
        assert err is not None
        self._stdin, self._out, self._err = stdin, out.fileno(), err.fileno()
        self._pipes = (stdin, out, err)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux, where a user's pipes may hold so much in all
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._out, False)
        os.set_blocking(self._err, False)
        self._frames, self._said, self._err_open = FrameReader(self._out), b"", True
        self.send("make", sim=self._sim, kwargs=self._kwargs)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def descriptors(self) -> list[int]:
        """To wait on: a reply, a crash or words on stderr make one of them readable."""
        if self._unstarted:
            return []
        return [self._out, self._err] if self._err_open else [self._out]

    def send(self, do: str, actions: np.ndarray | None = None, **fields: Any) -> None:
        """Send a request. A worker that is gone is noticed by the ``poll`` that follows."""
        self.expect()
        with contextlib.suppress(BrokenPipeError):
            write(self._stdin.fileno(), frame({"do": do, **fields}, {} if actions is None else {"actions": actions}))

    def expect(self) -> None:
        """Give the next reply its full time: a request was sent, or (``then``) a second reply follows."""
        self.deadline = time.monotonic() + self._timeout_s

    def postpone(self, seconds: float) -> None:
        """Move the reply's deadline by the time in which nobody listened."""
        self.deadline += seconds

    def poll(self) -> Reply | None:
        """The reply, or None while it is not there.

        Raises:
            WorkerFault: crash, time-out, exception or broken frame; the process is of no more use.
            UserError: the worker refused the request for a reason that the user can mend.
        """
        if self._unstarted:
            raise WorkerFault(f"the system starts no process: {self._unstarted}") from self._unstarted
        self._drain_stderr()
        try:
            answer = self._frames.read()
        except EOFError:
            raise self._fault("ended") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._fault(f"broke the protocol ({error})") from error
        if answer is None:
            if time.monotonic() > self.deadline:
                raise self._fault(f"gave no reply within {self._timeout_s:g} s")
            return None
        header, arrays = answer
        if "user_error" in header:
            raise UserError(*header["user_error"])
        if "error" in header:
            fault = WorkerFault(header["error"])
            fault.told, fault.refused = True, header["refused"]
            raise fault
        outcome = StepOutcome(**header["outcome"]) if "outcome" in header else None
        images = {name.removeprefix("image/"): a for name, a in arrays.items() if name.startswith("image/")}
        observation = Observation(images, header["instruction"], arrays.get("state")) if images else None
        return Reply(outcome, observation, header["seconds"], header.get("made", {}))

    def ask(self, do: str, actions: np.ndarray | None = None, **fields: Any) -> Reply:
        """Send a request and wait for its reply."""
        self.send(do, actions, **fields)
        return self.receive()

    def receive(self) -> Reply:
        """Wait for the reply to the last request; raises as ``poll`` does."""
        while (reply := self.poll()) is None:
            wait([self])
        return reply

    def restart(self) -> None:
        """A fresh process; its reply to ``make`` is the next."""
        self.kill()
        self.start()

    def kill(self) -> None:
        """End the process and its children now."""
        if self._unstarted:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close_pipes()

    def dismiss(self) -> None:
        """Ask the worker to close its simulator and end, without waiting for that; ``close`` does."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def close(self) -> None:
        """Let the worker close its simulator, but not for long."""
        if self._unstarted:
            return
        self.dismiss()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLITE_EXIT_S)
        self.kill()

    def _close_pipes(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _drain_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._err_open:
                said = os.read(self._err, 1 << 16)
                self._err_open = bool(said)
                self._said = (self._said + said)[-STDERR_TAIL:]

    def _fault(self, what: str) -> WorkerFault:
        """The message of a fault: how the process ended, where it did, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.2)
            what += f" with signal {signal.Signals(-code).name}" if code < 0 else f" with exit status {code}"
        self._drain_stderr()
        words = self._said.decode(errors="replace").strip()
        return WorkerFault(f"the simulator's worker {what}" + (f"; its last words:\n{words}" if words else ""))


def wait(workers: Sequence[Worker]) -> None:
    """Sleep until one of the workers says something or one's deadline has passed."""
    timeout = min(worker.deadline for worker in workers) - time.monotonic()
    poll = select.poll()
    for worker in workers:
        for descriptor in worker.descriptors:
            poll.register(descriptor, select.POLLIN)
    poll.poll(1e3 * max(0.0, timeout) + 1)


# ---------------------------------------------------------------------------------------------------- worker's side


def exit_with_parent(parent: int, period_s: float = 1.0) -> None:
    """End this process soon after its parent, even where the main thread is stuck."""

    def watch() -> NoReturn:
        while os.getppid() == parent:
            time.sleep(period_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_pool_process(parent: int) -> None:
    """Initialiser of a process pool's processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    exit_with_parent(parent)


class Server:
    """Answers requests about one simulator."""

    def __init__(self) -> None:
        self.sim: Sim | None = None

    def answer(self, request: dict, arrays: Arrays) -> tuple[dict, Arrays]:
        do = request["do"]
        started = time.perf_counter()
        if do == "make":
            self.sim = sims.make(request["sim"], **request["kwargs"])
            versions = {"python": platform.python_version(), **sims.versions(self.sim)}
            made = {"convention": self.sim.convention.to_dict(), "versions": versions}
            return {"made": made, "seconds": {"make": time.perf_counter() - started}}, {}
        assert self.sim is not None, "make comes first"
        reply: dict[str, Any] = {}
        look = request.get("look", False)
        if do == "reset":
            self.sim.reset(request["seed"])
        elif do == "execute":
            outcome = self.sim.execute(arrays["actions"])
            reply["outcome"] = asdict(outcome)
            look = look and not outcome.done
        elif do == "observe":
            look = True
        else:
            raise ValueError(f"unknown request {do!r}")
        simulated = time.perf_counter()
        reply["seconds"] = {"sim": simulated - started}
        if not look:
            return reply, {}
        seen = self.sim.observe()
        reply["seconds"]["render"] = time.perf_counter() - simulated
        reply["instruction"] = seen.instruction
        images = {f"image/{name}": image for name, image in seen.images.items()}
        return reply, images if seen.state is None else {**images, "state": seen.state}


def main(parent: int) -> None:
    """The worker, until its stdin closes or the process ``parent`` ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent(parent)
    # The protocol keeps private copies of the pipes; from here on, prints of libraries go to stderr.
    requests, replies = FrameReader(os.dup(0)), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    server = Server()
    with contextlib.suppress(EOFError, BrokenPipeError):
        request = None
        while request := request or requests.read():
            header, arrays = request
            request = None
            try:
                reply, images = server.answer(header, arrays)
                parts = frame(reply, images)
                if header.get("then") is not None and reply["outcome"]["done"]:
                    request = {"do": "reset", "seed": header["then"], "look": header.get("look", False)}, {}
            except UserError as error:
                parts = frame({"user_error": [error.found, error.expected, error.next_step]}, {})
            except Exception as error:
                words = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-STDERR_TAIL:]}"
                parts = frame({"error": words, "refused": isinstance(error, ValueError)}, {})
            write(replies, parts)
    if server.sim is not None:
        server.sim.close()
