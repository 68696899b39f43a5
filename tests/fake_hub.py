"""A stand-in for the Hugging Face hub: repositories of small files in memory, spoken to over the hub's protocol."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"


class FakeHub:
    """``repositories`` holds path -> bytes by name; ``asked`` the paths that were requested."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, values=None, status=200, body=b"", headers=()):
                body = json.dumps(values).encode() if values is not None else body
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(hub.post(self.path.partition("?")[0], body))

            def do_GET(self):
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if path.startswith("/api/models/"):
                    name = "/".join(path.split("/")[3:5])
                    missing = name not in hub.repositories
                    self.answer({"error": "not found"}, 404, headers={"X-Error-Code": "RepoNotFound"}) if missing else (
                        self.answer(hub.tree(name) if "/tree/" in path else hub.info(name))
                    )
                else:
                    name, _, file = path[1:].partition(f"/resolve/{COMMIT}/")
                    content = hub.repositories[name][file]
                    self.answer(body=content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

            do_HEAD = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def post(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            self.repositories.setdefault(name, {})
            return {"url": f"{self.endpoint}/{name}", "name": name}
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def info(self, name: str) -> dict:
        siblings = [{"rfilename": path} for path in self.repositories[name]]
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def tree(self, name: str) -> list[dict]:
        files = self.repositories[name].items()
        return [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
