"""Mistakes of the command's user: one line, and exit code 2."""

import socket

import pytest
from commands import run_command


@pytest.mark.parametrize("options, words", [
    (("missing",), "missing: no such directory"),
    (("MODEL", "--slots", 0), "--slots is 0: it must be at least 1"),
    (("MODEL", "--context", 385, "--port", 0), "--context is 385: the model's context has 384 tokens"),
    (("MODEL", "--port", 70000), "--port is 70000: it must be from 0 to 65535"),
    (("MODEL", "--host", "256.0.0.1"), "--host 256.0.0.1 --port 8000: "),
    (("MODEL", "--adapter", "dogs"), "--adapter dogs: expected NAME=DIR"),
    (("MODEL", "--adapter", "model=x"), "--adapter model=x: the name model is used twice"),
    (("MODEL", "--adapter", "dogs=missing", "--port", 0), "missing/adapter_config.json: "),
    (("MODEL", "--image-bytes", 0), "--image-bytes is 0: it must be above 0"),
    (("MODEL", "--fetch-hosts", "https://x", "--port", 0), "--fetch-hosts 'https://x': give a host name"),
    (("MODEL", "--mesh.fsdp", 64, "--port", 0), "mesh: data 1 x fsdp 64 x tensor 1 needs 64 devices"),
])
def test_mistakes_of_the_operator(talker, options, words):
    result = run_command("serve", *(talker if option == "MODEL" else option for option in options))
    assert result.code == 2 and result.err.splitlines()[-1].startswith("error: " + words) and not result.out


def test_a_port_in_use(talker):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_command("serve", talker, "--port", port)
    assert result.code == 2
    assert result.err == f"error: --host 127.0.0.1 --port {port}: Address already in use; choose others\n"
