"""The policy server: three dialects, one batched policy, and nobody who can disturb another."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from fake_sim import CONVENTION, FakePolicy
from policy_server import ask, expected, frame, openpi, picture, running, service
from vlm4vla.convention import BRIDGE, CALVIN, LIBERO
from vlm4vla.errors import UserError
from vlm4vla.serving.codec import pack, unpack
from vlm4vla.serving.server import Settings, listening
from vlm4vla.serving.wire import FORMS
from vlm4vla.types import ActionChunk


def get(running, path, **headers):
    url = running.url("openpi").replace("ws:", "http:") + path
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ------------------------------------------------------------------------------------------------------------- dialects


def test_openpi():
    with running() as server, server.connect("openpi") as client:
        about = unpack(client.recv())["vlm4vla"]
        assert about["convention"] == CONVENTION.to_dict() | {"names": list(CONVENTION.names)}
        assert (about["chunk"], about["image_size"], about["form"]) == (4, 8, "native")
        for shade in (40, 200):
            reply = ask(client, openpi(shade))
            np.testing.assert_array_equal(reply["actions"], expected(shade))
            assert reply["actions"].dtype == np.float32
            assert reply["server_timing"]["infer_ms"] > 0
        assert reply["server_timing"]["prev_total_ms"] > 0, "as its own server does from the second reply on"
        droid = {"observation/exterior_image_1_left": picture(40), "prompt": "go"}
        np.testing.assert_array_equal(ask(client, droid)["actions"], expected(40))


def test_openpi_ends_with_a_text_frame_that_says_what_to_do():
    with running() as server:
        for message, words in (
            (openpi(prompt=""), "a sentence"),
            (openpi(prompt="go" * 501), "1002 characters\nexpected: 1000"),
            ({"prompt": "go"}, "observation/image"),
            ({**openpi(), "observation/exterior_image_1_left": picture()}, "one of"),
            (openpi() | {"observation/image": picture(size=9)}, "--resize"),
            (openpi() | {"observation/image": picture().astype(np.float32)}, "uint8"),
            ([1, 2], "not a dict"),
            (b"\xc1", "MessagePack"),
        ):
            with server.connect("openpi") as client:
                client.recv()
                assert words in ask(client, message)
                with pytest.raises(ConnectionClosed):
                    client.recv(5)
                assert client.close_code == 1011


def test_starvla():
    with running() as server, server.connect("starvla") as client:
        about = unpack(client.recv())
        assert about["action_chunk_size"] == 4
        assert about["available_unnorm_keys"] == ["fake"]
        examples = [{"image": [picture(shade), picture()], "lang": "go"} for shade in (10, 20, 30)]
        flat = ask(client, {"examples": examples, "do_sample": False, "use_ddim": True, "num_ddim_steps": 10})
        assert (flat["status"], flat["ok"], flat["type"]) == ("ok", True, "inference_result")
        np.testing.assert_array_equal(flat["data"]["actions"], [expected(shade) for shade in (10, 20, 30)])
        asked = {"type": "infer", "request_id": "a", "payload": {"examples": examples[:1], "unnorm_key": "fake"}}
        reply = ask(client, asked)
        assert reply["request_id"] == "a"
        assert reply["data"]["actions"].shape == (1, 4, 7)
        assert ask(client, {"type": "ping", "request_id": "b"}) == {
            "status": "ok", "ok": True, "type": "ping", "request_id": "b",
        }  # fmt: skip
        for wrong, words in (
            ({"examples": examples, "unnorm_key": "bridge"}, "unnorm_key"),
            ({"examples": []}, "examples"),
            ({"examples": [{"image": [], "lang": "go"}]}, "pictures"),
            ({"examples": examples, "temperature": 3}, "temperature"),
            ({"type": "train"}, "train"),
        ):
            reply = ask(client, wrong)
            assert (reply["status"], reply["ok"]) == ("error", False)
            assert words in reply["error"]["message"]
        assert ask(client, asked)["ok"], "an error leaves the connection open"


def observation(shade=100, **more):
    return {"images": {"agentview": picture(shade)}, "task_description": "go", **more}


def test_vla_eval_gets_one_action_an_observation():
    policy = FakePolicy(chunk=3)
    with running(service(policy, chunk=3)) as server, server.connect("vla-eval") as client:
        hello = ask(client, frame("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 7))
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 7, 1)
        policy.batches.clear()
        client.send(frame("episode_start", {"task": {"name": "go"}}, 8))  # has no reply
        for seq in range(9, 14):
            reply = ask(client, frame("observation", observation(seq), seq))
            assert (reply["type"], reply["seq"]) == ("action", seq)
            shade = 9 if seq < 12 else 12
            np.testing.assert_array_equal(reply["payload"]["actions"], expected(shade, 3)[(seq - 9) % 3])
        assert len(policy.batches) == 2
        client.send(frame("episode_end", {}, 14))
        ask(client, frame("observation", observation(), 15))
        assert len(policy.batches) == 3, "a chunk ends with its episode"
        ask(client, frame("observation", observation(episode_restart=True), 16))
        assert len(policy.batches) == 4, "and with CALVIN's instruction"


def test_vla_eval_answers_errors_and_goes_on():
    with running() as server, server.connect("vla-eval") as client:
        for message, words in (
            (frame("observation", {"images": {}, "task_description": "go"}, 3), "agentview"),
            (
                frame("observation", observation() | {"images": {"agentview": picture(), "primary": picture()}}, 3),
                "one of",
            ),
            (frame("observation", {"task_description": "go"}, 3), "images"),
            (frame("teleport", {}, 3), "teleport"),
            (b"\xc1", "MessagePack"),
        ):
            reply = ask(client, message)
            assert reply["type"] == "error"
            assert reply["seq"] == (0 if message == b"\xc1" else 3)
            assert words in reply["payload"]["error"]
        assert ask(client, frame("observation", observation(), 4))["type"] == "action"


class Constant:
    """One action, in any convention."""

    def __init__(self, convention, action):
        self.convention, self.action = convention, np.array(action, np.float32)

    def predict(self, observations):
        return [ActionChunk(np.stack([self.action] * 2), self.convention) for _ in observations]


@pytest.mark.parametrize(
    ("module", "convention", "action", "sent"),
    [
        ("libero", LIBERO, [0.5, -1, 0, 0, 0, 1, 1], [0.5, -1, 0, 0, 0, 1, -1]),  # below 0 opens
        ("libero", LIBERO, [0.5, -1, 0, 0, 0, 1, 0], [0.5, -1, 0, 0, 0, 1, 1]),
        ("calvin", CALVIN, [1, -1, 0.5, 1, 0, 0, 1], [0.02, -0.02, 0.01, 0.05, 0, 0, 1]),  # metres, radians; > 0 opens
        ("calvin", CALVIN, [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1]),
        ("simpler", BRIDGE, [0.01, 0, 0, 0.3, 0, 0, 1], [0.01, 0, 0, 0.3, 0, 0, 1]),  # > 0.5 opens
        ("simpler", BRIDGE, [0, 0, 0, np.pi / 2, 0, np.pi / 2, 0], [0, 0, 0, *(np.array([1, 1, 1]) * 1.2092), -1]),
    ],
)
def test_a_named_benchmark_gets_what_it_takes(module, convention, action, sent):
    hello = {"harness_version": "0.8.0", "protocol_version": 1}
    with running(service(Constant(convention, action), chunk=2)) as server, server.connect("vla-eval") as client:
        ask(client, frame("hello", {**hello, "benchmark": f"vla_eval.benchmarks.{module}.benchmark:Any"}))
        reply = ask(client, frame("observation", observation()))
        np.testing.assert_allclose(reply["payload"]["actions"], sent, atol=1e-4)
    wrong = replace(convention, control_hz=1.0)
    with running(service(Constant(wrong, action), chunk=2)) as server, server.connect("vla-eval") as client:
        reply = ask(client, frame("hello", {**hello, "benchmark": f"vla_eval.benchmarks.{module}.benchmark:Any"}))
        assert reply["type"] == "error"
        assert "control_hz" in reply["payload"]["error"]
        reply = ask(client, frame("observation", observation()))
        assert "control_hz" in reply["payload"]["error"], "and nothing is sent in another form"


@pytest.mark.parametrize("name", FORMS)
def test_forms_can_be_read_back(name):
    form = FORMS[name]
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4, 7)).astype(np.float32)
    actions[..., 6] = actions[..., 6] > 0
    written = form.written(actions)
    assert set(np.unique(written[..., 6])) == {form.gripper_open, form.gripper_closed}
    np.testing.assert_allclose(form.read(written), actions, atol=1e-5)


def test_a_client_that_does_not_say_its_form_gets_no_action():
    """Nobody chose one for it: each dialect answers with the forms that there are, and goes on if it does so at all."""
    policy = Constant(LIBERO, [0] * 6 + [1])
    listed = "chosen for such clients: native, libero, libero_rlds\n"
    with running(service(policy, chunk=2, form=None)) as server:
        with server.connect("openpi") as client:
            assert unpack(client.recv())["vlm4vla"]["form"] == "native"
            assert listed in ask(client, openpi())
        with server.connect("openpi") as client:
            client.recv()
            assert ask(client, openpi(vlm4vla="native"))["actions"][0, 6] == 1
            assert ask(client, openpi(vlm4vla="libero"))["actions"][0, 6] == -1
            assert "nearest: libero" in ask(client, openpi(vlm4vla="librero"))
        with server.connect("starvla") as client:
            client.recv()
            request = {"examples": [{"image": [picture()], "lang": "go"}]}
            assert listed in ask(client, request)["error"]["message"]
            assert listed in ask(client, request | {"vlm4vla": ["libero"]})["error"]["message"]
            assert ask(client, request | {"vlm4vla": "libero"})["data"]["actions"][0, 0, 6] == -1
        with server.connect("vla-eval") as client:
            assert listed in ask(client, frame("observation", observation()))["payload"]["error"]
            hello = {"harness_version": "0.8.0", "protocol_version": 1}
            for unknown in ({}, {"benchmark": "vla_eval.benchmarks.robocasa.benchmark:Any"}):
                assert listed in ask(client, frame("hello", hello | unknown))["payload"]["error"]
                assert listed in ask(client, frame("observation", observation()))["payload"]["error"]
            known = ask(client, frame("hello", {**hello, "benchmark": "vla_eval.benchmarks.libero.benchmark:Any"}))
            assert known["payload"]["vlm4vla"]["form"] == "libero"
            assert ask(client, frame("observation", observation()))["payload"]["actions"][6] == -1


def test_a_form_goes_with_its_convention_only():
    chosen = service(Constant(LIBERO, [0] * 6 + [1]), chunk=2, form="libero")
    with running(chosen) as server, server.connect("openpi") as client:
        assert unpack(client.recv())["vlm4vla"]["form"] == "libero"
        assert ask(client, openpi())["actions"][0, 6] == -1
    for options, words in (
        ({"form": "libero"}, "position_unit"),
        ({"form": "librero"}, "nearest: libero"),
        ({"resize": "cubic"}, "bicubic"),
        ({"execute": 5}, "--execute 4"),
    ):
        with pytest.raises(UserError, match=words), running(service(**options)):
            pass


def test_proprioception_is_taken_where_the_policy_needs_it():
    class Echo(FakePolicy):
        def predict(self, observations):
            return [replace(c, actions=c.actions + o.state.sum()) for c, o in zip(super().predict(observations), observations, strict=True)]  # noqa: E501  # fmt: skip

    with running(service(Echo(), state_size=8)) as server:
        for state in (np.arange(8.0), [1.0] * 8, {"observation/joint_position": np.ones(7), "observation/gripper_position": np.ones(1)}):  # noqa: E501  # fmt: skip
            with server.connect("openpi") as client:
                client.recv()
                more = state if isinstance(state, dict) else {"observation/state": state}
                total = 8 if isinstance(state, dict) else np.sum(state)
                np.testing.assert_allclose(ask(client, openpi(**more))["actions"], expected() + total, rtol=1e-6)
        for state in (np.arange(7.0), np.full(8, np.nan), "eight", {"a": 1}, None):
            with server.connect("openpi") as client:
                client.recv()
                assert "8 finite" in ask(client, openpi(**{"observation/state": state}))
        with server.connect("vla-eval") as client:
            assert ask(client, frame("hello", {}))["payload"]["observation_params"] == {"send_state": True}


def test_pictures_are_resized_only_where_that_was_said():
    with running(service(resize="bicubic")) as server, server.connect("openpi") as client:
        client.recv()
        np.testing.assert_array_equal(
            ask(client, openpi() | {"observation/image": picture(40, 32)})["actions"], expected(40)
        )


# -------------------------------------------------------------------------------------------------- batching, liveness


def crowd(server, number, shades=lambda i: i):
    """``number`` connections ask at once; returns whether all got their own answer."""
    barrier = threading.Barrier(number)

    def one(i):
        with server.connect("openpi", open_timeout=30) as client:
            client.recv()
            barrier.wait(30)
            return np.array_equal(ask(client, openpi(shades(i)))["actions"], expected(shades(i)))

    with ThreadPoolExecutor(number) as pool:
        return all(pool.map(one, range(number)))


def test_waiting_requests_share_a_batch():
    policy = FakePolicy(delay_s=0.05)
    with running(service(policy), max_batch=8) as server:
        assert crowd(server, 12)
        assert max(policy.batches) > 2
        assert max(policy.batches) <= 8
        _, stats = get(server, "/stats")
        assert stats["requests"] == 12
        assert stats["infer_ms"]["p50"] >= 50
        assert stats["total_ms"]["p99"] >= stats["total_ms"]["p50"]


def test_a_batch_can_be_waited_for():
    policy = FakePolicy()
    with running(service(policy), max_wait_s=0.3) as server:
        assert crowd(server, 4)
    assert max(policy.batches) >= 3


def test_200_connections_hold():
    with running() as server:
        assert crowd(server, 200, lambda i: i % 250)


def test_health_and_configuration_are_answered_during_inference():
    policy = FakePolicy(delay_s=1.0)
    with running(service(policy)) as server, server.connect("openpi") as client, ThreadPoolExecutor(1) as pool:
        client.recv()
        waiting = pool.submit(ask, client, openpi())
        time.sleep(0.1)
        started = time.monotonic()
        assert get(server, "/health") == get(server, "/healthz") == (200, {"status": "ok"})
        assert get(server, "/config?max_batch_size=8&max_wait_time=0.01")[1]["config"] == {
            "max_batch_size": 8, "max_wait_time": 0.01,
        }  # fmt: skip
        for wrong in ("max_batch_size=0", "max_batch_size=x", "max_wait_time=nan", "max_wait_time=9", "colour=red"):
            assert get(server, f"/config?{wrong}")[0] == 422
        assert get(server, "/config", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert time.monotonic() - started < 0.5
        assert not waiting.done()
        assert waiting.result()["actions"].shape == (4, 7)


class Poisoned(FakePolicy):
    """Fails where a picture is white, predicts nothing finite where it is black, as one batch."""

    def predict(self, observations):
        shades = [int(o.images["main"][0, 0, 0]) for o in observations]
        if 255 in shades:
            raise RuntimeError("secret path of the server")
        chunks = super().predict(observations)
        return [replace(c, actions=c.actions * np.nan) if s == 0 else c for c, s in zip(chunks, shades, strict=True)]


def test_one_observation_cannot_spoil_the_batch_of_others(caplog):
    policy = Poisoned(delay_s=0.05)
    with running(service(policy)) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect("openpi")) for _ in range(6)]
        for client in clients:
            client.recv()
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(ask, clients, [openpi(shade) for shade in (50, 255, 60, 0, 70, 80)]))
    for reply, shade in zip(replies, (50, 255, 60, 0, 70, 80), strict=True):
        if shade == 255:
            assert "RuntimeError" in reply
            assert "secret" not in reply, "what failed is for the server's log"
        elif shade == 0:
            assert "finite" in reply
        else:
            np.testing.assert_array_equal(reply["actions"], expected(shade))
    assert "secret path" in caplog.text


def test_a_policy_that_answers_too_little_does_not_end_the_server(caplog):
    policy = FakePolicy()
    with running(service(policy)) as server, server.connect("starvla") as client:
        client.recv()
        policy.predict = lambda observations: []
        message = {"examples": [{"image": [picture()], "lang": "go"}] * 2}
        assert "RuntimeError" in ask(client, message)["error"]["message"]
        del policy.predict
        assert ask(client, message)["ok"]
    assert "with 0 chunks" in caplog.text


def test_a_client_that_leaves_in_mid_request_harms_nobody():
    policy = FakePolicy(delay_s=0.4)
    with running(service(policy), max_batch=1) as server, server.connect("openpi") as stays, ExitStack() as stack:
        stays.recv()
        for _ in range(10):
            client = stack.enter_context(server.connect("openpi"))
            client.recv()
            client.send(pack(openpi()))
            client.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake: as a process that was killed
        np.testing.assert_array_equal(ask(stays, openpi(60))["actions"], expected(60))
        assert get(server, "/stats")[1]["connections"] == 1
    assert sum(policy.batches) < 8, "what a client that has gone asked for is not inferred any more"


# ----------------------------------------------------------------------------------------------------- who may come in


def test_a_token_is_asked_for_where_one_is_set():
    with running(token="sésame") as server:
        for options in ({}, {"additional_headers": {"Authorization": "Api-Key wrong"}}):
            with pytest.raises(InvalidStatus) as refused:
                server.connect("openpi", **options)
            assert refused.value.response.status_code == 401
        assert get(server, "/stats")[0] == 401
        assert get(server, "/health")[0] == 200
        with connect(server.url("vla-eval") + "/?token=s%C3%A9same") as client:
            assert ask(client, frame("hello", {}))["type"] == "hello"
    with running(token="sesame") as server:
        for scheme in ("Api-Key", "Bearer"):
            with server.connect("openpi", additional_headers={"Authorization": f"{scheme} sesame"}) as client:
                assert "vlm4vla" in unpack(client.recv())


@pytest.mark.parametrize("token", ["", " \n"])
def test_a_blank_token_is_refused(token):
    with pytest.raises(UserError, match="blank token"):
        Settings(token=token)


def test_web_pages_are_refused():
    with running() as server, pytest.raises(InvalidStatus) as refused:
        server.connect("openpi", origin="https://example.org")
    assert refused.value.response.status_code == 403


def test_large_messages_end_their_connection_only():
    with running(max_message=10_000) as server, server.connect("openpi") as stays:
        stays.recv()
        with server.connect("openpi") as client:
            client.recv()
            client.send(b"x" * 20_000)
            with pytest.raises(ConnectionClosed):
                client.recv(5)
            assert client.close_code == 1009
        assert "actions" in ask(stays, openpi())


# ------------------------------------------------------------------------------------------------------ start and stop


def test_stopping_finishes_what_is_under_way():
    policy = FakePolicy(delay_s=0.5)
    with running(service(policy)) as server, ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        idle, busy = (stack.enter_context(server.connect("openpi")) for _ in range(2))
        idle.recv(), busy.recv()
        waiting = pool.submit(ask, busy, openpi())
        time.sleep(0.2)
        server.stop()
        with pytest.raises(ConnectionClosed):
            idle.recv(5)
        assert idle.close_code == 1001
        assert waiting.result()["actions"].shape == (4, 7)
        with pytest.raises(ConnectionClosed):
            busy.recv(5)
        assert busy.close_code == 1001
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_a_port_that_is_taken_is_told():
    with running() as server:
        taken = server.server.ports["openpi"]
        with pytest.raises(UserError, match=f"port {taken}"), running(ports=(("vla-eval", 0), ("openpi", taken))):
            pass


def test_what_cannot_be_listened_on_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"found: port {port} on 127.0.0.1"), running(ports=(("openpi", port),)):
            pass
    # Neither a name nor an address; one of the networks that are kept for documentation (RFC 5737).
    for host in ("no such host", "a..b", "192.0.2.1"):
        with pytest.raises(UserError, match=f"found: --host {host}"), running(host=host):
            pass


def test_listen():
    assert listening(()) == (("openpi", 8000), ("vla-eval", 8001), ("starvla", 10093))
    assert listening(("openpi", "starvla=0")) == (("openpi", 8000), ("starvla", 0))
    for wrong in ("openpie=1", "openpi=x", "openpi=", "openpi=70000", "8000"):
        with pytest.raises(UserError, match="DIALECT=PORT"):
            listening((wrong,))


SCRIPT = """
import sys
from vlm4vla.serving.server import Settings, serve_forever
from policy_server import ANYWHERE, FakePolicy, service
serve_forever(service(FakePolicy(delay_s=0.5)), Settings(ports=ANYWHERE[:1]), lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_well(number):
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{':'.join(sys.path)}", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    name, url = process.stdout.readline().split()
    assert (name, url[:15]) == ("openpi", "ws://127.0.0.1:"), "on loopback"
    with connect(url) as client:
        client.recv()
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert errors == ""
