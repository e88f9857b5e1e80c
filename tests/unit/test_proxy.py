"""The proxy that tests put in front of servers breaks connections in each of its ways, and mends them again."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.support import wait_until
from tests.support.proxy import TcpProxy

SOON = 0.2


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.server.received += data  # type: ignore[attr-defined]
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    received = b""


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Echo) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        yield echo
        echo.shutdown()


@pytest.fixture
def proxy(server: _Server) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", server.server_address[1]) as made:
        yield made


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=60)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(1024)


def assert_silent(client: socket.socket) -> None:
    client.settimeout(SOON)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(60)


def test_cut_resets_what_is_connected(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        assert ask(client, b"b") == b"b"


def test_refused_connections_and_the_same_port_again(proxy: TcpProxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert ask(before, b"b") == b"b"
    proxy.accept()
    with connect(proxy) as after:
        assert ask(after, b"c") == b"c"


def test_a_stall_is_silent_for_old_and_new_connections(proxy: TcpProxy, server: _Server) -> None:
    with connect(proxy) as old:
        assert ask(old, b"a") == b"a"
        proxy.stall()
        old.sendall(b"b")
        with connect(proxy) as new:
            new.sendall(b"c")
            assert_silent(old)
            assert_silent(new)
            assert server.received == b"a"
            proxy.flow()
            assert (old.recv(1), new.recv(1)) == (b"b", b"c")


def test_a_stall_at_a_pattern_holds_it_back(proxy: TcpProxy, server: _Server) -> None:
    """The pattern may come in two pieces, of which the first is gone."""
    with connect(proxy) as client:
        assert ask(client, b"BEGIN COM") == b"BEGIN COM"
        proxy.stall_at(b"COMMIT")
        assert ask(client, b"x COM") == b"x COM"
        client.sendall(b"MIT")
        proxy.wait_stalled()
        assert_silent(client)
        assert server.received == b"BEGIN COMx COM"
        proxy.flow()
        assert client.recv(3) == b"MIT"


def test_a_reply_is_lost_after_the_server_has_answered(proxy: TcpProxy, server: _Server) -> None:
    """Only that one: the request arrived, and the next connection gets its answers."""
    proxy.lose_reply_after(b"COMMIT")
    with connect(proxy) as client:
        assert ask(client, b"BEGIN") == b"BEGIN"
        client.sendall(b"COMMIT")
        proxy.wait_lost()
        assert server.received == b"BEGINCOMMIT"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        assert ask(client, b"COMMIT") == b"COMMIT"
    proxy.lose_reply_after(b"COMMIT", since=b"INSERT")
    with connect(proxy) as other, connect(proxy) as client:
        assert ask(client, b"INSERT") == b"INSERT"
        assert ask(other, b"COMMIT") == b"COMMIT"
        client.sendall(b"COMMIT")
        proxy.wait_lost()
    wait_until(lambda: proxy.connections == 0)
