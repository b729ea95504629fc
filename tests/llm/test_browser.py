"""Pages in headless Chromium beside examples/llm/serve.py: its own, and those of other sites."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny

from tests.llm.browser import PROGRAM, Browser, Tab
from tests.llm.process import ServerProcess

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium is on the PATH: Debian's package `chromium` has it"
)

KEY = "sk-of-a-test"
NAME, OTHER = "chat.example", "evil.example"
# What the page of another site may try: with a question that the browser asks before, and without.
ASK = """(async () => {
  const body = JSON.stringify({prompt: "a", max_tokens: 4, stream: true});
  const told = [];
  for (const more of [{headers: {"content-type": "application/json"}}, {},
                      {headers: {authorization: "Bearer KEY"}}, {mode: "no-cors"}])
    told.push(await fetch("URL/v1/completions", {method: "POST", body, ...more}).then(
      async r => [r.type, r.status, await r.text()], wrong => [wrong.name]));
  for (const path of ["/v1/models", "/health", "/metrics", "/"])
    told.push(await fetch("URL" + path).then(r => [r.status], wrong => [wrong.name]));
  return told;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser(NAME, OTHER)
    yield browser
    browser.end()


@pytest.fixture
def server(servers: Any, where: str, tmp_path: Path) -> ServerProcess:
    """Of a model that never ends a text."""

    def start() -> ServerProcess:
        model = make_tiny(tmp_path / "m", "llama", num_hidden_layers=1, eos_token_id=[])
        flags = "--model", str(model), "--api-key", KEY, "--allowed-host", NAME
        return ServerProcess(where, *flags)

    return servers("of a page", where, start)


def asked(tab: Tab, tokens: int, key: str = KEY, text: str = "Hello") -> None:
    """Fill in the server's page, and send it."""
    for name, value in (("text", text), ("tokens", tokens), ("key", key)):
        tab.run(f"document.getElementById('{name}').value = {json.dumps(value)}")
    tab.run("document.getElementById('form').requestSubmit()")


def said(tab: Tab, kind: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll('#chat .{kind}')].map(p => p.textContent)")


def all_back(server: ServerProcess) -> None:
    end = time.monotonic() + 20
    while server.metric("running_requests") + server.metric("used_pages"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_chat_comes_token_by_token(browser, server):
    tab = Tab(browser, server.address)
    tab.run("""window.seen = [];
      new MutationObserver(() => seen.push([performance.now(),
        document.querySelector("#chat .assistant")?.textContent.length ?? 0])
      ).observe(document.getElementById("chat"), {childList: true, subtree: true})""")
    asked(tab, 300)
    tab.wait("going === null && messages.length == 2")
    (text,) = said(tab, "assistant")
    times, lengths = zip(*tab.run("seen"), strict=True)
    assert len(text) == lengths[-1] > 200  # some tokens are bytes that are no character
    assert [*lengths] == sorted(lengths)
    # In many pieces, the first of them long before the last.
    assert len({*lengths}) > 30
    half = next(time for time, length in zip(times, lengths, strict=True) if length > 150)
    assert times[0] < half < times[-1]
    assert said(tab, "error") == []
    asked(tab, 3, text="More")  # the conversation goes on
    tab.wait("going === null && messages.length == 4")
    assert said(tab, "user") == ["Hello", "More"]
    tab.close()


@pytest.mark.parametrize("how", ["stop", "close"])
def test_who_stops_a_page_gives_its_memory_back(browser, server, how):
    """By its button, after which it goes on; or by closing it."""
    tab, before = Tab(browser, server.address), server.metric("generated_tokens_total")
    asked(tab, 1900)
    tab.wait("(document.querySelector('#chat .assistant')?.textContent ?? '').length > 5")
    assert server.metric("used_pages") > 0
    if how == "close":
        tab.close()
    else:
        tab.run("document.getElementById('stop').click()")
        tab.wait("going === null")
        assert said(tab, "error") == []
    all_back(server)
    assert server.metric("generated_tokens_total") - before < 1900
    if how == "stop":
        asked(tab, 3)
        tab.wait("going === null && messages.length == 4")
        assert len(said(tab, "assistant")) == 2
        tab.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"tokens": 5000}, "there is room for 2048"), ({"tokens": 3, "key": "other"}, "API key")],
    ids=str,
)
def test_the_page_says_what_is_wrong(browser, server, given, words):
    tab = Tab(browser, server.address)
    asked(tab, **given)
    tab.wait("document.querySelector('#chat .error') !== null")
    (told,) = said(tab, "error")
    assert words in told
    tab.close()


@pytest.mark.parametrize(("name", "is_allowed"), [(NAME, True), (OTHER, False)])
def test_names_of_the_server(browser, server, name, is_allowed):
    """Its page works by a name that --allowed-host has; by another it says why it does not."""
    port, before = server.address.rpartition(":")[2], server.metric("requests_total")
    tab = Tab(browser, f"http://{name}:{port}/")
    asked(tab, 3)
    tab.wait("going === null && messages.length == 2")
    if is_allowed:
        assert said(tab, "error") == [] and said(tab, "assistant") != [""]
    else:
        (told,) = said(tab, "error")
        assert "--allowed-host" in told
    assert server.metric("requests_total") == before + is_allowed
    tab.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[int]:
    """The port of a site with an empty page."""
    (tmp_path / "index.html").write_text("<!doctype html><title>a site</title><p>a page")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", NAME, OTHER])
def test_pages_of_other_sites(browser, server, site, host):
    """They read nothing of the server, be it an error, and have it compute nothing."""
    before = [server.metric(n) for n in ("requests_total", "generated_tokens_total")]
    tab = Tab(browser, f"http://{host}:{site}/")
    *posts, blind = tab.run(ASK.replace("URL", server.address).replace("KEY", KEY))[:4]
    assert posts == [["TypeError"]] * 3
    assert blind == ["opaque", 0, ""]
    assert tab.run(ASK.replace("URL", server.address))[4:] == [["TypeError"]] * 4
    # A form needs no leave to send; the browser says which site's it is.
    tab.run(f"""document.body.innerHTML = '<form id="f" method="post" enctype="text/plain"' +
      ' action="{server.address}/v1/completions"><input name=\\'{{"prompt":"a","user":"\\'' +
      ' value=\\'"}}\\'></form>'; document.getElementById("f").submit()""")
    tab.wait(f"location.href.startsWith({server.address!r})")
    tab.wait("document.body.innerText.includes('a page of another site asks')")
    all_back(server)
    assert [server.metric(n) for n in ("requests_total", "generated_tokens_total")] == before
    tab.close()
