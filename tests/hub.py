"""The part of the hub's HTTP API that uploads need, in memory, for the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sft_ray.yaml_text import parse_yaml


@dataclass
class FakeHub:
    """What was sent to it.

    Attributes:
        created: bodies of repository creations.
        files: path -> content of the repository's files, after a commit.
        commits: headers of the commits.
        requests: every method and path.
    """

    token: str
    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # by sha256
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        path = path.split("?")[0]
        self.requests.append(f"{method} {path}")
        if method == "PUT" and path.startswith("/storage/"):
            self.stored[path.removeprefix("/storage/")] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return _judged(json.loads(body)["content"])
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = self.created[-1]["name"]
            full = f"{self.created[-1].get('organization') or 'me'}/{name}"
            return (409 if len(self.created) > 1 else 200), {
                "url": f"{self.url}/{full}",
                "name": full,
            }
        if "/preupload/" in path:
            wanted = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for f in wanted
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{self.url}/storage/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return self._commit(body)
        return 404, {"error": f"no {path}"}

    def _commit(self, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value)
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
        oid = f"{len(self.commits):040x}"
        return 200, {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/me/mine/commit/{oid}",
        }


def _judged(card: str) -> tuple[int, Any]:
    """The hub's word on a model card: a base model must be one of its ids."""
    head = parse_yaml(card.split("---\n")[1], "README.md")
    base = head.get("base_model", "owner/name")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        return 200, {"errors": [], "warnings": []}
    line = f'"base_model" with value "{base}" is not valid. Use a model id from the hub.'
    return 400, {"errors": [{"message": line}], "warnings": []}


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A hub that listens on the loopback interface and knows one token."""
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if known or self.path.startswith("/storage/"):
                status, answer = hub.answer(self.command, self.path, body)
            else:
                status, answer = 401, {"error": "Invalid user token."}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
