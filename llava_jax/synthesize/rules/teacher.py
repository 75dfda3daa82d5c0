"""The rules teacher: facts of a scene, put into phrases that a seed draws."""

import dataclasses
import json
import random
import time
from collections.abc import Iterable

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Name, Scene, coloured_name
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.synthesize.rules.facts import Fact, description, inferences, questions
from llava_jax.synthesize.rules.phrases import PhraseTable

TURNS = (4, 7)
"""Minimum and maximum number of questions in a conversation, if the scene gives that many."""
REASONING_WORDS = 24
"""Minimum number of words in an answer with reasons, if the scene gives that many."""


class RulesTeacher:
    """Answers instead of a language model, from captions and boxes alone.

    It knows coloured shapes ("red circle"), of which the boxes show all that there is. Of other categories ("dog") it
    claims no more than the boxes show. `language` is "en" or "ko". Korean needs Korean names, which COCO's 80
    categories and the coloured shapes have. Raises UserError for another language.
    """

    model = "rules"
    prompts_hash = ""

    def __init__(self, language: str = "en", seed: int = 0):
        self.language, self.seed = language, seed
        self._phrases = PhraseTable(language)

    def check(self, categories: Iterable[str]) -> None:
        """Raises UserError, one line, if a category has no name in the language."""
        for category in categories:
            self._phrases.words.fields("a", coloured_name(category) or Name(category))

    def request(self, kind: str, context: Context, attempt: int = 0) -> ChatRequest:
        """Returns a request that holds the context as JSON, so that its key depends on all that decides the answer."""
        content = json.dumps(dataclasses.asdict(context), ensure_ascii=False)
        messages = {"role": "system", "content": kind}, {"role": "user", "content": content}
        return ChatRequest(messages, {"language": self.language, "seed": self.seed}, attempt)

    async def ask(self, request: ChatRequest, lost: object = None) -> Response:
        """Answers a request of `request`, as an endpoint would."""
        kind, content = (message["content"] for message in request.messages)
        fields = json.loads(content)
        boxes = tuple(Box(**box) for box in fields["boxes"])
        context = Context(fields["id"], fields["image"], tuple(fields["captions"]), boxes)
        return Response(self.answer(kind, context), "stop", 0, 0, 0, self.model, None, int(time.time()))

    def answer(self, kind: str, context: Context) -> str:
        """Returns an answer of `kind` in the form that a language model is asked for.

        Conversations and reasoning are blocks of Question: and Answer: between lines of ===; a description is plain
        text. The answer depends on the seed, the kind and the context alone. It is empty if the boxes show nothing for
        certain. Raises KeyError for another kind, and UserError if a category has no name in the language.
        """
        write = {
            "conversation": self._conversation,
            "detail_description": self._description,
            "complex_reasoning": self._reasoning,
        }[kind]
        return write(Scene(context), random.Random(f"{self.seed} {kind} {context.id}"))

    def _conversation(self, scene: Scene, rng: random.Random) -> str:
        groups = [facts for facts in questions(scene, rng) if self._can_say(facts[0])]
        rng.shuffle(groups)
        asked: dict[str, str] = {}
        for facts in groups[: rng.randint(*TURNS)]:
            question, answer = self._phrases.say("conversation", rng.choice(facts), rng)
            asked.setdefault(question, answer)
        return _blocks(asked)

    def _description(self, scene: Scene, rng: random.Random) -> str:
        facts = [fact for fact in description(scene, rng) if self._can_say(fact)]
        return " ".join(self._phrases.say("description", fact, rng)[1] for fact in facts)

    def _reasoning(self, scene: Scene, rng: random.Random) -> str:
        """Says what there is to see, starting with the objects in question, and then what follows from it."""
        groups = inferences(scene)
        if not groups:
            return ""
        inference = rng.choice(rng.choice(groups))
        question, answer = self._phrases.say("reasoning", inference, rng)
        observed, names = [], inference.names
        for fact in sorted(description(scene, rng), key=lambda fact: not fact.names & names):
            if len(" ".join([*observed, answer]).split()) >= REASONING_WORDS:
                break
            if self._can_say(fact) and fact.key != "nothing_else":
                observed.append(self._phrases.say("description", fact, rng)[1])
        return _blocks({question: " ".join([*observed, answer])})

    def _can_say(self, fact: Fact) -> bool:
        return self.language == "en" or fact.key != "caption"  # captions are taken to be English


def _blocks(asked: dict[str, str]) -> str:
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in asked.items())
