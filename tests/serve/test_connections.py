"""A server process with a stand-in for the model, and clients that leave, are slow, or send what is no request."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_jax.serve.connections import listen

LIMITS = {"body_bytes": 50_000, "header_bytes": 4000, "connections": 20, "receive_seconds": 0.5, "send_seconds": 0.5}
SCRIPT = Path(__file__).parent / "stand_in_server.py"


class Process:
    """The server's process."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, SCRIPT, json.dumps(LIMITS)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def connect(self, receive_buffer=None):
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(30)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, *pieces):
        """Returns the status, headers and body that a connection gets for these bytes, until it is closed."""
        with self.connect() as client:
            for piece in pieces:
                client.sendall(piece)
            return parse(read(client))

    def busy(self):
        """Returns the number of answers in progress."""
        _, _, text = self.ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return int(re.search(rb"^llava_jax_busy_slots (\d+)$", text, re.MULTILINE)[1])

    def files(self):
        """Returns the number of open files, which connections are."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture(scope="module")
def server():
    server = Process()
    yield server
    server.process.kill()
    _, errors = server.process.communicate()
    assert "Traceback" not in errors


@pytest.fixture
def own_server():
    server = Process()
    yield server
    server.process.kill()
    server.process.communicate()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def read(client, until=None):
    """Returns what a client gets until these bytes, or until the connection is closed."""
    data = b""
    while until is None or until not in data:
        try:
            piece = client.recv(2**16)
        except ConnectionResetError:
            piece = b""
        if not piece:
            assert until is None, data
            break
        data += piece
    return data


def parse(data):
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else None, head.lower(), body


def request(content, headers="", **fields):
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": content}]} | fields).encode()
    return head(f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n{headers}") + body


def head(headers="", start="POST /v1/chat/completions HTTP/1.1"):
    return f"{start}\r\nHost: localhost\r\n{headers}\r\n".encode()


def chunked(*chunks):
    """Pieces of a request without a Content-Length."""
    yield head("Transfer-Encoding: chunked\r\nContent-Type: application/json\r\nConnection: close\r\n")
    for chunk in (*chunks, b""):
        yield b"%x\r\n%s\r\n" % (len(chunk), chunk)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    with server.connect() as client:
        client.sendall(request("hold", stream=stream, n=2))
        if stream:
            read(client, until=b"end")
        wait_until(server.busy)
        assert server.busy() == 2
    wait_until(lambda: not server.busy())


def test_a_client_that_leaves_with_a_further_request_waiting(server):
    with server.connect() as client:
        client.sendall(request("hold"))
        wait_until(server.busy)
        client.sendall(request("hold"))
        server.busy()  # the server has read it before this
    wait_until(lambda: not server.busy())


def test_a_client_that_never_reads(server):
    files = server.files()
    with server.connect(receive_buffer=4096) as client:
        client.sendall(request("flood", stream=True))
        wait_until(server.busy)
        wait_until(lambda: not server.busy())
        wait_until(lambda: server.files() <= files)  # the connection is closed


def test_pipelined_requests(server):
    status, _, body = server.ask(request("a") + request("b", n=2) + request("c", "Connection: close\r\n"))
    assert status == 200 and body.count(b"HTTP/1.1 200 OK") == 2 and body.count(b'"finish_reason":"stop"') == 4


def test_a_flood_of_pipelined_requests(server):
    with server.connect() as client:
        try:
            client.sendall(request("hold") + request("a") * 2000)
        except ConnectionError:
            pass
        assert read(client) == b""
    wait_until(lambda: not server.busy())


def test_chunked_bodies(server):
    body = request("Hello").partition(b"\r\n\r\n")[2]
    assert server.ask(*chunked(*(body[i : i + 1] for i in range(len(body)))))[0] == 200
    status, _, error = server.ask(*chunked(*[b"[" * 9000] * 7))
    assert status == 413 and json.loads(error)["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("first, status", [
    (head("Content-Type: application/json\r\nContent-Length: 9\r\n") + b"{", 408),
    (head("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n") + b"1\r\n{\r\n", 408),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a", None), (b"", None),
], ids=["body", "chunks", "headers", "nothing"])
def test_a_client_that_stops_sending(server, first, status):
    assert server.ask(first)[0] == status


@pytest.mark.parametrize("data, status", [
    (head("X: " + "a" * 5000 + "\r\n"), 431),
    (head("X: a\r\n" * 10_000), 431),
    (head(start="GET /" + "a" * 5000 + " HTTP/1.1"), 431),
    (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    (head("Content-Length: 5\r\nContent-Length: 6\r\n"), 400),
    (head("Content-Length: -1\r\n"), 400),
    (head("Transfer-Encoding: gzip\r\n"), 501),
    (head("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400),
    (head("Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n") + b"zz\r\n", 400),
], ids=range(11))
def test_what_is_no_request(server, data, status):
    answered, _, body = server.ask(data)
    assert answered == status and json.loads(body)["error"]["type"]


@pytest.mark.parametrize("target, host, status", [
    ("/v1/models", "localhost", 200), ("/v1/models", "evil.example", 403), ("/v1/models", "evil.example/health?", 403),
    ("http://evil.example/v1/models", "evil.example", 404), ("/health", "evil.example", 200),
    ("//health/../v1/models", "localhost", 404), ("/v1//models", "localhost", 404), ("/health/../v1/models", "x", 404)])
def test_hosts_and_targets(server, target, host, status):
    data = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert server.ask(data.encode())[0] == status


def test_a_refused_body_is_read_so_that_the_answer_arrives(server):
    status, headers, _ = server.ask(head("Content-Length: 40000\r\nContent-Type: text/plain\r\n"), b"a" * 40_000)
    assert status == 415 and b"connection: close" in headers


def test_more_connections_than_allowed(server):
    with_others = [server.connect() for _ in range(LIMITS["connections"])]
    try:
        status, headers, body = server.ask(head(start="GET /version HTTP/1.1"))
        assert status == 503 and b"retry-after: 1" in headers and json.loads(body)["error"]["type"] == "server_error"
    finally:
        for client in with_others:
            client.close()
    wait_until(lambda: server.ask(head("Connection: close\r\n", "GET /health HTTP/1.1"))[0] == 200)


def test_sigterm_ends_after_the_answers(own_server):
    process, client = own_server.process, own_server.connect()
    client.sendall(request("drain", stream=True))
    data = read(client, until=b"before ")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "draining\n"
    status, headers, _ = own_server.ask(request("Hello", "Connection: close\r\n"))
    assert status == 503 and b"retry-after: 5" in headers
    assert own_server.ask(head("Connection: close\r\n", "GET /ready HTTP/1.1"))[0] == 503
    process.stdin.write("end answers\n")
    process.stdin.flush()
    data += read(client)
    assert b"after" in data and data.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    assert process.wait(30) == 0


def test_a_second_signal_ends_at_once(own_server):
    process, client = own_server.process, own_server.connect()
    client.sendall(request("hold", stream=True))
    read(client, until=b"end")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT


def test_small_writes_are_sent_at_once():
    """Nagle's algorithm would wait for the client to acknowledge the headers, which takes it 40 ms."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
