"""The API key is hidden wherever a server repeats it."""

import base64
import html
import json
import re
import urllib.parse
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI, Response, error
from synthesis_data import answer_messages, write_images, write_prompts

from llava_jax.endpoint import batch
from llava_jax.endpoint.secret import HIDDEN, Secret
from llava_jax.errors import UserError
from llava_jax.synthesize import __main__ as synthesize

KEY = "sk-proj-Zq7_hT2-wLm9XcV4+bN/8=kRj0"
ESCAPED = "".join(f"\\u{ord(character):04x}" for character in KEY)


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


FORMS = {
    "plain": KEY,
    "Bearer": f"Bearer {KEY}",
    "its first half": KEY[:17],
    "its second half": KEY[17:],
    "small letters": KEY.lower(),
    "in a URL": urllib.parse.quote(KEY, safe=""),
    "all percent": "".join(f"%{ord(character):02X}" for character in KEY),
    "HTML": KEY.replace("/", "&#x2F;")[:16],
    "JSON": json.dumps(KEY),
    "all escaped": ESCAPED,
    "base64": base64_of(KEY),
    "Basic": base64_of(f"user:{KEY}"),
    "Basic without a name": base64_of(f":{KEY}"),
    "Basic as the name": base64_of(f"{KEY}:"),
    "hexadecimal": KEY.encode().hex(),
    "hexadecimal with colons": KEY.encode().hex(":").upper(),
    "a dump": KEY.encode().hex(" "),
    "all of Python's escapes": "".join(f"\\x{byte:02x}" for byte in KEY.encode()),
    "all HTML": "".join(f"&#{byte};" for byte in KEY.encode()),
    "all HTML in hexadecimal": "".join(f"&#x{byte:X};" for byte in KEY.encode()),
    "twice": KEY + KEY,
}


def gives_away(text: str) -> bool:
    """Whether a reader finds twelve characters of the key in a row, however they are written."""
    texts = [text, urllib.parse.unquote(text), text.replace("\\u00", "%")]
    texts += [urllib.parse.unquote(texts[-1]), urllib.parse.unquote(text.replace("\\x", "%")), html.unescape(text)]
    dumps = re.findall("(?:[0-9a-fA-F]{2} )+", f"{text} ".replace(":", " "))
    texts += [bytes.fromhex(dump).decode("latin-1") for dump in dumps]
    for words in list(texts):
        for word in words.replace('"', " ").replace("=", " ").replace(",", " ").split():
            for start in range(4):
                piece = word[start:]
                for decode in (lambda p: base64.b64decode(p[: len(p) // 4 * 4]), bytes.fromhex):
                    try:
                        texts.append(decode(piece).decode("latin-1"))
                    except ValueError:
                        continue
    return any(KEY[at : at + 12].lower() in text.lower() for text in texts for at in range(len(KEY) - 11))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    text = f"the answer {FORMS[form]} ends."
    assert gives_away(text) and not gives_away(Secret(KEY).hide(text))
    assert Secret(KEY).hide(text).startswith("the answer ") and Secret(KEY).hide(text).endswith(" ends.")
    assert HIDDEN in Secret(KEY).hide(text)


def test_what_is_no_key_stays():
    text = "A person of proj-size knows sk- and base64 " + base64_of("another text that is long enough")
    assert Secret(KEY).hide(text) == text
    for key in (None, "", "none", "EMPTY"):  # a word that local servers want
        assert Secret(key).hide("none is EMPTY") == "none is EMPTY"
    value = {"a": [1, "x", None, {"b": 1.5}]}
    assert Secret(KEY).hide_value(value) is value and Secret(KEY).hide_body(b"\xff\xfe") == b"\xff\xfe"


def test_bodies():
    secret = Secret(KEY)
    assert json.loads(secret.hide_body(b'{"' + ESCAPED.encode() + b'": ["x", "' + KEY.encode() + b'"]}')) == {
        HIDDEN: ["x", HIDDEN]}
    assert secret.hide_body(b"\xff" + KEY.encode() + b"\xfe") == b"\xff" + HIDDEN.encode() + b"\xfe"


class Parrot(FakeOpenAI):
    """Repeats the key in all that it says."""

    def complete(self, body, fault=None):
        said = super().complete(body, fault)
        form = list(FORMS.values())[len(self.bodies) % len(FORMS)]
        choice = said["choices"][0]
        choice["message"]["content"] += f"\n{form}"
        if len(self.bodies) % 3 == 0:
            choice["message"]["content"] = form  # which cannot be read, so that it is rejected
        choice["finish_reason"] = f"stop {KEY}" if len(self.bodies) % 5 == 0 else "stop"
        return said | {"model": f"m {KEY}", "system_fingerprint": KEY, "id": KEY, KEY: KEY}

    async def respond(self, method, path, headers, body):
        assert headers.get("authorization") == f"Bearer {KEY}"
        response = await super().respond(method, path, headers, body)
        if response is not None:
            response.headers |= {"x-request-id": KEY, "set-cookie": f"key={KEY}"}
            if b'"validating"' in response.body or b'"in_progress"' in response.body:
                response.body = response.body.replace(b'"metadata": null', f'"metadata": {{"k": "{KEY}"}}'.encode())
        return response


async def refuses(self, body):
    """Errors of all kinds, all with the key."""
    number = next(self.numbers)
    words = f"Incorrect API key {list(FORMS.values())[number % len(FORMS)]} " + "x" * (number % 7 * 40) + KEY
    return [error(400, words), error(500, words), Response(200, f"<html>{words}</html>".encode(), "text/html"),
            Response(200, json.dumps({"error": {"message": words}}).encode()), Response(200, KEY.encode()),
            Response(302, b"", headers={"location": f"http://{urllib.parse.quote(KEY)}:{KEY}/"}),
            Response(307, b"", headers={"location": f"/v1/chat/completions?key={urllib.parse.quote(KEY)}"}),
            error(422, words, KEY, KEY)][number % 8]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`synthesize run` with the key; gives the exit code, or the error, and what the terminal showed."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(batch, "MIN_POLL_SECONDS", 0.01)

    def synthesized(url: str, *more: str) -> tuple[int | str, str]:
        options = ["--data", str(write_images(tmp_path, 8)), "--out", str(tmp_path / "out"), "--model", "teacher",
                   "--base-url", url, "--prompts", str(write_prompts(tmp_path)), "--concurrency", "3", *more]
        try:
            code = synthesize.main(["run", *options])
        except UserError as error:
            code = str(error)
        return code, "".join(capsys.readouterr())

    return synthesized


def written(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text(errors="replace") for path in (folder / "out").rglob("*") if path.is_file()}


def check_hidden(folder: Path, told: str) -> None:
    files = written(folder)
    assert "answers.jsonl" in " ".join(files)
    for name, text in {"the terminal": told, **files}.items():
        for line in text.splitlines():
            assert not gives_away(line), (name, line)


@pytest.mark.parametrize("options", [(), ("--batch",)])
def test_a_server_that_repeats_the_key_puts_it_nowhere(tmp_path, run, options):
    fake = Parrot(answer=answer_messages, batch_polls=0)
    with fake.serve() as url:
        code, told = run(url, "--attempts", "1", *options)
    assert code == 0 and HIDDEN in (tmp_path / "out/answers.jsonl").read_text(), told
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["teacher"]["answered_by"].keys() == {f"m {HIDDEN}"}
    assert HIDDEN in (tmp_path / "out/rejected.jsonl").read_text()
    check_hidden(tmp_path, told)


def test_errors_that_repeat_the_key(tmp_path, run):
    class Rude(Parrot):
        _chat = refuses

    with Rude(answer=answer_messages).serve() as url:
        error, told = run(url, "--retries", "0")
    assert "requests in a row failed" in error and HIDDEN in error + told
    check_hidden(tmp_path, f"{error}\n{told}")


def test_a_password_in_the_address_is_not_written(tmp_path, run):
    with FakeOpenAI(answer=answer_messages).serve() as url:
        code, told = run(url.replace("//", f"//user:{KEY[:8]}@"))
    assert code == 0 and not any(KEY[:8] in text for text in [told, *written(tmp_path).values()])
    error, told = run(f"http://user:{KEY[:8]}@127.0.0.1:9/v1")
    assert "Connection error" in error and KEY[:8] not in error + told
