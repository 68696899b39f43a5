"""Data sets on a hub: a stand-in on the loopback speaks its protocol to the real ``huggingface_hub``."""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

from test_films import film, raw
from vlm4vla.convention import LIBERO, Convention
from vlm4vla.data import hub
from vlm4vla.data.hub import describe, local, place
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = "import sys; from vlm4vla.cli import main; sys.argv = ['vlm4vla', *sys.argv[1:]]; main()"


@contextmanager
def stand_in(folder, broken=None):
    """Serve ``folder`` as the data set lab/demos; the file ``broken`` ends half way. Yields its address and a list
    of the paths of files that were asked for."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = urlparse(self.path).path
            if path.removeprefix("/api/datasets/lab/demos") in ("", "/revision/main", f"/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                return self.json({"id": "lab/demos", "sha": COMMIT, "siblings": siblings})
            if path.startswith(f"/api/datasets/lab/demos/tree/{COMMIT}"):
                return self.json(
                    [{"type": "file", "path": n, "size": p.stat().st_size, "oid": tag(n)} for n, p in files.items()]
                )
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if name in files:
                return self.file(name)
            return self.nothing()

        def file(self, name):
            content = files[name].read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{tag(name)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "GET":
                asked.append((name, start))
                if name == broken:
                    content = content[: len(content) // 2]
                self.wfile.write(content[start:])

        def json(self, values):
            body = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def nothing(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def tag(name):
    return name.encode().hex()[-40:].rjust(40, "0")


def vlm4vla(cache, address, *command):
    env = {**os.environ, "HF_ENDPOINT": address, "VLM4VLA_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    return subprocess.run(
        [sys.executable, "-c", OPEN, *command], env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_only_what_is_needed_is_downloaded_and_an_interruption_is_mended(tmp_path, monkeypatch):
    folder = film(tmp_path / "demos", raw((3, 4), ("main", "wrist")))
    own = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({k: v for k, v in own.items() if k != "vlm4vla"}))
    (folder / "README.md").write_text("not needed")
    cache, numbers = tmp_path / "cache", "data/chunk-000/file-000.parquet"

    with stand_in(folder) as (address, asked):
        said = ["--convention", "libero", "--camera", "main=observation.images.wrist"]
        done = vlm4vla(cache, address, "data", "describe", "hub:lab/demos", *said)
        assert done.returncode == 0, done.stderr
        assert {name.partition("/")[0] for name, _ in asked} == {"meta"}

    with stand_in(folder, broken=numbers) as (address, _):
        done = vlm4vla(cache, address, "data", "inspect", "hub:lab/demos")
        assert done.returncode == 2, done.stderr
        assert "not downloaded whole" in done.stderr
        assert "run the same command again" in done.stderr

    with stand_in(folder) as (address, asked):
        done = vlm4vla(cache, address, "data", "inspect", "hub:lab/demos")
        assert done.returncode == 0, done.stderr
        assert "episodes    2" in done.stdout
        names = {name for name, _ in asked}
        assert numbers in names
        assert not [name for name in names if "images.main" in name or "README" in name or "meta" in name]

    # No hub any more.
    monkeypatch.setenv("VLM4VLA_CACHE", str(cache))
    dataset = Dataset.open("hub:lab/demos")
    assert dataset.convention == LIBERO
    assert dataset.camera_size("main") == (16, 16)
    assert dataset.images(np.arange(7)).shape == (7, 16, 16, 3)
    assert (dataset.actions == Dataset.open(folder).actions).all()


def test_what_is_not_on_the_hub_is_told(tmp_path):
    with stand_in(tmp_path) as (address, _):
        done = vlm4vla(tmp_path, address, "data", "inspect", "hub:lab/other")
    assert done.returncode == 2, done.stderr
    assert "hub:lab/other: no" in done.stderr
    for wrong in ("hub:demos", "hub:a/../b", "hub:a/.."):
        with pytest.raises(UserError, match="owner/name"):
            local(wrong)


def test_a_revision_is_another_copy_and_a_folder_stays_a_folder(tmp_path):
    assert place("lab/demos", "") != place("lab/demos", "v1")
    assert local(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "change", [{"names": None}, {"names": [1]}, {"names": "xyz"}, {"control_hz": 0}, {"control_hz": "5"}, {"frame": 3}]
)
def test_a_convention_of_other_types_is_refused(change):
    assert Convention.from_dict(LIBERO.to_dict()) == LIBERO
    with pytest.raises(UserError, match=next(iter(change))):
        Convention.from_dict(LIBERO.to_dict() | change)
    with pytest.raises(UserError, match="exactly the keys"):
        Convention.from_dict([1])


def test_a_folder_can_be_described(tmp_path):
    folder = film(tmp_path / "demos", raw((3,), ("main", "wrist")))
    before = Dataset.open(folder)
    describe(folder, LIBERO.to_dict(), {"main": "observation.images.wrist"})
    after = Dataset.open(folder)
    assert (before.camera_size("main"), after.camera_size("main")) == ((32, 48), (16, 16))
    assert after.convention == LIBERO
    assert after.content_hash != before.content_hash
    assert (after.images(np.array([1])) == before.images(np.array([1]), "wrist")).all()
    with pytest.raises(UserError, match=r"images\.front"):
        describe(folder, None, {"main": "observation.images.front"})
    (folder / "meta/vlm4vla.json").write_text("[1]")
    with pytest.raises(UserError, match=r"vlm4vla\.json: \[1\]"):
        describe(folder, None, {"main": "observation.images.main"})
    (folder / "meta/vlm4vla.json").write_text("{")
    with pytest.raises(UserError, match=r"vlm4vla\.json: no JSON"):
        Dataset.open(folder)
    shutil.rmtree(folder)
    assert hub.description(Path(folder)) == {}
