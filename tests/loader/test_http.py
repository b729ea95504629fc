"""Requests against a server that does not behave."""

from __future__ import annotations

import email.utils
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fi_ffi.errors import FetchError, LoaderError
from fi_ffi.loader.http import Client, Policy, Transient
from fi_ffi.loader.ranges import Changed, NoRanges, RemotePieces
from fi_ffi.loader.urls import check_url, redact, redirected

from tests.loader import server as faults
from tests.loader.server import QUICK, File, Server, changed, header, redirect, status

CONTENT = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("FI_FFI_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def web() -> Iterator[Server]:
    with Server({"/file.whl": File(CONTENT, etag='"one"')}) as server:
        yield server


def read(web: Server, start: int = 1000, stop: int = 60_000, policy: Policy = QUICK) -> bytes:
    pieces = RemotePieces(web.url("/file.whl?token=secret"), Client(policy))
    return b"".join(pieces.stream(start, stop))


def refused(web: Server, match: str, tries: int | None = 1) -> str:
    """The message of the error, which must name the file and keep what is secret."""
    with pytest.raises(FetchError, match=match) as caught:
        read(web)
    text = str(caught.value)
    assert "/file.whl?..." in text
    assert "secret" not in text
    if tries is not None:
        assert len(web.seen) == tries
    return text


def test_a_range(web: Server) -> None:
    client = Client(QUICK)
    pieces = RemotePieces(web.url("/file.whl"), client)
    assert b"".join(pieces.stream(10, 20)) == CONTENT[10:20]
    assert b"".join(pieces.stream(0, len(CONTENT))) == CONTENT
    assert pieces.size() == len(CONTENT)
    assert (client.requests, client.moved) == (2, 10 + len(CONTENT))
    assert web.sent == client.moved


def test_the_size_of_a_file(web: Server) -> None:
    client = Client(QUICK)
    assert RemotePieces(web.url("/file.whl"), client).size() == len(CONTENT)
    assert client.moved == 1


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(502),
        status(503),
        status(408),
        status(429),
        faults.truncate,
        faults.reset,
        faults.stall,
        changed(delay=1.0),
        changed(cut=0),
    ],
)
def test_what_passes_is_tried_again(web: Server, fault: faults.Fault) -> None:
    web.faults = [fault, fault]
    assert read(web) == CONTENT[1000:60_000]


def test_a_broken_answer_goes_on_where_it_ended(web: Server) -> None:
    web.faults = [faults.truncate]
    assert read(web) == CONTENT[1000:60_000]
    assert web.sent == 59_000
    assert web.seen[1].headers["Range"] == "bytes=30500-59999"


@pytest.mark.parametrize("fault", [faults.truncate, faults.stall, changed(cut=0), status(500)])
def test_what_does_not_pass_is_given_up(web: Server, fault: faults.Fault) -> None:
    web.always = fault
    begun = time.monotonic()
    text = refused(web, "gave up after 3 tries", tries=None)
    assert "Check the network" in text
    assert time.monotonic() - begun < 5


def test_a_trickle_is_given_up(web: Server) -> None:
    web.always = faults.trickle
    begun = time.monotonic()
    refused(web, f"only .* bytes came in {QUICK.read_timeout}", tries=None)
    assert time.monotonic() - begun < 5


def test_a_broken_line_that_moves_gets_there() -> None:
    """More breaks than tries, each after a good part."""
    content = bytes(12 << 20)
    with Server({"/file.whl": File(content)}) as web:
        web.always = changed(cut=(1 << 20) + 1)
        assert read(web, 0, len(content)) == content
        assert len(web.seen) > QUICK.tries


@pytest.mark.parametrize(
    ("code", "advice"),
    [(404, "wheels.lock"), (403, "netrc"), (401, "netrc"), (410, "taken away"), (400, "nothing")],
)
def test_refusals_are_not_tried_again(web: Server, code: int, advice: str) -> None:
    web.always = status(code)
    assert advice in refused(web, f"answers '{code}")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (faults.shifted, "asked for bytes 1000-59999, the server sends 1001-59999"),
        (faults.longer, "asked for 59000 bytes, the server announces 59004"),
        (header("Content-Length", "100"), "announces 100"),
        (header("Content-Length", "-7"), "Content-Length: '-7'"),
        (header("Content-Length", "9" * 5000), "Content-Length: '999"),
        (header("Content-Range", "bytes 1000-59999/*"), "broken"),
        (header("Content-Range", "bytes 1000-59999/100"), "broken"),
        (header("Content-Range", "something"), "broken"),
        (header("Content-Encoding", "gzip"), "encoded"),
        (status(206), "'none'"),
    ],
)
def test_lies_are_not_tried_again(web: Server, fault: faults.Fault, match: str) -> None:
    web.always = fault
    refused(web, match)


def test_more_than_the_range(web: Server) -> None:
    """Without a Content-Length the length shows only as the bytes come."""

    def chunked(answer: faults.Answer) -> faults.Answer:
        body = (
            b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (answer.body, b"more")) + b"0\r\n\r\n"
        )
        headers = answer.headers | {"Transfer-Encoding": "chunked", "Content-Length": ""}
        return faults.Answer(206, headers, body)

    web.always = chunked
    refused(web, "more than it announced")


def test_no_ranges(web: Server) -> None:
    web.files["/file.whl"].ranges = False
    with pytest.raises(NoRanges, match="whole files only"):
        read(web)
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    "after",
    [
        File(CONTENT, etag='"two"'),
        File(CONTENT + b"more", etag='"one"'),
        File(CONTENT[:70_000], etag='"one"'),
        File(CONTENT[:100]),
    ],
)
def test_a_file_that_changes(web: Server, after: File) -> None:
    pieces = RemotePieces(web.url("/file.whl"), Client(QUICK))
    assert b"".join(pieces.stream(0, 100)) == CONTENT[:100]
    web.files["/file.whl"] = after
    with pytest.raises(Changed):
        b"".join(pieces.stream(100, 60_000))


def test_retry_after(web: Server) -> None:
    web.faults = [status(429, Retry_After="0"), status(503, Retry_After="1")]
    begun = time.monotonic()
    assert read(web) == CONTENT[1000:60_000]
    assert time.monotonic() - begun >= 1
    web.faults = [status(429, Retry_After="3600")]
    refused(web, "asks to wait 3600 s", tries=None)
    far = email.utils.formatdate(time.time() + 3600, usegmt=True)
    web.faults = [status(429, Retry_After=far)]
    refused(web, "asks to wait 3[56]", tries=None)
    web.faults = [status(429, Retry_After="soon")]
    assert read(web) == CONTENT[1000:60_000]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects(web: Server, code: int) -> None:
    web.files["/store/abc"] = web.files["/file.whl"]
    web.faults = [redirect("/elsewhere", code), redirect(web.url("/store/abc", "localhost"), code)]
    assert read(web) == CONTENT[1000:60_000]
    assert [seen.path for seen in web.seen][1:] == ["/elsewhere", "/store/abc"]


def test_a_loop_of_redirects(web: Server) -> None:
    web.always = redirect("/file.whl?token=secret")
    refused(web, "more than 10 redirects", tries=11)


@pytest.mark.parametrize(
    "target", ["http://example.com/f", "file:///etc/passwd", "ftp://a/b", "//["]
)
def test_redirects_that_lead_astray(web: Server, target: str) -> None:
    web.always = redirect(target)
    with pytest.raises(FetchError):
        read(web)
    assert len(web.seen) == 1


def test_a_redirect_to_nowhere(web: Server) -> None:
    web.always = status(302)
    refused(web, "a redirect to nowhere")


def test_credentials_stay_with_their_host(web: Server, tmp_path: Path) -> None:
    web.files["/store"] = web.files["/file.whl"]
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login me password hidden\ndefault login me password hidden\n"
    )
    web.faults = [redirect("/same"), redirect(web.url("/store", "localhost"))]
    read(web)
    assert ["Authorization" in seen.headers for seen in web.seen] == [True, True, False]


def test_credentials_of_an_address(web: Server, tmp_path: Path) -> None:
    web.files["/store"] = web.files["/file.whl"]
    url = web.url("/file.whl").replace("//", "//me:hidden@")
    web.faults = [redirect("/same"), redirect(web.url("/store", "localhost"))]
    assert b"".join(RemotePieces(url, Client(QUICK)).stream(0, 5)) == CONTENT[:5]
    assert ["Authorization" in seen.headers for seen in web.seen] == [True, True, False]
    web.always = status(403)
    with pytest.raises(FetchError) as caught:
        b"".join(RemotePieces(url, Client(QUICK)).stream(0, 5))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.whl",
        "http://127.0.0.1.example.com/a",
        "http://10.0.0.1/a",
        "ftp://localhost/a",
        "https:///a",
        "/a/b",
        "https://host:99999999/a",
        "https://[::1/a",
        "http://127.0.0.1\\@example.com/a",
        "https://a b/c",
        "file:///etc/passwd",
        "",
    ],
)
def test_addresses_that_are_not_used(url: str) -> None:
    with pytest.raises(FetchError):
        check_url(url)


def test_addresses_that_are() -> None:
    for url in ("https://example.com/a", "http://localhost:1/a", "http://[::1]/a", "HTTPS://h/a"):
        check_url(url)
    assert redact("https://u:p@host:8/a%2Bb?q=1#f") == "https://host:8/a%2Bb?..."
    assert redact("https://[") == "an address that cannot be read"
    assert "\x1b" not in redact("https://h/\x1b[31m")
    assert redirected("https://u:p@h/a", "https://h/b") == "https://u:p@h/b"
    assert redirected("https://u:p@h/a", "https://x/b") == "https://x/b"


SECRETS = [
    "https://u:SECRET/PW@h/a.whl",
    "https://u:SEC#RET@h/a.whl",
    "https://u:SEC?RET@h/a.whl",
    "https://u:1/SECRET@h/a.whl",
    "https://u:SECRET@SECRET@h/a.whl",
    "https://u:SE@C/RET@h/a.whl",
    "https://u:SECRET@h:port/a.whl",
    "https://u:SECRET",
    "https://h/a.whl?token=SECRET",
    "u:SECRET@h/a.whl",
    "https:/u:SECRET@h/a.whl",
    "https://u:SECRET@[::1/a.whl",
]


@pytest.mark.parametrize("url", SECRETS)
def test_no_part_of_a_password_is_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9/")
    policy = replace(QUICK, tries=1)
    with pytest.raises(FetchError) as caught:
        b"".join(RemotePieces(url, Client(policy)).stream(0, 5))
    with pytest.raises(FetchError) as redirected_to:
        redirected("https://h/", url) and check_url(redirected("https://h/", f"ftp{url[5:]}"))
    for text in (redact(url), str(caught.value), str(redirected_to.value)):
        assert not {"SEC", "RET", "PW"} & {*re.findall("SEC|RET|PW", text)}, text


def test_nobody_listens() -> None:
    with Server() as web:
        url = web.url("/file.whl?token=secret")
    with pytest.raises(FetchError, match="Connection refused; gave up after 3 tries") as caught:
        b"".join(RemotePieces(url, Client(QUICK)).stream(0, 5))
    assert "secret" not in str(caught.value)


def test_loopback_goes_round_the_proxy(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert read(web, 0, 10) == CONTENT[:10]


def test_the_proxy_is_used(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = web.url("").replace("//", "//me:hidden@")
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(FetchError, match="example.invalid") as caught:
        b"".join(RemotePieces("https://example.invalid/a", Client(QUICK)).stream(0, 5))
    assert "hidden" not in str(caught.value)
    assert {(seen.method, seen.path) for seen in web.seen} == {("CONNECT", "example.invalid:443")}


def test_offline_opens_no_socket(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    refused(web, "FI_FFI_OFFLINE=1", tries=0)
    assert web.seen == []


def test_errors_are_of_the_tree() -> None:
    assert issubclass(NoRanges, LoaderError)
    assert issubclass(Changed, OSError)
    assert not issubclass(Transient, LoaderError)  # never leaves the package


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command = ["openssl", "req", "-x509", *key, *name, "-keyout", f"{file}.key", "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.key").read_text())
    return file


@pytest.fixture
def tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    with Server({"/file.whl": File(CONTENT)}, certificate=certificate) as server:
        yield server


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_tls(tls: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, str(certificate))
    assert read(tls) == CONTENT[1000:60_000]


def test_an_unknown_certificate(tls: Server) -> None:
    assert "SSL_CERT_FILE" in refused(tls, "CERTIFICATE_VERIFY_FAILED", tries=0)


def test_no_redirect_out_of_tls(
    tls: Server, web: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls.always = redirect(web.url("/file.whl"))
    refused(tls, "redirects from https to http://", tries=None)
    assert (len(tls.seen), len(web.seen)) == (1, 0)
