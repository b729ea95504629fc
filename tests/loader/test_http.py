"""Requests, addresses and ranges, against a server that does not behave."""

from __future__ import annotations

import email.utils
import io
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fi_ffi.errors import FetchError
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.ranges import Changed, NoRanges, RangeFile, RemotePieces
from fi_ffi.loader.fetch.urls import check_url, redact, redirected

from tests.loader import server as faults
from tests.loader.server import QUICK, File, Server, changed, header, redirect, status

CONTENT = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def environment(root, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web():
    with Server({"/file.whl": File(CONTENT, etag='"one"')}) as server:
        yield server


def read(url, start=1000, stop=60_000, policy=QUICK):
    url = url.url("/file.whl?token=secret") if isinstance(url, Server) else url
    return b"".join(RemotePieces(url, Client(policy)).stream(start, stop))


def refused(web, match, tries=1):
    """The message of the error, which must name the file and keep what is secret."""
    with pytest.raises(FetchError, match=match) as caught:
        read(web)
    text = str(caught.value)
    assert "/file.whl?..." in text and "secret" not in text
    assert tries in (None, len(web.seen))
    return text


def test_a_range(web):
    client = Client(QUICK)
    pieces = RemotePieces(web.url("/file.whl"), client)
    assert pieces.size() == len(CONTENT)
    assert client.moved == 1
    assert b"".join(pieces.stream(10, 20)) == CONTENT[10:20]
    assert b"".join(pieces.stream(0, len(CONTENT))) == CONTENT
    assert (client.requests, client.moved) == (3, 1 + 10 + len(CONTENT))
    assert web.sent == client.moved
    assert [*pieces.stream(5, 5)] == [*pieces.stream(0, 0)] == [] and client.requests == 3
    # The whole is asked for without a range, which a server need not know; a rest is one.
    for start in (0, 7):
        assert b"".join(pieces.stream(start)) == CONTENT[start:]
    assert [seen.headers.get("Range") for seen in web.seen[-2:]] == [None, "bytes=7-"]


KEPT = {100: CONTENT[100:200], 1000: CONTENT[1000:1001], len(CONTENT) - 50: CONTENT[-50:]}
# Around the ends of what is kept, of the extent and of the file; to all of them, and past them.
PLACES = sorted({
    place + step
    for place in (0, 100, 200, 1000, 1001, 5000, 7000, len(CONTENT) - 50, len(CONTENT))
    for step in (-1, 0, 1) if place + step >= 0
})  # fmt: skip


class Pieces:
    """A file whose ranges arrive in chunks of a few bytes; what was asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def stream(self, start, stop):
        self.asked.append((start, stop))
        for at in range(start, stop, 700):
            yield CONTENT[at : min(at + 700, stop)]


@pytest.mark.parametrize(("keep", "extent"), [(True, None), (False, None), (False, (5000, 7000))])
def test_reads_of_a_file_that_is_kept_in_part(keep, extent):
    """A read gives what it asks for, from wherever it comes; what is there is not asked for."""
    for start in PLACES:
        for stop in (stop for stop in PLACES if stop >= start):
            pieces, kept = Pieces(), dict(KEPT)
            raw = RangeFile(pieces, kept, len(CONTENT), extent, keep)
            with raw if keep else io.BufferedReader(raw, 512) as file:
                for _ in range(2):
                    assert file.seek(start) == file.tell() == start
                    assert file.read(stop - start) == CONTENT[start:stop]
                    assert file.tell() == min(stop, max(start, len(CONTENT)))
                    if keep:
                        assert len(pieces.asked) <= 1, "what was fetched is kept"
                assert file.seek(0, 2) == len(CONTENT) and file.read(1) == b""
            is_kept = any(at <= start and stop <= at + len(data) for at, data in KEPT.items())
            if is_kept and keep:
                assert not pieces.asked
            for first, last in pieces.asked:
                assert 0 <= first < last <= len(CONTENT)
            assert all(data == CONTENT[at : at + len(data)] for at, data in kept.items())
            assert keep or kept == KEPT
    with pytest.raises(ValueError, match="a position of -1"):
        raw.seek(-1)


def test_a_range_that_is_read_completely_is_one_request():
    pieces = Pieces()
    raw = RangeFile(pieces, {}, len(CONTENT), (5000, 7000), keep=False)
    with io.BufferedReader(raw, 64) as file:
        file.seek(5000)
        assert b"".join(iter(lambda: file.read(33), b"")) == CONTENT[5000:]
    assert pieces.asked[0] == (5000, 7000) and pieces.asked[1][0] == 7000


PASSING = [*map(status, (500, 503, 408, 429)), faults.truncate, faults.reset, faults.stall,
           changed(delay=1.0), changed(cut=0)]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(web, fault):
    web.faults = [fault]
    assert read(web) == CONTENT[1000:60_000]


def test_a_broken_answer_goes_on_where_it_ended(web):
    web.faults = [faults.truncate]
    assert read(web) == CONTENT[1000:60_000]
    assert web.sent == 59_000
    assert web.seen[1].headers["Range"] == "bytes=30500-59999"


@pytest.mark.parametrize("fault", [faults.truncate, faults.stall, changed(cut=0), status(500)])
def test_what_does_not_pass_is_given_up(web, fault):
    web.always = fault
    begun = time.monotonic()
    assert "Check the network" in refused(web, "gave up after 3 tries", tries=None)
    assert time.monotonic() - begun < 5


def test_a_trickle_is_given_up(web):
    web.always = faults.trickle
    begun = time.monotonic()
    refused(web, f"only .* bytes came in {QUICK.read_timeout}", tries=None)
    assert time.monotonic() - begun < 5


def test_a_broken_line_that_moves_gets_there():
    """More breaks than tries, each after a good part."""
    content = bytes(12 << 20)
    with Server({"/file.whl": File(content)}) as web:
        web.always = changed(cut=(1 << 20) + 1)
        assert read(web, 0, len(content)) == content
        assert len(web.seen) > QUICK.tries


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (status(404), "answers '404.*wheels.lock"),
        (status(403), "answers '403.*netrc"),
        (status(401), "answers '401.*netrc"),
        (status(410), "answers '410.*taken away"),
        (status(400), "answers '400.*unexpected"),
        (status(302), "a redirect to nowhere"),
        (faults.shifted, "asked for bytes 1000-59999, the server sends 1001-59999"),
        (header("Content-Range", "bytes 1000-5000/102400"), "the server sends 1000-5000"),
        (faults.longer, "asked for 59000 bytes, the server announces 59004"),
        (header("Content-Length", "100"), "announces 100"),
        (header("Content-Length", "-7"), "Content-Length: '-7'"),
        (header("Content-Length", "9" * 5000), "Content-Length: '999"),
        (header("Content-Range", "bytes 1000-59999/*"), "broken"),
        (header("Content-Range", "bytes 1000-59999/100"), "broken"),
        (header("Content-Encoding", "gzip"), "encoded"),
        (status(206), "'none'"),
    ],
)
def test_refusals_and_lies_are_not_tried_again(web, fault, match):
    web.always = fault
    refused(web, match)


def test_more_than_the_range(web):
    """Without a Content-Length the length shows only as the bytes come."""

    def chunked(answer):
        pieces = (b"%x\r\n%s\r\n" % (len(p), p) for p in (answer.body, b"more"))
        headers = answer.headers | {"Transfer-Encoding": "chunked", "Content-Length": ""}
        return faults.Answer(206, headers, b"".join(pieces) + b"0\r\n\r\n")

    web.always = chunked
    refused(web, "more than it announced")


def test_no_ranges(web):
    web.files["/file.whl"].ranges = False
    with pytest.raises(NoRanges, match="whole files only"):
        read(web)
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    "after",
    [
        File(CONTENT, etag='"two"'),
        File(CONTENT + b"more", etag='"one"'),
        File(CONTENT[:100]),
    ],
)
def test_a_file_that_changes(web, after):
    pieces = RemotePieces(web.url("/file.whl"), Client(QUICK))
    assert b"".join(pieces.stream(0, 100)) == CONTENT[:100]
    web.files["/file.whl"] = after
    with pytest.raises(Changed):
        b"".join(pieces.stream(100, 60_000))


def test_retry_after(web):
    web.faults = [status(429, Retry_After="0"), status(503, Retry_After="1")]
    begun = time.monotonic()
    assert read(web) == CONTENT[1000:60_000]
    assert time.monotonic() - begun >= 1
    far = email.utils.formatdate(time.time() + 3600, usegmt=True)
    for when, match in (("3600", "asks to wait 3600 s"), (far, "asks to wait 3[56]")):
        web.faults = [status(429, Retry_After=when)]
        refused(web, match, tries=None)
    web.faults = [status(429, Retry_After="soon")]
    assert read(web) == CONTENT[1000:60_000]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects(web, code):
    web.files["/store/abc"] = web.files["/file.whl"]
    web.faults = [redirect("/elsewhere", code), redirect(web.url("/store/abc", "localhost"), code)]
    assert read(web) == CONTENT[1000:60_000]
    assert [seen.path for seen in web.seen][1:] == ["/elsewhere", "/store/abc"]


def test_a_redirect_out_of_this_machine_without_tls(web):
    web.always = redirect("http://192.0.2.1/file.whl")
    with pytest.raises(FetchError, match="192.0.2.1/file.whl: only https is used"):
        read(web)


def test_a_loop_of_redirects(web):
    web.always = redirect("/file.whl?token=secret")
    refused(web, "more than 10 redirects", tries=11)


@pytest.mark.parametrize("of", ["netrc", "address"])
def test_credentials_stay_with_their_host(of, web, tmp_path):
    web.files["/store"] = web.files["/file.whl"]
    url = web.url("/file.whl")
    if of == "netrc":
        logins = ("machine 127.0.0.1", "default")
        text = "".join(f"{who} login me password hidden\n" for who in logins)
        (tmp_path / "netrc").write_text(text)
    else:
        url = url.replace("//", "//me:hidden@")
    web.faults = [redirect("/same"), redirect(web.url("/store", "localhost"))]
    assert read(url, 0, 5) == CONTENT[:5]
    assert ["Authorization" in seen.headers for seen in web.seen] == [True, True, False]
    web.always = status(403)
    with pytest.raises(FetchError) as caught:
        read(url)
    assert "hidden" not in str(caught.value)


def test_addresses(tmp_path):
    """Which are used: tests/stress/test_trust_cache.py."""
    for url in ("https://host:99999999/a", "https://[::1/a", "https://a b/c", "file:///etc/passwd"):
        with pytest.raises(FetchError):
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
def test_no_part_of_a_password_is_shown(url, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9/")
    with pytest.raises(FetchError) as caught:
        read(url, policy=replace(QUICK, tries=1))
    with pytest.raises(FetchError) as redirected_to:
        redirected("https://h/", url) and check_url(redirected("https://h/", f"ftp{url[5:]}"))
    for text in (redact(url), str(caught.value), str(redirected_to.value)):
        assert not re.findall("SEC|RET|PW", text), text


def test_nobody_listens():
    with Server() as web:
        url = web.url("/file.whl?token=secret")
    with pytest.raises(FetchError, match="Connection refused; gave up after 3 tries") as caught:
        read(url)
    assert "secret" not in str(caught.value)


def test_loopback_goes_round_the_proxy(web, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert read(web, 0, 10) == CONTENT[:10]


def test_the_proxy_is_used(web, monkeypatch):
    monkeypatch.setenv("https_proxy", web.url("").replace("//", "//me:hidden@"))
    with pytest.raises(FetchError, match="example.invalid") as caught:
        read("https://example.invalid/a")
    assert "hidden" not in str(caught.value)
    assert {(seen.method, seen.path) for seen in web.seen} == {("CONNECT", "example.invalid:443")}


def test_offline_opens_no_socket(web, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    refused(web, "FI_FFI_OFFLINE=1", tries=0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
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
def tls(certificate):
    with Server({"/file.whl": File(CONTENT)}, certificate=certificate) as server:
        yield server


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_tls(tls, certificate, monkeypatch, name):
    monkeypatch.setenv(name, str(certificate))
    assert read(tls) == CONTENT[1000:60_000]


def test_an_unknown_certificate(tls):
    assert "SSL_CERT_FILE" in refused(tls, "CERTIFICATE_VERIFY_FAILED", tries=0)


def test_no_redirect_out_of_tls(tls, web, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls.always = redirect(web.url("/file.whl"))
    refused(tls, "redirects from https to http://", tries=None)
    assert (len(tls.seen), len(web.seen)) == (1, 0)
