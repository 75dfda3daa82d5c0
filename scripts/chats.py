"""Prints three chats of the miniature about held-out scenes, in Markdown, as README.md shows them.

    python scripts/chats.py [--model runs/mini/model] [--data runs/mini/data] [--out scripts/chats]

The scenes are the first test pictures with two, three and four objects. The rules teacher draws the questions with a
fixed seed. The model gets the chat so far, including its own mistakes. The pictures are copied to --out for the README.
"""

import argparse
import random
import shutil
from pathlib import Path

import llava_jax
from llava_jax.annotations.scene import Scene
from llava_jax.synthesize import rules

SHORT_TURNS = 4  # number of short questions, before one that needs a comparison
SCENE_SIZES = (2, 3, 4)  # numbers of objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/mini/model")
    parser.add_argument("--data", type=Path, default=Path("runs/mini/data"))
    parser.add_argument("--out", type=Path, default=Path("scripts/chats"))
    args = parser.parse_args()
    contexts = rules.open_split(args.data, "test")
    llava = llava_jax.load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    for size in SCENE_SIZES:
        context = next(context for context in contexts if len(context.boxes) == size)
        scene = Scene(context)
        rng = random.Random(f"chat {size}")
        asked = rules.conversation(scene, rng, contexts.categories, SHORT_TURNS) + [rules.reasoning(scene, rng)]
        messages, lines = [], []
        for question in asked:
            messages.append({"role": "user", "content": question.question})
            answer = llava.generate(messages, [args.data / context.image], max_new_tokens=60).text.strip()
            messages.append({"role": "assistant", "content": answer})
            right = answer.rstrip(".").lower() == question.answer.rstrip(".").lower()
            lines.append(f"> **{question.question}** {answer}" + ("" if right else f" *(no: {question.answer})*"))
        picture = args.out / f"{size}.jpg"
        shutil.copyfile(args.data / context.image, picture)
        print(f'<img src="{picture.as_posix()}" width="150" alt="{context.captions[0]}">\n')
        print("\\\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
