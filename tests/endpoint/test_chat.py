"""The client of one chat against a scripted server: what it sends, and every way in which an answer can fail."""

import base64
import http.server
import io
import json
import socket
import struct
import threading

import pytest
from PIL import Image

from llava_jax import generate
from llava_jax.endpoint.chat import AnswerLost, ChatClient, StreamedAnswer
from llava_jax.errors import UserError

KEY = "sk-0123456789abcdef"


def event(value):
    return f"data: {json.dumps(value)}\n\n".encode()


def piece(text, reason=None):
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
DONE = b"data: [DONE]\n\n"
WHOLE = [b": a comment\n\n", piece("a"), piece("é\n", "stop"), USAGE, DONE]


class Server:
    """Answers POSTs by a script: (status, headers, chunks); a chunk None resets the connection."""

    def __init__(self):
        self.script, self.asked, self.keys, self.left = [], [], [], threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.keys.append(self.headers["Authorization"])
                self.reply(200, {}, [json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode()])

            def do_POST(self):
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.reply(*outer.script.pop(0))

            def reply(self, status, headers, chunks):
                self.send_response(status)
                for name, value in ({"Transfer-Encoding": "chunked"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for chunk in chunks:
                        if chunk is None:
                            self.close_connection = True
                            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            self.connection.close()
                            return
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    self.close_connection = True
                    outer.left.set()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("LLAVA_JAX_API_KEY", raising=False)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? <image>"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image"}]}]


def test_a_whole_answer(server, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_API_KEY", KEY)
    server.script = [(200, {}, WHOLE)] * 2
    chat = ChatClient(server.url + "/v1/")
    assert (chat.model, server.keys) == ("first", [f"Bearer {KEY}"])
    images = ["data:1", "data:2"]
    answer = chat.generate(QUESTION, images, max_new_tokens=3, temperature=0.5, stop=("x",), seed=4)
    assert answer == StreamedAnswer("aé\n", "stop", 7, 2)
    assert list(chat.stream(QUESTION, images)) == ["a", "é\n"]
    body, plain = server.asked
    image = lambda url: {"type": "image_url", "image_url": {"url": url}}  # noqa: E731
    assert body["messages"] == [
        {"role": "user", "content": [image("data:1"), {"type": "text", "text": "What? <image>"}]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [{"type": "text", "text": "And"}, image("data:2")]}]
    assert {name: body[name] for name in ("model", "max_tokens", "temperature", "stop", "seed", "stream")} == {
        "model": "first", "max_tokens": 3, "temperature": 0.5, "stop": ["x"], "seed": 4, "stream": True}
    assert "stop" not in plain


@pytest.mark.parametrize("chunks, words", [
    ([piece("a")], "closed in the middle"),
    ([piece("a"), None], "broke off"),
    ([piece("a"), event({"error": {"message": "failed \x1b[31m"}})], "the answer broke off: failed \ufffd[31m"),
    ([piece("a"), b"data: {\n\n"], "no chat completion"),
    ([piece("a"), event({"choices": [3]})], "no chat completion"),
    ([piece("a"), b"data: \xff\n\n"], "no chat completion"),
    ([piece("a"), b"data: " + b"x" * 2**21], "no chat completion"),
], ids=str)
def test_an_answer_that_breaks_off_keeps_its_part(server, monkeypatch, capsys, chunks, words):
    server.script = [(200, {}, chunks), (200, {}, WHOLE)]
    lines = iter(["first", "second"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    assert generate.main(["--server", server.url, "--model", "second"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Type a message, or /help.\na\nerror: http://127.0.0.1") and words in printed
    assert printed.endswith("aé\n\n") and printed.count("\n") == 5
    assert [message["content"] for message in server.asked[1]["messages"]] == ["first", "a", "second"]


@pytest.mark.parametrize("status, reply, words", [
    (401, "", "wants an API key; set LLAVA_JAX_API_KEY"),
    (404, '{"error": {"message": "no model x"}}', "answers 404: no model x"),
    (400, r'{"error": {"message": "too\nlong"}}', "answers 400: too long"),
    (500, "<html>", "answers 500: <html>"),
    (302, "", "answers 302: no reason given"),
], ids=str)
def test_refusals_are_one_line(server, status, reply, words):
    server.script = [(status, {}, [reply.encode()] if reply else [])]
    with pytest.raises(UserError) as error:
        ChatClient(server.url).generate(QUESTION[:1], ["data:"])
    assert words in str(error.value) and "\n" not in str(error.value) and not isinstance(error.value, AnswerLost)


def test_a_busy_server_is_asked_again_after_its_time(server, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.script = [(429, {"Retry-After": "7"}, []), (429, {"Retry-After": "2"}, []), (200, {}, WHOLE)]
    assert ChatClient(server.url).generate(QUESTION[2:], ["data:"]).text == "aé\n"
    assert waits == [7, 2] and "the server is busy; asking again in 7 s" in capsys.readouterr().err
    server.script = [(429, {"Retry-After": "999"}, [])]
    with pytest.raises(UserError, match="answers 429"):
        ChatClient(server.url).generate(QUESTION[2:], ["data:"])
    assert waits == [7, 2]


def test_closing_the_stream_closes_the_connection(server):
    server.script = [(200, {}, [piece("a")] + [piece("b" * 10**6)] * 50)]
    stream = ChatClient(server.url).stream(QUESTION[2:], ["data:"])
    assert next(stream) == "a"
    stream.close()
    assert server.left.wait(30)


def test_the_key_is_never_shown(server, monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_API_KEY", KEY)
    server.script = [(403, {}, [json.dumps({"error": {"message": f"not {KEY}"}}).encode()]), (401, {}, [])]
    chat = ChatClient(server.url)
    with pytest.raises(UserError, match=r"answers 403: not \*\*\*"):
        chat.generate(QUESTION[2:], ["data:"])
    with pytest.raises(UserError, match="refuses the key in LLAVA_JAX_API_KEY"):
        chat.generate(QUESTION[2:], ["data:"])


def test_an_unknown_model_is_named_with_the_known(server):
    with pytest.raises(UserError, match="has no model 'third'; it has first, second"):
        ChatClient(server.url, "third")


def test_one_answer_as_json(server, tmp_path, capsys):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.bmp")
    Image.new("RGB", (3, 2), "red").save(tmp_path / "b.jpg")
    server.script = [(200, {}, WHOLE)]
    args = ["--prompt", "Hi", "--json", "--image", str(tmp_path / "a.bmp"), str(tmp_path / "b.jpg")]
    assert generate.main(["--server", server.url, *args]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("seconds") >= 0
    assert shown == {"text": "aé\n", "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 2}
    *images, text = server.asked[0]["messages"][0]["content"]
    heads, files = zip(*(image["image_url"]["url"].split(",") for image in images), strict=True)
    assert heads == ("data:image/png;base64", "data:image/jpeg;base64") and text == {"type": "text", "text": "Hi"}
    assert Image.open(io.BytesIO(base64.b64decode(files[0]))).getpixel((0, 0)) == (255, 0, 0)
    assert base64.b64decode(files[1]) == (tmp_path / "b.jpg").read_bytes()
    with pytest.raises(UserError, match=r"c\.mp4: a server takes no videos"):
        generate.data_url("c.mp4")
