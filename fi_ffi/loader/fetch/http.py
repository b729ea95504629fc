"""HTTP for the loader: requests with redirects, limited in time and tries.

Proxies, certificates and netrc are the user's (`requests` reads them from the environment). Only
https is used, and plain http to this machine itself.
"""

from __future__ import annotations

import errno
import http.client
import io
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fi_ffi.errors import FetchError, let_through
from fi_ffi.loader.fetch.asking import check_permission
from fi_ffi.loader.fetch.urls import check_url, is_loopback, origin, redact, redirected

if TYPE_CHECKING:  # the import takes longer than a warm start may
    import requests

_CHUNK = 1 << 20
_ENOUGH = 1 << 20  # bytes of progress after which earlier failures no longer count
_MOST_INTERIM = 10  # statuses below 200 before an answer
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_TRY_AGAIN = frozenset((408, 425, 429))
_NO_PROXY = {"http": None, "https": None, "all": None}
_ADVICE = {
    401: "it asks for credentials: ~/.netrc may hold them",
    403: "it refuses: credentials in ~/.netrc may help, and a signed address may have expired",
    404: "there is no such file: check the address in wheels.lock, and the mirror if there is one",
    407: "the proxy asks for credentials: put them into HTTPS_PROXY",
    410: "the file was taken away: check the address in wheels.lock",
}


@dataclass(frozen=True)
class Policy:
    """Timeouts and retries."""

    tries: int = 5
    first_wait: float = 0.5  # s before the second try, doubled for each later one
    longest_wait: float = 60.0  # s; a server that asks for more is given up
    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # s without a byte; also for a status with all its headers
    min_bytes_per_s: float = 1024.0  # bytes/s, averaged over `read_timeout` of waiting
    transfer_timeout: float = 12 * 3600.0  # s, for all tries; data received by then is kept
    patience: float = 60.0  # s without progress, in all tries; a try that has begun may end
    redirects: int = 10


class Transient(Exception):
    """A failure after which the same request may succeed."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        self.reason, self.wait = reason, wait
        super().__init__(reason)


class Unreachable(FetchError):
    """A server did not answer in time, in all tries."""


class Attempts:
    """Counts the failures of one transfer, waits between tries, and gives up."""

    def __init__(self, policy: Policy, url: str, start: int = 0) -> None:
        self._policy, self._where = policy, redact(url)
        self._failures, self._reached = 0, start
        self._moved, self._moved_at = start, time.monotonic()
        self.total = 0  # failures, including those that no longer count
        self._deadline = time.monotonic() + policy.transfer_timeout

    def reached(self, position: int) -> None:
        """Record progress, so that a connection that breaks now and then still succeeds.

        Fetching the same bytes again is no progress.
        """
        now, policy = time.monotonic(), self._policy
        if position >= self._reached + _ENOUGH:
            self._failures, self._reached = 0, position
        if position >= self._moved + policy.min_bytes_per_s * policy.read_timeout:
            self._moved, self._moved_at = position, now
        if now > self._deadline:
            raise FetchError(
                f"{self._where}: not all of it came in {self._policy.transfer_timeout:.0f} s: the "
                "connection is too slow. Try again: what is already here is kept"
            )

    def failed(self, error: Transient) -> None:
        """Wait before the next try, or raise `FetchError` if there is none."""
        policy = self._policy
        self._failures += 1
        self.total += 1
        tries = f"{self._failures} {'try' if self._failures == 1 else 'tries'}"
        waited = time.monotonic() - self._moved_at
        if self._failures >= policy.tries or waited >= policy.patience:
            raise Unreachable(
                f"{self._where}: {error.reason}; gave up after {tries}. Check the network and the "
                "proxy settings, or try later: what is already here is kept"
            )
        wait = min(policy.first_wait * 2 ** (self._failures - 1), policy.longest_wait)
        wait *= random.uniform(0.5, 1)  # so that many processes do not retry at the same time
        if error.wait is not None:
            wait = error.wait
        if wait > policy.longest_wait:
            raise Unreachable(
                f"{self._where}: {error.reason}; after {tries} the server asks to wait "
                f"{wait:.0f} s, which is longer than {policy.longest_wait:.0f} s. Try again later"
            )
        time.sleep(wait)


class _DeadlineSocket(io.RawIOBase):
    """Reads a socket; the answer's head has a deadline, the body a minimum rate.

    With a timeout for each read alone, a server could send a byte or `100 Continue` now and then,
    and never finish.
    """

    def __init__(self, sock: socket.socket, policy: Policy) -> None:
        self._sock, self._policy = sock, policy
        self._raw: Any = sock.makefile("rb", buffering=0)
        self._deadline: float | None = time.monotonic() + policy.read_timeout
        self._waited, self._got = 0.0, 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def head_ended(self) -> None:
        self._deadline, self._waited = None, 0.0
        self._sock.settimeout(self._policy.read_timeout)

    def readinto(self, buffer: Any) -> int:
        before = time.monotonic()
        if self._deadline is not None:
            if before >= self._deadline:
                raise self._late()
            self._sock.settimeout(self._deadline - before)
        try:
            count: int = self._raw.readinto(buffer) or 0
        except TimeoutError:
            raise self._late() from None
        # Only the waiting counts, not the time that the caller takes for the bytes.
        self._waited, self._got = self._waited + time.monotonic() - before, self._got + count
        if self._deadline is None and self._waited >= self._policy.read_timeout:
            if self._got < self._policy.min_bytes_per_s * self._waited:
                text = f"only {self._got} bytes came in {self._waited:.1f} s"
                raise TimeoutError(errno.ETIMEDOUT, text)
            self._waited, self._got = 0.0, 0
        return count

    def _late(self) -> TimeoutError:
        if self._deadline is None or not self._got:
            return TimeoutError(errno.ETIMEDOUT, "the server sends nothing")
        limit = self._policy.read_timeout
        return TimeoutError(errno.ETIMEDOUT, f"no status with its headers came in {limit:.1f} s")


class _Interim(http.client.HTTPException):
    """A server sends statuses below 200, and no answer."""


class _DeadlineResponse(http.client.HTTPResponse):
    policy: Policy

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self._reader = _DeadlineSocket(sock, self.policy)
        self.fp = io.BufferedReader(self._reader)
        self._interim = 0

    def _read_status(self) -> tuple[str, int, str]:
        """Read a status line; `begin` passes over those that announce another, of the value 100."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        if not 100 <= status < 200 or status == http.client.SWITCHING_PROTOCOLS:
            return version, status, reason
        self._interim += 1
        if self._interim > _MOST_INTERIM:
            raise _Interim
        return version, http.client.CONTINUE, reason

    def begin(self) -> None:
        super().begin()
        self._reader.head_ended()


def _adapter(policy: Policy) -> Any:
    """Return an adapter of requests whose connections enforce the policy."""
    from requests.adapters import HTTPAdapter

    response = type("_Response", (_DeadlineResponse,), {"policy": policy})

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
            pool = super().get_connection_with_tls_context(*args, **options)
            kind: Any = pool.ConnectionCls
            if kind.response_class is not response:  # a new pool
                kind = type(kind.__name__, (kind,), {"response_class": response})
                pool.ConnectionCls = kind
            return pool

    return Adapter()


class Client:
    """Sends requests; counts them, and the bytes of the bodies received."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.moved = 0
        self.requests = 0
        self._local = threading.local()

    @contextmanager
    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        """Send a request once; yield an answer (of requests) with status 200, 206 or 416.

        Raises `Transient` if a retry may help, else `FetchError`.
        """
        check_permission(redact(url))
        answer, final = self._follow(url, {"Accept-Encoding": "identity", **(headers or {})})
        try:
            _check_status(answer, final)
            yield answer
        finally:
            answer.close()

    def chunks(self, answer: Any) -> Iterator[bytes]:
        """Yield the body undecoded; `Transient` if it breaks off, stalls or is too slow."""
        from urllib3.exceptions import HTTPError

        while True:
            try:
                chunk = answer.raw.read1(_CHUNK, decode_content=False)
            except (HTTPError, http.client.HTTPException, OSError) as error:
                raise Transient(_reason(error)) from None
            if not chunk:
                return
            self.moved += len(chunk)
            yield chunk

    def _follow(self, url: str, headers: Mapping[str, str]) -> tuple[requests.Response, str]:
        first, begun = url, time.monotonic()
        for _ in range(self.policy.redirects + 1):
            check_url(url)
            if time.monotonic() - begun > self.policy.read_timeout:
                raise Transient(f"its redirects took {self.policy.read_timeout:.1f} s")
            answer = self._send(url, headers, own=origin(url) == origin(first))
            if answer.status_code not in _REDIRECTS:
                return answer, url
            location = answer.headers.get("Location")
            if answer.headers.get("Content-Length") == "0":
                answer.content  # noqa: B018  read to its end, the connection can be used again
            answer.close()
            if not location:
                raise FetchError(f"{redact(url)}: a redirect to nowhere")
            url = redirected(url, location)
        raise FetchError(
            f"{redact(first)}: more than {self.policy.redirects} redirects, the last one to "
            f"{redact(url)}"
        )

    def _send(self, url: str, headers: Mapping[str, str], *, own: bool) -> requests.Response:
        import requests

        policy = self.policy
        self.requests += 1
        try:
            return self._session().get(
                url,
                headers={"User-Agent": "fi-ffi", **headers},
                # Otherwise requests takes credentials from netrc, whose `default` entry would go to
                # any host that a redirect names.
                auth=None if own else _no_credentials,
                proxies=_NO_PROXY if is_loopback(urlsplit(url).hostname or "") else None,  # type: ignore[arg-type]
                timeout=(policy.connect_timeout, policy.read_timeout),
                stream=True,
                allow_redirects=False,
            )
        except requests.exceptions.SSLError as error:
            raise _tls_failure(url, error) from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError):
            raise FetchError(f"{redact(url)}: no address of a file on a server") from None
        except (requests.exceptions.RequestException, http.client.HTTPException, OSError) as error:
            raise Transient(_reason(error)) from None

    def _session(self) -> requests.Session:
        # One for each thread and process: a connection serves one request at a time.
        local, pid = self._local, os.getpid()
        if getattr(local, "pid", None) != pid:
            import requests

            session, adapter = requests.Session(), _adapter(self.policy)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            if bundle := os.environ.get("SSL_CERT_FILE"):
                session.verify = bundle  # requests' own two variables take precedence
            local.session, local.pid = session, pid
        found: requests.Session = local.session
        return found


def _no_credentials(request: Any) -> Any:
    return request


def _check_status(answer: requests.Response, url: str) -> None:
    status = answer.status_code
    if status in (200, 206, 416):
        coding = answer.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise FetchError(f"{redact(url)}: the server sent it encoded ({coding!r:.40})")
        return
    said = f"{status} {answer.reason}".strip()
    if status >= 500 or status in _TRY_AGAIN:
        raise Transient(f"the server answers {said!r:.80}", _retry_after(answer.headers))
    advice = _ADVICE.get(status, "this status is unexpected for a file")
    raise FetchError(f"{redact(url)}: the server answers {said!r:.80}; {advice}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, which may be a date."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().parse_retry_after(headers.get("Retry-After", "")[:40])
    except (InvalidHeader, ValueError, OverflowError):
        return None


def _tls_failure(url: str, error: Exception) -> Exception:
    reason = _reason(error)
    if "CERTIFICATE" not in reason.upper():
        return Transient(reason)
    return FetchError(
        f"{redact(url)}: {reason}. Where a proxy or mirror has a certificate of its own, "
        "REQUESTS_CA_BUNDLE or SSL_CERT_FILE names the file that vouches for it"
    )


def _reason(error: BaseException) -> str:
    """Return the innermost error's text; the outer ones repeat the address with its query."""
    let_through(error, is_replaced=True)
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        inner = [getattr(found, "reason", None), *found.args, found.__cause__, found.__context__]
        found = next((e for e in inner if isinstance(e, BaseException)), None)
    for each in reversed(chain):
        if isinstance(each, OSError) and each.strerror:
            return str(each.strerror)
    name = type(chain[-1]).__name__
    return _WORDS.get(name, name)


_WORDS = {
    "IncompleteRead": "the connection was closed before the end",
    "_Interim": f"more than {_MOST_INTERIM} statuses below 200 came, and no answer",
    "RemoteDisconnected": "the connection was closed without an answer",
    "ReadTimeoutError": "the server sends nothing",
    "ReadTimeout": "the server sends nothing",
    "ConnectTimeoutError": "no connection in time",
    "TimeoutError": "the server sends nothing",
}
