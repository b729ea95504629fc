"""HTTP as the loader uses it: one request with its redirects, bounded in time and tries.

Proxies, certificates and netrc are the user's own (`requests` reads them from the
environment).  Only https is spoken, and plain http with this machine itself.
"""

from __future__ import annotations

import functools
import http.client
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fi_ffi.errors import FetchError
from fi_ffi.loader.retries import Attempts, Policy, Transient, retry_after
from fi_ffi.loader.urls import check_url, is_loopback, origin, redact, redirected, refuse_offline

if TYPE_CHECKING:  # importing it takes longer than a warm start may
    import requests

_CHUNK = 1 << 20
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


@dataclass
class Response:
    """An answer: its status, its headers, and its body as it comes."""

    status: int
    headers: Mapping[str, str]
    url: str
    _client: Client
    _raw: Any

    def chunks(self) -> Iterator[bytes]:
        """The body, undecoded; `Transient` where it breaks off, stalls or trickles."""
        from urllib3.exceptions import HTTPError

        policy, waited, got = self._client.policy, 0.0, 0
        while True:
            before = time.monotonic()
            try:
                chunk = self._raw.read1(_CHUNK, decode_content=False)
            except (HTTPError, http.client.HTTPException, OSError) as error:
                raise Transient(_reason(error)) from None
            if not chunk:
                return
            self._client.moved += len(chunk)
            # Only the waiting counts: what is done with the bytes takes its own time.
            waited, got = waited + time.monotonic() - before, got + len(chunk)
            if waited >= policy.read_timeout:
                if got < policy.slowest * waited:
                    raise Transient(f"only {got} bytes came in {waited:.1f} s")
                waited, got = 0.0, 0
            yield chunk

    def integer(self, name: str) -> int | None:
        """A header that is a number; `FetchError` if it is anything else."""
        text = self.headers.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise FetchError(f"{redact(self.url)}: the server sent {name}: {text!r:.60}")
        return int(text)


class Client:
    """Sends requests; counts them, and the bytes of the bodies that came."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.moved = 0
        self.requests = 0
        self._local = threading.local()

    @contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] | None = None, method: str = "GET"
    ) -> Iterator[Response]:
        """One try of a request: an answer of status 200, 206 or 416.

        Raises `Transient` where trying again may help, else `FetchError`.
        """
        refuse_offline(redact(url))
        answer, final = self._follow(
            method, url, {"Accept-Encoding": "identity", **(headers or {})}
        )
        try:
            _check_status(answer, final)
            yield Response(answer.status_code, answer.headers, final, self, answer.raw)
        finally:
            answer.close()

    def _follow(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> tuple[requests.Response, str]:
        first = url
        for _ in range(self.policy.redirects + 1):
            check_url(url)
            answer = self._send(method, url, headers, own=origin(url) == origin(first))
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

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], *, own: bool
    ) -> requests.Response:
        import requests

        policy = self.policy
        self.requests += 1
        try:
            return self._session().request(
                method,
                url,
                headers={"User-Agent": "fi-ffi", **headers},
                # Without one, requests takes credentials from netrc, where a `default`
                # entry would go to any host that a redirect names.
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

            local.session, local.pid = requests.Session(), pid
            if bundle := os.environ.get("SSL_CERT_FILE"):
                local.session.verify = bundle  # requests' own two variables go before it
        session: requests.Session = local.session
        return session

    def size_of(self, url: str) -> int | None:
        """The file's size, asked with HEAD; None if the server does not tell."""
        attempts = Attempts(self.policy, url)
        while True:
            try:
                with self.open(url, method="HEAD") as response:
                    return response.integer("Content-Length")
            except Transient as error:
                attempts.failed(error)


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
        raise Transient(f"the server answers {said!r:.80}", retry_after(answer.headers))
    advice = _ADVICE.get(status, "nothing is known of what that means for a file")
    raise FetchError(f"{redact(url)}: the server answers {said!r:.80}; {advice}")


def _tls_failure(url: str, error: Exception) -> Exception:
    reason = _reason(error)
    if "CERTIFICATE" not in reason.upper():
        return Transient(reason)
    return FetchError(
        f"{redact(url)}: {reason}. Where a proxy or mirror has a certificate of its own, "
        "REQUESTS_CA_BUNDLE or SSL_CERT_FILE names the file that vouches for it"
    )


def _reason(error: BaseException) -> str:
    """What the innermost error says: the outer ones repeat the address with its query."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        inner = [getattr(found, "reason", None), *found.args, found.__cause__, found.__context__]
        found = next((e for e in inner if isinstance(e, BaseException)), None)
    for each in reversed(chain):
        if isinstance(each, OSError) and each.strerror:
            return str(each.strerror)
    return _words(type(chain[-1]).__name__)


@functools.cache
def _words(name: str) -> str:
    return {
        "IncompleteRead": "the connection was closed before the end",
        "RemoteDisconnected": "the connection was closed without an answer",
        "ReadTimeoutError": "the server sends nothing",
        "ReadTimeout": "the server sends nothing",
        "ConnectTimeoutError": "no connection in time",
        "TimeoutError": "the server sends nothing",
    }.get(name, name)
