"""Who answers: a language model that is shown prompts, or rules.

Both make a request of a kind and an image, and all that they go by is in the request, whose hash is the name of its
answer in the log. `questions` are those that detailed descriptions answer.
"""

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any

from llava_jax.annotations.context import Box, Context
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.synthesize.prompts import Prompts, read_questions
from llava_jax.synthesize.rules import RulesTeacher


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A language model behind an endpoint: the requests alone; `endpoint` asks them."""

    model: str
    prompts: Prompts
    parameters: dict[str, Any]

    @property
    def questions(self) -> tuple[str, ...]:
        return self.prompts.questions("detail_description")

    @property
    def prompts_hash(self) -> str:
        return self.prompts.hash

    def request(self, kind: str, context: Context, attempt: int = 0) -> ChatRequest:
        return ChatRequest(self.prompts.messages(kind, context), self.parameters, attempt)


class Rules:
    """The rules as a teacher. Its request holds the image as JSON, so that nothing but the request decides."""

    prompts_hash = ""

    def __init__(self, language: str, seed: int, questions: str):
        self._rules = RulesTeacher(language=language, seed=seed)
        self._parameters = {"language": language, "seed": seed}
        self.model = self._rules.model
        self.questions = read_questions("detail_description", language, file=questions)

    def check(self, categories: Iterable[str]) -> None:
        """Raises UserError, one line, if one of these has no name in the language."""
        self._rules.check(categories)

    def request(self, kind: str, context: Context, attempt: int = 0) -> ChatRequest:
        image = json.dumps(dataclasses.asdict(context), ensure_ascii=False)
        return ChatRequest(({"role": "system", "content": kind}, {"role": "user", "content": image}), self._parameters,
                       attempt)

    async def ask(self, request: ChatRequest, lost: object = None) -> Response:
        kind, image = (message["content"] for message in request.messages)
        fields = json.loads(image)
        boxes = tuple(Box(**box) for box in fields["boxes"])
        context = Context(fields["id"], fields["image"], tuple(fields["captions"]), boxes)
        return Response(self._rules.reply(kind, context), "stop", 0, 0, 0, self.model, None, int(time.time()))
