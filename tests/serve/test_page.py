"""The chat page in headless Chromium, against a stand-in of the server's API."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llava_jax.serve.app import PAGE, PAGE_POLICY, page_files
from llava_jax.serve.errors import ApiError
from llava_jax.serve.limits import Limits

CHROMIUM = shutil.which("chromium")
PICTURE = PAGE / "examples/1.jpg"
TIMEOUT = 20_000  # milliseconds; a busy machine needs them
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class StandIn:
    """A server with the API's shapes. The last question names what it does."""

    def __init__(self):
        self.requests = []
        self.left = threading.Event()  # set when the client leaves an answer that does not end
        self.lose = threading.Event()  # the connection of the answer to "lost"
        app = Starlette(routes=[
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/{path:path}", self.file),
        ])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "StandIn":
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    async def file(self, request) -> Response:
        content, kind = page_files(PAGE)["/" + request.path_params["path"]]
        return Response(content, headers={"Content-Type": kind, "Content-Security-Policy": PAGE_POLICY})

    async def models(self, request) -> JSONResponse:
        names = ("llava", "llava-birds")
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def chat(self, request) -> Response:
        body = await request.json()
        self.requests.append(body)
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1].get("text", "")
        is_first = sum(body == other for other in self.requests) == 1
        if question.startswith("status ") and is_first:
            error = ApiError(int(question.split()[1]), "Not this one.")
            headers = {"Retry-After": "1"} if error.status == 429 else {}
            return JSONResponse(error.body(), error.status, headers)
        pictures = json.dumps(body["messages"]).count('"image_url": {')
        answer = f" Pictures: {pictures}. Heard: {question}"
        if not body.get("stream"):
            message = {"role": "assistant", "content": answer}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
            return JSONResponse(completion)
        return StreamingResponse(self.events(question, answer, is_first), media_type="text/event-stream")

    async def events(self, question: str, answer: str, is_first: bool):
        def event(delta: dict, reason=None, **fields):
            choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
            return f"data: {json.dumps({'choices': choices, 'usage': None} | fields)}\n\n"

        yield event({"role": "assistant", "content": ""})
        for word in answer.split(" ")[1:]:
            yield event({"content": " " + word})
        if question == "never ends":
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()
        if question == "cut":
            return
        if question == "lost" and is_first:
            await asyncio.to_thread(self.lose.wait)
            raise ConnectionError
        yield event({}, "length" if question == "long" else "stop")
        yield event({}, choices=[], usage={"prompt_tokens": 20, "completion_tokens": len(answer.split())})
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def server():
    with StandIn() as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, models: int = 2, **options):
    """A page whose console stays free of errors and CSP violations. Failed requests are allowed."""
    context = browser.new_context(**{"locale": "en-GB"} | options)
    context.set_default_timeout(TIMEOUT)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning")
            and "Failed to load resource" not in message.text else None)
    page.goto(url)
    expect(page.locator("#model option")).to_have_count(models)
    yield page
    context.close()
    assert not problems


@pytest.fixture
def page(browser, server):
    server.requests.clear()
    with opened(browser, server.url) as page:
        yield page


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Ask a question").fill(question)
    page.get_by_role("button", name="Send").click()


def answers(page: Page):
    return page.locator(".answer .text")


def choose(page: Page, files: dict[str, bytes]) -> None:
    page.locator("#files").set_input_files([
        {"name": name, "mimeType": "image/" + name.rpartition(".")[2].replace("jpg", "jpeg"), "buffer": content}
        for name, content in files.items()])


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(out, kind)
    return out.getvalue()


def data_url(request: dict) -> str:
    return request["messages"][0]["content"][0]["image_url"]["url"]


def test_whole_chat(page, server):
    choose(page, {"1.jpg": PICTURE.read_bytes(), "b.png": encoded("PNG")})
    expect(page.locator("#pictures img")).to_have_count(2)
    page.get_by_role("button", name="Remove b.png").click()
    ask(page, "What is <b>this</b>?")
    expect(answers(page)).to_have_text(["Pictures: 1. Heard: What is <b>this</b>?"])
    expect(page.locator(".stats")).to_contain_text("prompt 20 tokens")
    set_up(page, "System prompt", "Be brief.")
    set_up(page, "Maximum tokens", "64")
    page.get_by_label("Model").select_option("llava-birds")
    page.locator("#files").set_input_files([PICTURE])
    ask(page, "And this?")
    expect(answers(page).nth(1)).to_have_text("Pictures: 2. Heard: And this?")

    first, second = server.requests
    assert first["model"] == "llava" and first["stream"] and first["stream_options"] == {"include_usage": True}
    assert base64.b64decode(data_url(first).removeprefix("data:image/jpeg;base64,")) == PICTURE.read_bytes()
    assert (second["model"], second["max_tokens"]) == ("llava-birds", 64)
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Pictures: 1. Heard: What is <b>this</b>?"

    page.get_by_role("textbox", name="Ask a question").fill("a draft")
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_role("textbox", name="Ask a question")).to_have_value("a draft")
    expect(page.locator(".images img")).to_have_count(2)


def test_stop_and_answer_again(page, server):
    ask(page, "never ends")
    expect(answers(page)).to_have_text(["Pictures: 0. Heard: never ends"])
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert server.left.wait(TIMEOUT / 1000)
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text(["Pictures: 0. Heard: never ends"])
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert len(server.requests) == 2 and server.requests[0] == server.requests[1]
    ask(page, "long")
    expect(page.locator(".note").nth(1)).to_have_text("Cut off at the maximum number of tokens.")


def test_edit_an_earlier_question(page, server):
    page.get_by_role("button", name="How many yellow").click()
    expect(page.locator(".stats")).to_have_count(1)
    ask(page, "two")
    expect(page.locator(".stats")).to_have_count(2)
    question = page.get_by_role("textbox", name="Ask a question")
    question.fill("half a thought")
    page.get_by_role("button", name="Edit this question").first.click()
    expect(question).to_have_value("How many yellow objects are there?")
    expect(page.locator("#pictures img")).to_have_count(1)
    question.press("Escape")
    expect(question).to_have_value("half a thought")
    page.get_by_role("button", name="Edit this question").first.click()
    ask(page, "How many crosses?")
    expect(answers(page)).to_have_text(["Pictures: 1. Heard: How many crosses?"])
    expect(question).to_have_value("half a thought")
    assert len(server.requests[-1]["messages"]) == 1


def test_clear_and_undo(page):
    ask(page, "one")
    expect(page.locator(".stats")).to_have_count(1)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="Ask about your pictures")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text(["Pictures: 0. Heard: one"])


def test_pictures_that_cannot_be_sent_as_they_are(page, server):
    choose(page, {"a.jpg": b"no picture", "b.bmp": encoded("BMP")})
    expect(page.locator("#pictures img")).to_have_count(1)
    expect(page.locator("#notice")).to_have_text(re.compile("“a.jpg” cannot be opened as a picture"))
    ask(page, "What?")
    expect(page.locator(".stats")).to_have_count(1)
    picture = Image.open(io.BytesIO(base64.b64decode(data_url(server.requests[0]).partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (30, 20))


def test_limits_are_the_servers():
    source = re.search(r"const LIMITS = (\{.*?\});", (PAGE / "page.js").read_text(encoding="utf-8"))[1]
    limits = {name: eval(value) for name, value in re.findall(r"(\w+): ([\d_* ]+)", source)}
    assert len(limits) == 3 and limits.items() <= asdict(Limits()).items()


def test_drop_and_paste(page):
    send = """([type, field, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], type + ".png", {type: "image/png"}));
        const event = new Event(type, {bubbles: true, cancelable: true});
        document.body.dispatchEvent(Object.assign(event, {[field]: data}));
    }"""
    for kind, field in (("dragover", "dataTransfer"), ("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(send, [kind, field, list(encoded("PNG"))])
        assert page.locator("#drop").is_visible() == (kind == "dragover")
    expect(page.locator("#pictures img")).to_have_count(2)


def test_lost_server(page, server):
    ask(page, "lost")
    expect(answers(page)).to_have_text(["Pictures: 0. Heard: lost"])
    server.lose.set()
    expect(page.locator(".error")).to_contain_text("The connection to the server was lost.")
    expect(answers(page)).to_have_text(["Pictures: 0. Heard: lost"])
    page.context.set_offline(True)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".error")).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".stats")).to_have_count(1)
    ask(page, "cut")
    expect(page.locator(".error")).to_contain_text("The connection to the server was lost.")


def test_refusals(page):
    for number, (status, text) in enumerate({
        400: "The server refused the request: Not this one.", 401: "The server asks for its key.",
        413: "The request is too large", 429: "The server is busy. Trying again in 1 s.",
        500: "could not finish the answer: Not this one.", 503: "The server is starting or shutting down.",
    }.items(), start=1):
        ask(page, f"status {status}")
        expect(page.locator(".error, .note")).to_contain_text(text)
        if status in (400, 413):
            page.locator(".error").get_by_role("button", name="Edit this question").click()
            page.get_by_role("button", name="Send").click()
        elif status != 429:  # the page itself tries that again
            page.get_by_role("button", name="Try again").click()
        expect(page.locator(".stats")).to_have_count(number)
        expect(page.locator(".error, .note")).to_have_count(0)


def test_keyboard_alone(page, server):
    press = page.keyboard.press
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    press("Enter")
    expect(page.locator(".stats")).to_have_count(1)
    expect(page.locator("#announce")).to_have_text("Pictures: 0. Heard: one two")
    assert server.requests[0]["messages"][-1]["content"] == "one\ntwo"
    page.locator("#model").focus()
    names = []
    for _ in range(11):
        press("Tab")
        name, outline = page.evaluate("""() => {
            const element = document.activeElement;
            return [element.ariaLabel || element.textContent, getComputedStyle(element).outline];
        }""")
        names.append(name)
        assert "solid 2px" in outline or name == "Ask a question"  # the box around the text area shows its focus
    assert names == ["New chat", "Use from a program", "Settings", "Switch between light and dark", "한국어로 보기",
                     "Edit this question", "Copy the answer", "Answer again", "Ask a question", "Add pictures", "Send"]
    page.get_by_role("button", name="Settings").focus()
    press("Enter")
    page.get_by_label("Temperature").focus()
    press("Home")
    press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.locator("#question").focus()
    page.keyboard.type("never ends")
    press("Enter")
    expect(answers(page).nth(1)).to_have_text("Pictures: 0. Heard: never ends")
    press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert server.requests[-1]["temperature"] == 0


def test_korean_on_a_phone_in_both_themes(browser, server):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    server.requests.clear()
    with opened(browser, server.url, locale="ko-KR", color_scheme="dark", **phone) as page:
        expect(page.get_by_role("heading", name="사진에 대해 물어보세요")).to_be_visible()
        english, korean = page.evaluate(
            "import('/strings.js').then(({STRINGS}) => [STRINGS.en, STRINGS.ko].map(Object.keys))")
        assert sorted(english) == sorted(korean)
        assert_fits_and_is_legible(page)
        page.locator("#files").set_input_files([PICTURE] * 4)
        page.get_by_role("textbox", name="질문을 입력하세요").fill("status 503 " + "아주긴질문" * 30)
        page.get_by_role("button", name="보내기").tap()
        expect(page.locator(".error")).to_contain_text("서버가 시작 중이거나 종료 중입니다.")
        assert_fits_and_is_legible(page)
        page.get_by_role("button", name="밝은 화면/어두운 화면").tap()
        assert_fits_and_is_legible(page)
        page.get_by_role("button", name="밝은 화면/어두운 화면").tap()
        page.get_by_role("button", name="다시 시도").tap()
        expect(page.locator(".stats")).to_contain_text("초당")
        assert_fits_and_is_legible(page)
        for name in ("코드로 사용하기", "설정"):
            page.get_by_role("button", name=name).tap()
            assert_fits_and_is_legible(page)
            page.get_by_role("button", name="닫기").tap()
        page.get_by_role("button", name="Switch to English").tap()
        page.get_by_role("button", name="Switch between light and dark").tap()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        assert_fits_and_is_legible(page)
        page.reload()
        expect(page.get_by_role("button", name="Add pictures")).to_be_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground


def assert_fits_and_is_legible(page: Page) -> None:
    """Nothing scrolls sideways, and all visible text has the contrast that WCAG's level AA asks for."""
    wide, pale = page.evaluate("""() => {
        const channel = value => value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
        const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const rgb = text => text.match(/[\\d.]+/g).map(Number);
        const ground = element => {
            const colour = rgb(getComputedStyle(element).backgroundColor);
            return colour[3] === 0 ? ground(element.parentElement) : colour;
        };
        const contrast = element => {
            const lights = [rgb(getComputedStyle(element).color), ground(element)].map(luminance);
            return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
        };
        const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        const all = [...document.querySelectorAll("body, body *")].filter(element => element.checkVisibility());
        const isWide = element => element.clientWidth && element.scrollWidth > element.clientWidth + 1;
        return [all.filter(element => isWide(element) && getComputedStyle(element).overflowX !== "hidden"),
                all.filter(element => hasText(element) && contrast(element) < 4.5)]
            .map(elements => elements.map(element => element.outerHTML.slice(0, 80)));
    }""")
    assert not wide and not pale
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_copied_programs_send_the_same_request(page, server, tmp_path, monkeypatch, capsys):
    large = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(large, "PNG")
    name = "it's $(touch owned) `touch owned`.png"
    (tmp_path / name).write_bytes(large.getvalue())
    choose(page, {"1.jpg": PICTURE.read_bytes(), name: large.getvalue()})
    question = "Say $HOME, `id`, \\n \"é\" 그림 and\nEND\n'''"
    ask(page, question)
    expect(page.locator(".stats")).to_have_count(1)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Use from a program").click()
    programs = {}
    for kind in ("curl", "Python"):
        page.get_by_role("button", name=kind, exact=True).click()
        page.get_by_role("button", name="Copy", exact=True).click()
        programs[kind] = page.evaluate("navigator.clipboard.readText()")
    sent = server.requests[0]
    del sent["stream"], sent["stream_options"]
    monkeypatch.chdir(tmp_path)
    exec(programs["Python"], {})
    assert question in capsys.readouterr().out
    if shutil.which("curl"):
        reply = subprocess.run(["bash", "-c", programs["curl"]], capture_output=True, check=True, timeout=20)
        assert question in json.loads(reply.stdout)["choices"][0]["message"]["content"]
    assert len(server.requests) >= 2 and all(request == sent for request in server.requests)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
def test_whole_chat_with_the_server(browser, talker):
    command = [sys.executable, "-m", "llava_jax.serve", talker, "--port", "0", "--slots", "2"]
    environment = os.environ | {"LLAVA_JAX_API_KEY": "open"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = process.stdout.readline().split()[-1]
        with opened(browser, url.replace("//", "//anyone:open@"), models=1) as page:
            expect(page.locator("#model-name")).to_have_text("model")
            set_up(page, "Maximum tokens", "16")
            page.get_by_role("button", name="How many yellow").click()
            expect(page.locator(".stats")).to_contain_text("16 tokens")
            ask(page, "And <image> now?")
            expect(page.locator(".note")).to_have_text(["Cut off at the maximum number of tokens."] * 2)
            set_up(page, "System prompt", "word " * 400)
            page.get_by_role("button", name="Answer again").click()
            expect(page.locator(".error")).to_contain_text("No room is left for an answer.")
            process.kill()
            ask(page, "And now?")
            expect(page.locator(".error").last).to_contain_text("The server cannot be reached.")
    finally:
        process.kill()
        process.communicate()


def set_up(page: Page, field: str, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(field).fill(value)
    page.keyboard.press("Escape")
