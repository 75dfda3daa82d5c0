"""The rules teacher: facts of a scene, put into phrases that a seed draws."""

import dataclasses
import json
import random
import time
from collections.abc import Callable, Container, Iterable, Sequence

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.drawn_scenes import PAIRS
from llava_jax.annotations.scene import Name, Scene, coloured_name
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.synthesize.rules.facts import Fact, Pairs, description, inferences, questions
from llava_jax.synthesize.rules.phrases import PhraseTable

KINDS = ("colour", "shape", "count", "position", "relation", "existence", "between", "order")
"""Kinds of questions with short answers that a scene of coloured shapes allows; "sign" is one more."""
TURNS = (4, 7)
"""Minimum and maximum number of questions in a conversation, if the scene gives that many."""
DESCRIPTION_WORDS = 70
"""Maximum number of words in a description of coloured shapes."""
REASONING_WORDS = 24
"""Minimum number of words in an answer with reasons, if the scene gives that many."""
SHORT_TURNS = 10
"""Maximum number of questions in a conversation with short answers."""
MAX_PASSES = 2
"""Maximum number of times that a conversation comes back to a kind of question."""


@dataclasses.dataclass(frozen=True)
class QuestionAnswer:
    """A question and its answer.

    Attributes:
      kind: The kind of question, such as one of KINDS, "sign", "caption", "description" or "reasoning".
      about: Names of the objects that a short answer is about.
      small: Whether a short answer is about small objects alone.
    """

    kind: str
    question: str
    answer: str
    about: tuple[str, ...] = ()
    small: bool = False


class RulesTeacher:
    """Answers instead of a language model, from captions and boxes alone.

    It knows coloured shapes ("red circle"), of which the boxes show all that there is. Of other categories ("dog") it
    claims no more than the boxes show. `language` is "en" or "ko". Korean needs Korean names, which COCO's 80
    categories and the coloured shapes have. With `short`, `answer` gives conversations short answers. Raises UserError
    for another language.
    """

    model = "rules"
    prompts_hash = ""

    def __init__(self, language: str = "en", seed: int = 0, short: bool = False):
        self.language, self.seed, self.short = language, seed, short
        self._phrases = PhraseTable(language)

    def check(self, categories: Iterable[str]) -> None:
        """Raises UserError, one line, if a category has no name in the language."""
        for category in categories:
            self._phrases.words.fields("a", coloured_name(category) or Name(category))

    def request(self, kind: str, context: Context, attempt: int = 0) -> ChatRequest:
        """Returns a request that holds the context as JSON, so that its key depends on all that decides the answer."""
        content = json.dumps(dataclasses.asdict(context), ensure_ascii=False)
        messages = {"role": "system", "content": kind}, {"role": "user", "content": content}
        settings = {"language": self.language, "seed": self.seed} | ({"short": True} if self.short else {})
        return ChatRequest(messages, settings, attempt)

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
        scene, rng = Scene(context), random.Random(f"{self.seed} {kind} {context.id}")
        match kind:
            case "conversation" if self.short:
                asked = self.conversation(scene, rng, SHORT_TURNS)
                demand = self._phrases.question("short", rng)
                return _blocks(asked).replace("?", f"?\n{demand}", 1)
            case "conversation":
                return _blocks(self.sentences(scene, rng, rng.randint(*TURNS)))
            case "detail_description":
                return self.description(scene, rng).answer
            case "complex_reasoning":
                reasoning = self.reasoning(scene, rng, REASONING_WORDS)
                return _blocks([reasoning] if reasoning else [])
        raise KeyError(kind)

    def conversation(
        self, scene: Scene, rng: random.Random, turns: int, kinds: Sequence[str] = (), pairs: Pairs = PAIRS
    ) -> list[QuestionAnswer]:
        """Draws up to `turns` different questions with short answers. The kinds of `kinds_of(scene)` take turns."""
        facts = questions(scene, rng, pairs)
        kinds = [kind for kind in kinds or kinds_of(scene) if kind in facts]
        rng.shuffle(kinds)
        asked = _draw_turns(facts, kinds * MAX_PASSES, turns, rng, self._say_short)
        rng.shuffle(asked)
        return asked

    def sentences(self, scene: Scene, rng: random.Random, turns: int) -> list[QuestionAnswer]:
        """Draws up to `turns` questions of different kinds, and answers in sentences."""
        facts = questions(scene, rng)
        kinds = [kind for kind in facts if self.language == "en" or kind != "caption"]  # captions are English
        rng.shuffle(kinds)
        return _draw_turns(facts, kinds, turns, rng,
                           lambda kind, fact: QuestionAnswer(kind, *self._phrases.say("conversation", fact, rng)))

    def question(
        self, kind: str, scene: Scene, rng: random.Random, pairs: Pairs = PAIRS, about: Container[str] = ()
    ) -> QuestionAnswer | None:
        """Draws a question of a kind with a short answer. Returns None if the scene allows none.

        If `about` is given, the question is about an object with one of these names, such as "red circle".
        """
        groups = questions(scene, rng, pairs).get(kind, ())
        if about:
            groups = [[fact for fact in facts if any(str(name.plain) in about for name in fact.about)]
                      for facts in groups]
            groups = [facts for facts in groups if facts]
        return self._say_short(kind, rng.choice(rng.choice(groups))) if groups else None

    def caption(self, context: Context, rng: random.Random) -> QuestionAnswer:
        """Draws a question for a caption, and one of the captions."""
        return QuestionAnswer("caption", self._phrases.question("caption", rng), rng.choice(context.captions))

    def description(self, scene: Scene, rng: random.Random) -> QuestionAnswer:
        """Describes a scene: the number or the names of the objects, the position of every object, and more."""
        sentences: list[str] = []
        for fact in description(scene, rng):
            if self._can_say(fact):
                sentences.append(self._phrases.say("description", fact, rng)[1])
                if scene.shapes and len(" ".join(sentences).split()) > DESCRIPTION_WORDS:
                    sentences.pop()
                    break
        return QuestionAnswer("description", self._phrases.question("description", rng), " ".join(sentences))

    def reasoning(
        self, scene: Scene, rng: random.Random, words: int = 0, keys: Sequence[str] = ()
    ) -> QuestionAnswer | None:
        """Draws a question whose answer says what there is to see and what follows from it.

        An answer with fewer than `words` words starts with more of the scene, first of the objects in question. If
        `keys` is given, one of these keys that the scene allows is drawn first, a repeated one more often. Returns None
        if nothing follows.
        """
        groups = inferences(scene)
        if keys:
            groups = [[fact for facts in groups for fact in facts if fact.key == key] for key in keys]
            groups = [facts for facts in groups if facts]
        if not groups:
            return None
        inference = rng.choice(rng.choice(groups))
        question, answer = self._phrases.say("reasoning", inference, rng)
        observed, names = [], inference.names
        for fact in sorted(description(scene, rng), key=lambda fact: not fact.names & names) if words else ():
            if len(" ".join([*observed, answer]).split()) >= words:
                break
            if self._can_say(fact) and fact.key != "nothing_else":
                observed.append(self._phrases.say("description", fact, rng)[1])
        return QuestionAnswer("reasoning", question, " ".join([*observed, answer]))

    def _say_short(self, kind: str, fact: Fact) -> QuestionAnswer:
        small = bool(fact.about) and all(name.size == "small" for name in fact.about)
        names = tuple(str(name.plain) for name in fact.about)
        return QuestionAnswer(kind, *self._phrases.say_short(fact), names, small)

    def _can_say(self, fact: Fact) -> bool:
        return self.language == "en" or fact.key != "caption"  # captions are taken to be English


def _draw_turns(
    facts: dict[str, list[list[Fact]]], kinds: Iterable[str], turns: int, rng: random.Random,
    say: Callable[[str, Fact], QuestionAnswer],
) -> list[QuestionAnswer]:
    """Draws a fact of each kind in `kinds`, until there are `turns` different questions."""
    asked: dict[str, QuestionAnswer] = {}
    for kind in kinds:
        if len(asked) < turns:
            one = say(kind, rng.choice(rng.choice(facts[kind])))
            asked.setdefault(one.question, one)
    return list(asked.values())


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """Returns KINDS, and "sign" if the scene has a sign."""
    return (*KINDS, "sign") if scene.signs else KINDS


def _blocks(asked: list[QuestionAnswer]) -> str:
    return "\n===\n".join(f"Question:\n{one.question}\n===\nAnswer:\n{one.answer}" for one in asked)
