"""What other projects' clients say on the wire, and our answers. One class a dialect, one object a connection.

    openpi    8000   first a metadata dict; then observation dict -> {actions (H, A), policy_timing, server_timing}.
                     An error is a text frame and the end of the connection. LIBERO's and DROID's keys are known.
    vla-eval  8001   frames {type, payload, seq, timestamp}: hello, observation -> action (A,) one at a time,
                     episode_start, episode_end, error. An error leaves the connection open. (Its own default port is
                     openpi's, and the two cannot be told apart before the server speaks.)
    starvla  10093   first a metadata dict; then {examples: [{image: [...], lang, state}]}, or that as the payload of
                     {type, request_id, payload} -> {status, ok, type, request_id, data: {actions (B, H, A)}}.

Field names are those of openpi's client 0.1, vla-eval 0.8 and StarVLA's policy server (2026).
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol

import numpy as np

from vlm4vla import __version__
from vlm4vla.errors import UserError
from vlm4vla.serving.codec import MalformedMessage, pack, unpack
from vlm4vla.serving.service import OWN_KEY, Service
from vlm4vla.types import ActionChunk, Observation

log = logging.getLogger(__name__)
Act = Callable[[Observation], Awaitable[ActionChunk]]
"""Asks the batched policy."""


class Session(Protocol):
    """One client's connection."""

    def __init__(self, service: Service, act: Act): ...

    def greeting(self) -> bytes | None:
        """What is sent before the client says anything."""
        ...

    async def answer(self, message: bytes) -> bytes | None:
        """The reply to a message, None where the dialect has none. Raises ``MalformedMessage``, ``UserError``."""
        ...

    def refusal(self, reason: str) -> tuple[bytes | str, bool]:
        """How the dialect says that the last message cannot be answered, and whether the connection ends with it."""
        ...


def read(message: bytes, pictures: bool = False) -> dict:
    """Decode a message; with compressed ``pictures`` not on the event loop."""
    value = unpack(message, pictures)
    if not isinstance(value, dict):
        raise MalformedMessage(f"a message that is a {type(value).__name__}, not a dict")
    return value


def first(values: dict, names: tuple[str, ...], what: str) -> Any:
    """The value of the one key among ``names`` that is there; two of them would have to be guessed between."""
    there = [name for name in names if name in values]
    if len(there) != 1:
        found = sorted(map(str, values))[:16]
        raise UserError(
            f"{what} under {there or 'none of the known keys'} among {found}", f"one of {names}", "send one"
        )
    return values[there[0]]


class OpenPi:
    """openpi's client, e.g. its LIBERO and DROID examples."""

    IMAGES = ("observation/image", "observation/exterior_image_1_left")

    def __init__(self, service: Service, act: Act):
        self._service, self._act = service, act
        self._previous_ms: float | None = None

    def greeting(self) -> bytes:
        return pack({OWN_KEY: self._service.about})

    async def answer(self, message: bytes) -> bytes:
        started = time.perf_counter()
        values = read(message)
        form = self._service.form_of(values.get(OWN_KEY))
        observation = await self._observation(values)
        asked = time.perf_counter()
        chunk = await self._act(observation)
        now = time.perf_counter()
        timing = {"infer_ms": (now - asked) * 1000}
        actions = self._service.actions(chunk, form)
        reply: dict = {"actions": actions, "policy_timing": timing, "server_timing": {**timing}}
        if self._previous_ms is not None:
            reply["server_timing"]["prev_total_ms"] = self._previous_ms
        self._previous_ms = (now - started) * 1000
        return pack(reply)

    async def _observation(self, values: dict) -> Observation:
        state = values.get("observation/state")
        if state is None and "observation/joint_position" in values:  # DROID: seven joints and the gripper
            state = [values["observation/joint_position"], values.get("observation/gripper_position", [])]
        image = first(values, self.IMAGES, "the third-person picture")
        return await self._service.observation(image, values.get("prompt"), state)

    def refusal(self, reason: str) -> tuple[str, bool]:
        return reason, True


class StarVLA:
    """StarVLA's client. Actions are in native units; its older clients, which undo a normalisation, are told so."""

    SAMPLING = frozenset({"do_sample", "use_ddim", "num_ddim_steps", "cfg_scale"})
    """Options of sampling heads. Ours is deterministic: they cannot change its answer."""
    MAX_EXAMPLES = 64

    def __init__(self, service: Service, act: Act):
        self._service, self._act = service, act
        self._about: dict = {}

    def greeting(self) -> bytes:
        service = self._service
        return pack(
            {
                "env": OWN_KEY,
                "action_chunk_size": service.source.chunk,
                "model_action_dim": len(service.source.policy.convention.names),
                "model_state_dim": service.source.state_size,
                "available_unnorm_keys": [service.source.name],
                "default_unnorm_key": service.source.name,
                OWN_KEY: service.about,
            }
        )

    async def answer(self, message: bytes) -> bytes:
        self._about = {"type": "unknown", "request_id": "default"}
        values = read(message)
        kind, request_id = values.pop("type", "infer"), values.pop("request_id", "default")
        if not isinstance(kind, str) or not isinstance(request_id, str | int):
            raise MalformedMessage("a type that is no text, or a request_id that is neither text nor number")
        self._about["request_id"] = request_id
        if kind == "ping":
            return pack({"status": "ok", "ok": True, **self._about, "type": "ping"})
        if kind not in ("infer", "predict_action"):
            raise UserError(f"a request of type {kind!r:.80}", "infer or ping", "send one of them")
        self._about["type"] = "inference_result"
        request = values.pop("payload") if "payload" in values else values
        if not isinstance(request, dict):
            raise MalformedMessage("a payload that is not a dict")
        form = self._service.form_of(request.pop(OWN_KEY, None))
        observations = await asyncio.gather(*(self._observation(example) for example in self._examples(request)))
        chunks = await asyncio.gather(*(self._act(each) for each in observations))
        data = {"actions": np.stack([self._service.actions(chunk, form) for chunk in chunks])}
        return pack({"status": "ok", "ok": True, **self._about, "data": data})

    def _examples(self, request: dict) -> list:
        examples, key = request.get("examples"), request.get("unnorm_key")
        unknown = request.keys() - self.SAMPLING - {"examples", "unnorm_key"}
        if unknown:
            raise UserError(f"the options {sorted(map(str, unknown))[:8]}", "examples and unnorm_key", "leave them out")
        if not (key is None or (isinstance(key, str) and key == self._service.source.name)):
            raise UserError(f"unnorm_key {key!r:.80}", self._service.source.name, "leave it out")
        if not isinstance(examples, list) or not 0 < len(examples) <= self.MAX_EXAMPLES:
            raise UserError("no list of examples", f"1 to {self.MAX_EXAMPLES} examples", "send {examples: [...]}")
        return examples

    async def _observation(self, example: Any) -> Observation:
        images = example.get("image") if isinstance(example, dict) else None
        if not isinstance(images, list) or not images:
            raise UserError("an example without pictures", "image: [third person, ...]", "send the camera's picture")
        return await self._service.observation(images[0], example.get("lang"), example.get("state"))

    def refusal(self, reason: str) -> tuple[bytes, bool]:
        return pack({"status": "error", "ok": False, **self._about, "error": {"message": reason}}), False


class VlaEval:
    """vla-eval's harness. It wants one action an observation: the rest of a chunk waits here, at most until the
    episode ends."""

    IMAGES = ("primary", "agentview", "rgb_static", "base_camera", "front", "third_person")
    """Its benchmarks' names of the third-person camera (LIBERO, SimplerEnv, CALVIN, ManiSkill, ...)."""

    FORMS: ClassVar = {
        **{
            f"vla_eval.benchmarks.{name}.benchmark": "libero"
            for name in ("libero", "libero_pro", "libero_plus", "libero_mem")
        },
        "vla_eval.benchmarks.calvin.benchmark": "calvin_metric",
        "vla_eval.benchmarks.simpler.benchmark": "simpler",
    }
    """What its benchmarks do with an action, by the module that a hello names. Read from their code, not from the
    action spec that they declare: SimplerEnv's says "close positive" and opens above 0.5."""

    def __init__(self, service: Service, act: Act):
        self._service, self._act = service, act
        self._said: str | None = None
        """The form of the benchmark that the client named."""
        self._left: deque[np.ndarray] = deque()
        self._seq = 0

    def greeting(self) -> None:
        return None

    def _frame(self, kind: str, payload: dict) -> bytes:
        return pack({"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}, "text")

    async def answer(self, message: bytes) -> bytes | None:
        self._seq = 0
        frame = await asyncio.to_thread(read, message, pictures=True)
        if missing := {"type", "payload", "seq", "timestamp"} - frame.keys():
            raise MalformedMessage(f"a frame without {sorted(missing)}")
        kind, payload, seq = frame["type"], frame["payload"], frame["seq"]
        if not isinstance(payload, dict) or type(seq) is not int or not 0 <= seq < 1 << 63:
            raise MalformedMessage("a frame whose payload is no dict or whose seq is no number")
        self._seq = seq
        if not isinstance(kind, str):
            raise MalformedMessage("a type that is no text")
        if kind == "hello":
            return self._frame("hello", self._hello(payload.get("benchmark")))
        if kind == "observation":
            return self._frame("action", {"actions": await self._next(payload)})
        if kind in ("episode_start", "episode_end"):
            self._left.clear()
            return None
        if kind == "error":
            return None
        raise UserError(f"a frame of type {kind!r:.80}", "hello, observation, episode_start, episode_end", "send those")

    def _hello(self, benchmark: Any) -> dict:
        service = self._service
        self._said = self.FORMS.get(str(benchmark).partition(":")[0])
        try:
            form = service.form_of(self._said)
        except UserError as error:
            log.warning("refused a vla-eval client, which stops without showing why: %s", error)
            raise
        return {
            "harness_version": __version__,
            "protocol_version": 1,
            "model_server": f"vlm4vla {service.source.name}",
            "capabilities": {},
            "observation_params": {"send_state": True} if service.source.state_size else {},
            OWN_KEY: {**service.about, "form": form},
        }

    async def _next(self, payload: dict) -> np.ndarray:
        if payload.get("episode_restart") is True:  # CALVIN: the next instruction of a chain
            self._left.clear()
        if not self._left:
            form = self._service.form_of(self._said)
            observation = await self._observation(payload)
            actions = self._service.actions(await self._act(observation), form)
            self._left.extend(actions[: self._service.execute or None])
        return self._left.popleft()

    async def _observation(self, payload: dict) -> Observation:
        images, state = payload.get("images"), payload.get("states", payload.get("state"))
        if not isinstance(images, dict):
            raise UserError("an observation without images", "images by camera name", "send them")
        image = first(images, self.IMAGES, "the third-person picture")
        return await self._service.observation(image, payload.get("task_description"), state)

    def refusal(self, reason: str) -> tuple[bytes, bool]:
        self._left.clear()
        return self._frame("error", {"error": reason}), False


DIALECTS: dict[str, tuple[type[Session], int]] = {
    "openpi": (OpenPi, 8000),
    "vla-eval": (VlaEval, 8001),
    "starvla": (StarVLA, 10093),
}
"""Name -> class and default port."""
