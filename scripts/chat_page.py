"""Draws the chat page's example pictures, or takes a screenshot of a chat with a running server.

    python scripts/chat_page.py draw
    python -m llava_jax.serve runs/mini/model --port 8000 &
    python scripts/chat_page.py screenshot http://127.0.0.1:8000

The pictures are scenes of the miniature, drawn with fixed seeds at 240 x 240 pixels. The screenshot needs playwright
and a Chromium: Debian's if it is there, else playwright's own.
"""

import argparse
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.annotations import drawn_scenes

SERVE = Path(__file__).parent.parent / "llava_jax/serve"
SEEDS = (0, 11, 12, 23)  # scenes that differ in colours, shapes and background
SCALE = 4  # drawn larger than the miniature sees them, so that they are sharp on the page
QUESTIONS = ("How many yellow objects are there?", "Where is the cross?", "What colour is the large square?")


def draw() -> None:
    """Writes the example pictures into the page's folder."""
    for number, seed in enumerate(SEEDS, start=1):
        rng = random.Random(seed)
        objects = tuple(replace(each, x=SCALE * each.x, y=SCALE * each.y, radius=SCALE * each.radius)
                        for each in drawn_scenes.sample(rng))
        side = SCALE * drawn_scenes.SIZE
        picture = drawn_scenes.render(objects, rng, np.random.default_rng(seed), (side, side))
        path = SERVE / f"page/examples/{number}.jpg"
        picture.resize((160, 160), Image.Resampling.LANCZOS).save(path, quality=75, optimize=True)
        print(f"{path}: {drawn_scenes.captions(objects)[0]}")


def screenshot(url: str, out: Path) -> None:
    """Asks about the second example and writes a picture of the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 860})
        page.goto(url)
        page.get_by_role("button", name=QUESTIONS[0]).click()
        for number, question in enumerate(QUESTIONS, start=1):
            if number > 1:
                page.get_by_role("textbox").fill(question)
                page.get_by_role("textbox").press("Enter")
            page.locator(".stats").nth(number - 1).wait_for()
        page.screenshot(path=out)
        browser.close()


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
