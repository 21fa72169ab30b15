"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub's `create_repo` and `upload_folder` call.

    with Hub() as hub:
        subprocess.run(..., env=os.environ | hub.environment("hf_writes"))
        hub.files["model", "me/adapter"]["README.md"]

It speaks the Hub's protocol for repositories, commits and Git LFS (`HF_HUB_DISABLE_XET` chooses LFS; xet's storage is
no part of it), believes an LFS object only if it has the hash it was announced with, and a commit only if all objects
that it names have arrived. Tokens: `hf_writes` may write to `me/...`; `hf_reads` may not; any other is unknown.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Hub:
    """repos: (kind, name) -> private. files: (kind, name) -> path -> bytes. requests: every (method, path)."""

    def __enter__(self) -> "Hub":
        self.repos: dict[tuple[str, str], bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, token: str) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, path, body = self._heard()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if token not in ("hf_writes", "hf_reads"):
            return self._answer(401, {"error": "Invalid username or password."})
        if token == "hf_reads":
            return self._answer(403, {"error": "You don't have the rights to write there."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner, _, name = asked["name"].rpartition("/")
            owner = owner or asked.get("organization") or "me"
            if owner != "me":
                return self._answer(404, {"error": f"no such organization: {owner}"})
            repo = asked.get("type", "model"), f"{owner}/{name}"
            if repo in hub.repos:
                return self._answer(409, {"error": "You already created this repo", "url": f"{hub.url}/{repo[1]}"})
            hub.repos[repo] = asked.get("visibility") == "private"
            hub.files[repo] = {}
            prefix = "datasets/" if repo[0] == "dataset" else ""
            return self._answer(200, {"url": f"{hub.url}/{prefix}{repo[1]}", "id": "0"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        _, _, kinds, owner, name, what, *_ = path.split("/")
        repo = kinds.removesuffix("s"), f"{owner}/{name}"
        if repo not in hub.repos:
            return self._answer(404, {"error": "Repository not found"})
        if what == "preupload":
            lfs = (".safetensors", ".parquet")
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(lfs) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        assert what == "commit", path
        arrived: dict[str, bytes] = {}
        for line in body.decode().splitlines():
            part = json.loads(line)
            value: Any = part["value"]
            if part["key"] == "file":
                arrived[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    return self._answer(400, {"error": f"{value['path']}: its object was never uploaded"})
                arrived[value["path"]] = hub.objects[value["oid"]]
        hub.files[repo] |= arrived
        return self._answer(200, {"commitUrl": f"{hub.url}/{repo[1]}/commit/0", "commitOid": "0" * 40, "success": True})

    def do_PUT(self) -> None:
        hub, path, body = self._heard()
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "not the object that was announced"})
        hub.objects[oid] = body
        return self._answer(200, {})

    def do_GET(self) -> None:
        hub, path, _ = self._heard()
        for (kind, name), private in hub.repos.items():
            if path == f"/api/{kind}s/{name}":
                return self._answer(200, {"id": name, "private": private})
        self._answer(404, {"error": "Entry not found"})

    def _heard(self) -> tuple[Hub, str, bytes]:
        path = urlsplit(self.path).path
        self.server_hub.requests.append((self.command, path))
        return self.server_hub, path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what matters."""
