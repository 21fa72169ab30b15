"""A real S3 protocol server (moto's), and a proxy before it that loses, cuts and forges what passes through.

    with Server() as server, Proxy(server.url) as proxy:
        proxy.faults.append(Fault("PUT", r"shards/00001\\.json", "lose the answer"))

Kinds of fault: "lose the request" (it never arrives), "lose the answer" (it was carried out, nobody learns it), "busy"
(503), "conflict" (409, as S3 says while another conditional write is under way), "cut the answer" (half the body),
"alter the answer" (one bit of the body), "no condition" (If-None-Match is dropped, as an old server would).
"""

import http.client
import logging
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class Server:
    """moto's server on a free port of this machine."""

    def __enter__(self) -> "Server":
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path matches."""

    method: str
    path: str
    kind: str
    times: int = 1
    met: int = field(default=0, init=False)  # how many requests met it


class Proxy:
    """Passes everything on to `target`, but for its faults; `seen` has every (method, path with query)."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Proxy":
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _unchunked(request)
        kind = self._fault(request.command, request.path)
        if kind == "lose the request":
            return _hang_up(request)
        if kind in ("busy", "conflict"):
            code = "SlowDown" if kind == "busy" else "ConditionalRequestConflict"
            xml = f"<Error><Code>{code}</Code><Message>{kind}</Message></Error>".encode()
            return _answer(request, 503 if kind == "busy" else 409, {}, xml)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        if kind == "no condition":
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=60)
        connection.request(request.command, request.path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if kind == "lose the answer":
            return _hang_up(request)
        if kind == "alter the answer":
            data = bytes([data[0] ^ 1]) + data[1:]
        cut = len(data) // 2 if kind == "cut the answer" else None
        return _answer(request, answer.status, dict(answer.getheaders()), data, cut)

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            self.seen.append((method, path))
            for fault in self.faults:
                if fault.times > fault.met and fault.method == method and re.search(fault.path, path):
                    fault.met += 1
                    return fault.kind
        return ""


def _unchunked(request: BaseHTTPRequestHandler) -> bytes:
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():  # trailers, such as a checksum
        pass
    return b"".join(parts)


def _answer(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, cut: int | None = None
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
            request.send_header(name, value)
    length = headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(data))
    request.send_header("Content-Length", length)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data if cut is None else data[:cut])
    if cut is not None:
        _hang_up(request)


def _hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
