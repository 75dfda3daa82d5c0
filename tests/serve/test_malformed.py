"""Malformed requests: the right status for each, in OpenAI's form, and a server that goes on as before."""

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import stand_ins
from malformed import Malformed, data_url, malformed, png
from starlette.testclient import TestClient

from llava_jax.images import ImageProcessor
from llava_jax.serve.app import make_app
from llava_jax.serve.limits import Limits
from llava_jax.serve.media import MediaLoader

LEAKS = re.compile(r"Traceback|/usr|/tmp|site-packages|\.py\b|object at|0x[0-9a-f]{6}|Error\b|Exception")
"""What no message shows: paths, exceptions, objects."""


def problem(case: Malformed, status: int | None, body: bytes) -> str:
    """Returns what is wrong with an answer, or nothing."""
    if status not in case.statuses:
        return f"{case.name}: {status}, not {case.statuses}: {body[:200]}"
    error = json.JSONDecoder().raw_decode(body.decode())[0]["error"]  # a second answer may follow
    if error.keys() != {"message", "type", "param", "code"} or case.param not in ("", error["param"]):
        return f"{case.name}: {error}, not {case.param}"
    return f"{case.name}: {error['message']}" if LEAKS.search(error["message"]) else ""


def test_a_sample_of_malformed_requests():
    """All that is not refused before the routes. No prompt reaches the scheduler."""
    scheduler = stand_ins.FakeScheduler()
    media = MediaLoader(Limits(), ImageProcessor(size=28, patches=2), False)
    app = make_app(stand_ins.FakeLlava(), scheduler, media, Limits(), {"base": 0}, stand_ins.CONTEXT)
    with TestClient(app, base_url="http://localhost") as client:
        problems = []
        for case in malformed(1, 150):
            if not case.raw:
                answer = client.request(case.method, case.target, content=case.body, headers=dict(case.headers))
                problems.append(problem(case, answer.status_code, answer.content))
        client.portal.call(media.close)
    assert not list(filter(None, problems)) and len(problems) > 100 and not scheduler.jobs


def send(port: int, data: bytes) -> tuple[int | None, bytes]:
    """Returns the status and the body of the answer to bytes on a connection of their own."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        answer = b""
        try:
            client.sendall(data)
        except ConnectionError:  # refused before its end
            pass
        try:
            while piece := client.recv(2**16):
                answer += piece
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else None), body


def counter(port: int, name: str) -> int:
    text = send(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[1].decode()
    return int(re.search(rf"^llava_jax_{name} (\d+)$", text, re.MULTILINE)[1])


@pytest.mark.slow
def test_malformed_requests_change_nothing(talker):
    """2,000, eight at a time, with good ones between them."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(png(9, 5))}}, {"type": "text", "text": "What is it?"}]
    good = {"messages": [{"role": "user", "content": parts}], "max_tokens": 10}
    asked = Malformed("good", json.dumps(good).encode(), (200,)).on_the_wire()
    answers = set()

    def ask(case: Malformed | None) -> str:
        if case:
            return problem(case, *send(port, case.on_the_wire()))
        status, body = send(port, asked)
        answers.add(json.dumps(json.loads(body)["choices"]))
        return "" if status == 200 else f"good: {status}"

    command = [sys.executable, "-m", "llava_jax.serve", talker, "--port", "0", "--slots", "4", "--receive-seconds", "2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        log = ThreadPoolExecutor(1).submit(server.stderr.read)
        ask(None)
        compiled = counter(port, "compilations_total")
        cases = [case for number, case in enumerate(malformed(2, 2000)) for case in (case, *[None][number % 20:])]
        with ThreadPoolExecutor(8) as clients:
            problems = list(filter(None, clients.map(ask, cases)))
        assert not problems, f"{len(problems)} problems:\n" + "\n".join(sorted(set(problems)))
        assert len(answers) == 1 and compiled == counter(port, "compilations_total") > 0
        assert counter(port, "busy_slots") == counter(port, "waiting") == counter(port, "failures_total") == 0
        assert server.poll() is None
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert "Traceback" not in log.result()
