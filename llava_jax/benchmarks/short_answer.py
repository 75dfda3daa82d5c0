"""Questions about pictures whose answer is a word: accuracy by kind, and the same with the wrong picture."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_jax.inference.llava import Llava, Request

LONGEST_ANSWER = 8  # tokens; an answer that is longer is wrong in any case


@dataclass(frozen=True)
class Result:
    """A question, the answer that counts as right, and the model's."""

    image: str
    question: str
    kind: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        return normal(self.answer) == normal(self.expected)


def normal(answer: str) -> str:
    """An answer without capitals, outer blanks and final full stop."""
    return answer.strip().rstrip(".").lower()


def read_questions(path: str | Path) -> list[dict]:
    """JSON lines of {image, text, answer, kind}; ValueError naming the line if one is not."""
    questions = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            questions.append({key: row[key] for key in ("image", "text", "answer", "kind")})
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}, line {number}: not a question with image, text, answer and kind ({error})"
            raise ValueError(message) from None
    return questions


def ask(llava: Llava, questions: Sequence[dict], image_root: str | Path, *, blind: bool = False,
        batch_size: int = 64) -> list[Result]:
    """Puts every question to the model by itself, greedily. `blind` shows it the next picture of the list instead."""
    images = sorted({question["image"] for question in questions})
    shown = dict(zip(images, images[1:] + images[:1], strict=True)) if blind else {image: image for image in images}
    requests = [Request(question["text"], [Path(image_root) / shown[question["image"]]], max_new_tokens=LONGEST_ANSWER)
                for question in questions]
    answers = llava.batch(requests, batch_size=batch_size)
    return [Result(question["image"], question["text"], question["kind"], question["answer"], answer.text)
            for question, answer in zip(questions, answers, strict=True)]


def accuracy(results: Sequence[Result]) -> dict[str, float]:
    """Share of right answers, `overall` and by kind, 0..1."""
    kinds = defaultdict(list)
    for result in results:
        kinds["overall"].append(result.right)
        kinds[result.kind].append(result.right)
    return {kind: round(sum(right) / len(right), 4) for kind, right in kinds.items()}
