"""What a process fetches at a user's word, from real servers on loopback; only the names' addresses are made up."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from llama_stack.apis.common.content_types import URL, ImageContentItem, TextContentItem
from llama_stack.apis.tools import RAGDocument
from llama_stack.providers.inline.tool_runtime.rag import memory
from llama_stack.providers.utils.inference import openai_mixin, prompt_adapter

from app.settings import Settings
from app.stack import fetching, library
from app.stack.fetching import Fetched, FetchError, Rules, fetch, fetch_url
from tests.support.tls import make_certificate

LIMIT = 1000
REFUSED = "not a public address"
SECRET = "s3cret"


class Server:
    """`heard`: the headers of each request, by path."""

    def __init__(self) -> None:
        self.heard: dict[str, dict[str, str]] = {}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.heard[request.path] = dict(request.headers)
        match request.path.split("/")[1:]:
            case ["size", size]:
                return web.Response(body=b"x" * int(size), content_type="application/octet-stream")
            case ["bomb", encoding]:
                body = gzip.compress(bytes(10_000_000)) if encoding == "gzip" else zlib.compress(bytes(10_000_000))
                return web.Response(body=body, headers={"Content-Encoding": encoding})
            case ["gzip", *_]:
                return web.Response(body=gzip.compress(b"camels"), headers={"Content-Encoding": "gzip"})
            case ["endless"]:
                return await self.endless(request)
            case ["silent"]:
                await asyncio.sleep(60)
            case ["to"]:
                return web.Response(status=302, headers={"Location": request.query["url"], "Set-Cookie": "a=b"})
            case ["loop"]:
                return web.Response(status=301, headers={"Location": "/loop"})
            case ["missing"]:
                return web.Response(status=404)
        return web.Response(text="<p>camels", content_type="text/html", charset="utf-8")

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 100)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    runners = []

    async def start(context: ssl.SSLContext | None = None) -> Server:
        server = Server()
        application = web.Application()
        application.router.add_get("/{path:.*}", server.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        assert site._server is not None
        server.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return server

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def server(serve: Callable[..., Any]) -> Server:
    started: Server = await serve()
    return started


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What each name resolves to, the first time it is asked for, the second time, …"""
    table: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        if host not in table:
            return real(host, port, *args, **more)
        addresses = table[host].pop(0)
        return [found for address in addresses for found in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


def allowing(*entries: str) -> Rules:
    return Rules.allowing(entries, LIMIT)


async def refusal(url: str, rules: Rules) -> str:
    with pytest.raises(FetchError) as caught:
        await fetch_url(url, rules)
    return str(caught.value)


# --- where from -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "192.0.0.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::a00:1]",
        "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00:ec2::254]",
        "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "localhost",
    ],
)  # fmt: skip
async def test_what_is_not_public_is_refused(host: str) -> None:
    assert REFUSED in await refusal(f"http://{host}/latest/meta-data", allowing())


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "①②⑦.0.0.1"])
async def test_no_spelling_of_loopback_gets_through(host: str, server: Server) -> None:
    await refusal(f"http://{host}:{server.port}/", allowing())
    assert not server.heard


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/a", "gopher://127.0.0.1/", "http:///x", "http://[::1"]
)
async def test_what_is_no_http_url_is_refused(url: str) -> None:
    await refusal(url, allowing("127.0.0.1"))


async def test_a_name_is_refused_if_any_of_its_addresses_is(names: dict[str, list[list[str]]]) -> None:
    names["mixed.example"] = [["93.184.216.34", "10.0.0.1"]]
    assert REFUSED in await refusal("http://mixed.example/", allowing())


async def test_a_name_is_resolved_once_and_connected_where_it_was_checked(
    names: dict[str, list[list[str]]], server: Server
) -> None:
    """A second look, for the connection, would find another address."""
    names["rebinding.example"] = [["127.0.0.1"], ["127.0.0.2"]]
    rules = allowing("127.0.0.1")
    assert (await fetch_url(f"http://rebinding.example:{server.port}/a", rules)).data == b"<p>camels"
    assert names["rebinding.example"] == [["127.0.0.2"]]
    assert server.heard["/a"]["Host"] == f"rebinding.example:{server.port}"


async def test_names_that_are_not_answered_hold_nothing_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the loop has threads: the registry is read in these."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: over.wait())
    asked = [asyncio.create_task(fetch_url(f"http://{n}.example/", allowing())) for n in range(64)]
    try:
        await asyncio.sleep(0)  # each has begun
        await asyncio.wait_for(asyncio.to_thread(int), 20)
    finally:
        over.set()
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)


async def test_each_redirect_is_checked(serve: Callable[..., Any], names: dict[str, list[list[str]]]) -> None:
    """Another port, another scheme, a name: as if it had been asked for first."""
    allowed, forbidden = await serve(), await serve()
    names["inside.example"] = [["127.0.0.1"]]
    rules = allowing(f"127.0.0.1:{allowed.port}")
    for url in (forbidden.url, f"http://inside.example:{forbidden.port}/", "http://169.254.169.254/"):
        assert REFUSED in await refusal(f"{allowed.url}/to?url={url}", rules)
    assert "no http(s) URL" in await refusal(f"{allowed.url}/to?url=file:///etc/passwd", rules)
    assert "redirects" in await refusal(f"{allowed.url}/loop", rules)
    assert not forbidden.heard
    found = await fetch_url(f"{allowed.url}/to?url=/page.html", rules)
    assert (found.data, found.mime_type) == (b"<p>camels", "text/html")
    assert {"Cookie", "Authorization", "Referer"}.isdisjoint(allowed.heard["/page.html"])


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.0/8", "127.0.0.1:{port}", "::1"])
async def test_the_setting_allows_hosts_and_networks(entry: str, server: Server) -> None:
    found = fetch_url(f"{server.url}/a", allowing(entry.format(port=server.port)))
    if entry == "::1":
        with pytest.raises(FetchError, match="FETCH_ALLOWED"):
            await found
    else:
        assert (await found).data == b"<p>camels"


async def test_a_name_in_the_setting_is_allowed_wherever_it_is(
    names: dict[str, list[list[str]]], server: Server
) -> None:
    names["wiki.internal"] = [["127.0.0.1"], ["127.0.0.1"]]
    assert (await fetch_url(f"http://wiki.internal:{server.port}/", allowing("Wiki.Internal"))).data
    assert REFUSED in await refusal(f"http://wiki.internal:{server.port}/", allowing("wiki.internal:1"))


@pytest.mark.parametrize("wrong", ["http://wiki", "10.0.0.0/33", "wiki/docs", ":80"])
def test_a_wrong_entry_of_the_setting_is_told(wrong: str) -> None:
    with pytest.raises(ValueError, match="must be hosts"):
        Settings(_env_file=None, database_url="postgresql://x", fetch_allowed=wrong)
    right = Settings(_env_file=None, database_url="postgresql://x", fetch_allowed="wiki, [::1]:80,10.0.0.0/8, ::1,a:1")
    assert len(right.fetch_allowed) == 5


async def test_proxies_of_the_environment_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would resolve the name themselves."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, server.url)
    assert REFUSED in await refusal("http://10.0.0.1/", allowing("127.0.0.1"))
    assert not server.heard


async def test_a_certificate_must_be_the_names(
    serve: Callable[..., Any], names: dict[str, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await serve(context)
    names["other.example"] = [["127.0.0.1"]]
    rules = allowing("127.0.0.1", "localhost")
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(fetching, "_tls", lambda: trusting)
    assert "certificate" in await refusal(f"https://other.example:{server.port}/", rules)
    assert (await fetch_url(f"https://localhost:{server.port}/", rules)).data == b"<p>camels"
    monkeypatch.undo()
    assert "certificate" in await refusal(f"https://127.0.0.1:{server.port}/", rules)


async def test_llama_stacks_own_downloads_go_by_the_rules(server: Server) -> None:
    """Documents and images of providers that a run.yaml brings."""
    library._fetch_under(allowing(f"127.0.0.1:{server.port}"))
    document = RAGDocument(document_id="d", content=URL(uri=f"{server.url}/page"))
    assert await memory.raw_data_from_doc(document) == (b"<p>camels", "text/html")
    refused = "http://169.254.169.254/latest"
    for fetching_it in (
        memory.raw_data_from_doc(RAGDocument(document_id="d", content=URL(uri=refused))),
        prompt_adapter.localize_image_content(refused),
        prompt_adapter.convert_image_content_to_url(ImageContentItem(image={"url": URL(uri=refused)}), download=True),
        openai_mixin.localize_image_content("file:///etc/passwd"),
    ):
        with pytest.raises(FetchError):
            await fetching_it


# --- how much ---------------------------------------------------------------------------------------------------------


async def test_what_is_too_large_is_not_read_to_its_end(server: Server) -> None:
    rules = allowing("127.0.0.1")
    assert len((await fetch_url(f"{server.url}/size/{LIMIT}", rules)).data) == LIMIT
    for path in (f"size/{LIMIT + 1}", "endless", "bomb/gzip", "bomb/deflate"):
        assert "DOCUMENT_MAX_BYTES" in await refusal(f"{server.url}/{path}", rules)
    assert "compressed with br" in await refusal(f"{server.url}/bomb/br", rules)
    assert (await fetch_url(f"{server.url}/gzip/a", rules)).data == b"camels"
    for content in ("x" * (LIMIT + 1), URL(uri="data:," + "x" * (LIMIT + 1))):
        with pytest.raises(FetchError, match="DOCUMENT_MAX_BYTES"):
            await fetch(content, "text/plain", rules)


async def test_a_server_that_says_nothing_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TOTAL_SECONDS", 0.05)
    assert "within 0.05 s" in await refusal(f"{server.url}/silent", allowing("127.0.0.1"))


async def test_errors_tell_no_secret_of_the_url(server: Server) -> None:
    url = f"http://me:{SECRET}@127.0.0.1:{server.port}/missing?key={SECRET}#{SECRET}"
    told = await refusal(url, allowing("127.0.0.1"))
    assert "status 404" in told
    assert "/missing" in told
    assert SECRET not in told
    assert SECRET not in await refusal(f"http://me:{SECRET}@127.0.0.1:1/?key={SECRET}", allowing("127.0.0.1"))


# --- what -------------------------------------------------------------------------------------------------------------


def data_url(data: bytes, head: str) -> URL:
    return URL(uri=f"data:{head};base64,{base64.b64encode(data).decode()}")


@pytest.mark.parametrize(
    ("content", "said", "found"),
    [
        ("camels", "text/markdown", Fetched(b"camels", "text/markdown", "document.md", "utf-8")),
        ("camels", None, Fetched(b"camels", "text/plain", "document.txt", "utf-8")),
        (TextContentItem(text="é"), "text/plain", Fetched("é".encode(), "text/plain", "document.txt", "utf-8")),
        ([TextContentItem(text="a"), "b"], "", Fetched(b"a\nb", "text/plain", "document.txt", "utf-8")),
        (URL(uri="data:,a%20b"), None, Fetched(b"a b", "text/plain", "document.txt")),
        (URL(uri="data:text/csv;charset=latin-1,a%E9"), "", Fetched(b"a\xe9", "text/csv", "document.csv", "latin-1")),
        (data_url(b"\0\1", "application/pdf"), None, Fetched(b"\0\1", "application/pdf", "document.pdf")),
        (data_url(b"a", "text/csv;name=../my data.csv"), None, Fetched(b"a", "text/csv", "my data.csv")),
        (data_url(b"a", f"text/csv;name={'本' * 99}.csv"), None, Fetched(b"a", "text/csv", f"{'本' * 65}.csv")),
        (data_url(b"a", "application/octet-stream;name=a.yml"), None, Fetched(b"a", "application/yaml", "a.yml")),
        ("data:text/csv;base64,YQ==", "text/plain", Fetched(b"a", "text/plain", "document.txt")),
        ("data: below, and", None, Fetched(b"data: below, and", "text/plain", "document.txt", "utf-8")),
    ],
)  # fmt: skip
async def test_inline_content_and_data_urls(content: Any, said: str | None, found: Fetched) -> None:
    assert await fetch(content, said, allowing()) == found


async def test_types_and_names_of_what_is_fetched(server: Server) -> None:
    """The client's word for the type goes first, then the server's, then the name's; a URL alone is no text."""
    rules = allowing("127.0.0.1")
    html = await fetch(f" {server.url}/docs/in%20dex.html?a=b \n", None, rules)
    assert (html.mime_type, html.charset, html.name) == ("text/html", "utf-8", "in dex.html")
    assert (await fetch(URL(uri=f"{server.url}/"), "text/plain", rules)).name == "document.txt"
    assert (await fetch(f"{server.url}/size/1", "Text/Plain; charset=x", rules)).mime_type == "text/plain"
    assert (await fetch(URL(uri=f"{server.url}/gzip/..%2F..%2Fa.csv"), None, rules)).name == "a.csv"
    text = f"Look at {server.url}/docs"
    assert (await fetch(text, None, rules)).data == text.encode()
    picture = await fetch(ImageContentItem(image={"data": base64.b64encode(b"png").decode()}), None, rules)
    assert picture == Fetched(b"png", "image/png", "document.png")


@pytest.mark.parametrize("url", ["data:text/plain", "data:text/plain;base64,a"])
async def test_a_broken_data_url_is_told(url: str) -> None:
    await refusal(url, allowing())
