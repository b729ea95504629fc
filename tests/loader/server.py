"""A web server on loopback whose answers can be spoiled one at a time, and small wheels."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fi_ffi.errors import LoaderError
from fi_ffi.loader.fetch.http import Policy

# Patient enough for a busy machine, and quick.
QUICK = Policy(tries=3, first_wait=0.01, longest_wait=1.0, connect_timeout=2, read_timeout=1.0)

INFO = "kernels-1.2.3+cu130.dist-info"
NORM = "flashinfer_jit_cache/jit_cache/norm/norm.so"


@dataclass
class File:
    """What lies at a path; `etag` and `modified` are sent where they are given."""

    content: bytes
    etag: str | None = None
    modified: str | None = None
    ranges: bool = True


@dataclass(frozen=True)
class Answer:
    """An answer, and how it is sent: `cut` bytes of it at most, in pieces with pauses."""

    status: int
    headers: dict[str, str]
    body: bytes
    delay: float = 0.0
    cut: int | None = None
    reset: bool = False
    piece: int = 1 << 16
    pause: float = 0.0


@dataclass
class Seen:
    """A request, and how much of a body was sent to it."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int


Fault = Callable[[Answer], Answer]


@dataclass
class Server:
    """Serves `files`; each request takes the next of `faults`, then `always`."""

    files: dict[str, File] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    seen: list[Seen] = field(default_factory=list)
    bandwidth: float | None = None  # bytes/s
    certificate: Path | None = None

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _HttpServer(("127.0.0.1", 0), handler)
        self._stop = threading.Event()
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def url(self, path, host="127.0.0.1"):
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://{host}:{self._http.server_address[1]}{path}"

    @property
    def sent(self):
        return sum(seen.sent for seen in self.seen)

    def wait(self, seconds):
        """Sleep, unless the server is to end."""
        self._stop.wait(seconds)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        # Clients that give up, and connections cut on purpose, are what these tests are about.
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server
    timeout = 20
    disable_nagle_algorithm = True  # a header and a short body are two writes

    def do_GET(self):
        answer = self._normal()
        owner = self.owner
        fault = owner.faults.pop(0) if owner.faults else owner.always
        answer = fault(answer) if fault else answer
        self.seen = Seen(self.command, self.path, dict(self.headers), 0)
        owner.seen.append(self.seen)
        with contextlib.suppress(OSError):
            self._send(answer)

    do_HEAD = do_GET

    def do_CONNECT(self):
        self.owner.seen.append(Seen("CONNECT", self.path, dict(self.headers), 0))
        self.close_connection = True
        self.send_error(502, "no way through")

    def _normal(self):
        file = self.owner.files.get(self.path.partition("?")[0])
        if file is None:
            return Answer(404, {}, b"no such file")
        headers = {"Accept-Ranges": "bytes"} if file.ranges else {}
        headers |= {"ETag": file.etag} if file.etag else {}
        headers |= {"Last-Modified": file.modified} if file.modified else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not file.ranges or not asked:
            return Answer(200, headers, file.content)
        first, total = int(asked[1]), len(file.content)
        last = min(int(asked[2] or total), total - 1)
        if first > last:
            return Answer(416, headers | {"Content-Range": f"bytes */{total}"}, b"")
        headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        return Answer(206, headers, file.content[first : last + 1])

    def _send(self, answer):
        self.owner.wait(answer.delay)
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body))} | answer.headers
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body if answer.cut is None else answer.body[: answer.cut]
        lies = headers["Content-Length"] != str(len(body))
        self.close_connection = answer.cut is not None or lies
        self._write(body, answer)
        if answer.reset:
            hard = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
            self.connection.close()

    def _write(self, body, answer):
        begun = time.monotonic()
        for at in range(0, len(body), answer.piece):
            if self.owner._stop.is_set():
                break
            piece = body[at : at + answer.piece]
            self.seen.sent += len(piece)
            self.wfile.write(piece)
            pause = answer.pause
            if self.owner.bandwidth:
                pause = begun + self.seen.sent / self.owner.bandwidth - time.monotonic()
            if pause > 0:
                self.owner.wait(pause)

    def log_message(self, *words):
        pass


def changed(**fields):
    """An answer with other fields."""
    return lambda answer: dataclasses.replace(answer, **fields)  # type: ignore[arg-type]


def header(name, value):
    return lambda answer: dataclasses.replace(answer, headers=answer.headers | {name: value})


def status(code, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: Answer(code, named, b"" if 300 <= code < 400 else b"an explanation")


def redirect(location, code=302):
    return status(code, Location=location)


def good(answer):
    return answer


def stall(answer):
    """Half of the body, and then nothing for a long time."""
    half = max(1, len(answer.body) // 2)
    return dataclasses.replace(answer, piece=half, pause=10.0)


def trickle(answer):
    return dataclasses.replace(answer, piece=1, pause=0.02)


def truncate(answer):
    return dataclasses.replace(answer, cut=len(answer.body) // 2)


def reset(answer):
    return dataclasses.replace(answer, cut=len(answer.body) // 2, reset=True)


def other_bytes(answer):
    return dataclasses.replace(answer, body=bytes(255 - byte for byte in answer.body))


def shifted(answer):
    """Another range than the one asked for."""
    first, rest = answer.headers["Content-Range"].removeprefix("bytes ").split("-", 1)
    return header("Content-Range", f"bytes {int(first) + 1}-{rest}")(answer)


def longer(answer):
    """A Content-Length, and a body, larger than the range."""
    return dataclasses.replace(answer, body=answer.body + b"more")


def digest(content):
    raw = hashlib.sha256(content).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def record(members, info=INFO):
    lines = [f"{name},{digest(content)},{len(content)}\n" for name, content in members.items()]
    return "".join([*lines, f"{info}/RECORD,,\n"]).encode()


def make_wheel(
    members,
    *,
    info=INFO,
    record_text=None,
    comment=b"",
    zip64=False,
    compression=zipfile.ZIP_DEFLATED,
):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.comment = comment
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(content)
        text = record(members, info) if record_text is None else record_text
        archive.writestr(f"{info}/RECORD", text)
    return out.getvalue()


def kernel_members(count=20, size=50_000):
    """Modules that do not compress much, as machine code does not, `norm` among them."""
    rng = random.Random(7)
    names = ["norm", *(f"module_{number}" for number in range(count - 1))]
    paths = [f"flashinfer_jit_cache/jit_cache/{name}/{name}.so" for name in names]
    return {path: rng.randbytes(size) + bytes(size // 4) for path in paths}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def tree(root):
    """The files of a cache that hold anything: stamps and locks do not."""
    files = (path for path in root.rglob("*") if path.is_file())
    return sorted(
        str(path.relative_to(root)) for path in files if path.suffix not in (".stamp", ".lock")
    )


def extract_all(wheel):
    """Members as RECORD has them, or errors of ours."""
    for member in wheel.members:
        with contextlib.suppress(LoaderError):
            found = wheel.extract(member)
            assert sha256(found.read_bytes()) == wheel.record[member].sha256
