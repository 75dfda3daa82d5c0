"""Draws the chat page's example pictures, or takes a screenshot of a chat with a running server.

    python scripts/chat_page.py draw
    python -m llava_jax.serve runs/mini_korean/model --name mini_korean --port 8000 &
    python scripts/chat_page.py screenshot http://127.0.0.1:8000

The pictures are scenes of the miniature, drawn with fixed seeds at 240 x 240 pixels. The screenshot needs playwright
and a Chromium: Debian's if it is there, else playwright's own.
"""

import argparse
import io
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.annotations import drawn_scenes

SERVE = Path(__file__).parent.parent / "llava_jax/serve"
SEEDS = (0, 11, 12, 23)  # scenes that differ in colours, shapes and background
SCALE = 4  # drawn larger than the miniature sees them, so that they are sharp on the page
VIEWS = (  # (options of the browser, number of the example, further questions)
    ({"viewport": {"width": 820, "height": 800}, "locale": "en", "color_scheme": "light"},
     2, ("Where is the cross?", "What colour is the object at the centre?")),
    ({"viewport": {"width": 360, "height": 800}, "locale": "ko", "color_scheme": "dark"},
     1, ("초록색 삼각형은 어디에 있나요?", "십자는 무슨 색인가요?")),
)


def draw() -> None:
    """Writes the example pictures into the page's folder."""
    for number, seed in enumerate(SEEDS, start=1):
        rng = random.Random(seed)
        objects = drawn_scenes.sample(rng)
        picture = drawn_scenes.render(objects, rng, np.random.default_rng(seed), enlarge=SCALE)
        path = SERVE / f"page/examples/{number}.jpg"
        picture.resize((160, 160), Image.Resampling.LANCZOS).save(path, quality=75, optimize=True)
        print(f"{path}: {drawn_scenes.captions(objects)[0]}")


def screenshot(url: str, out: Path) -> None:
    """Asks about two examples, in a window and on a phone in Korean, and writes one picture of both pages."""
    from playwright.sync_api import sync_playwright

    pictures = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for options, example, questions in VIEWS:
            page = browser.new_page(**options)
            page.goto(url)
            page.locator("#examples button").nth(example - 1).click()
            page.locator(".stats").wait_for()
            for number, question in enumerate(questions, start=1):
                page.locator("#question").fill(question)
                page.locator("#question").press("Enter")
                page.locator(".stats").nth(number).wait_for()
            pictures.append(Image.open(io.BytesIO(page.screenshot())))
        browser.close()
    width, height = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    both = Image.new("RGB", (width, height))
    for index, picture in enumerate(pictures):
        both.paste(picture, (sum(other.width for other in pictures[:index]), 0))
    both.quantize(256).save(out, optimize=True)  # half of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draw")
    command = commands.add_parser("screenshot")
    command.add_argument("url")
    command.add_argument("--out", type=Path, default=SERVE / "chat.png")
    args = parser.parse_args()
    draw() if args.command == "draw" else screenshot(args.url, args.out)


if __name__ == "__main__":
    main()
