"""The rules teacher: facts of a scene put into phrases drawn by a seed."""

import random
from collections.abc import Iterable

from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Name, Scene, coloured_name
from llava_jax.synthesize.rules.facts import Fact, description, inferences, questions
from llava_jax.synthesize.rules.phrases import PhraseTable

TURNS = (4, 7)
"""The least and the most questions of a conversation, where the scene gives so many."""
WORDS = 24
"""Words that an answer with reasons has at least, where the scene gives so many."""


class RulesTeacher:
    """Answers for a language model, from captions and boxes alone.

    It knows the embedded data set's coloured shapes ("red circle"), of which the boxes are all that there is, and
    other categories ("dog"), of which it claims no more than the boxes show. `language`: "en" or "ko"; Korean needs
    Korean names, which COCO's 80 categories and the coloured shapes have. Raises UserError for another language.
    """

    model = "rules"

    def __init__(self, language: str = "en", seed: int = 0):
        self.language = language
        self.seed = seed
        self._phrases = PhraseTable(language)

    def check(self, categories: Iterable[str]) -> None:
        """Raises UserError, one line, if one of these has no name in the language."""
        for category in categories:
            self._phrases.words.fields("a", coloured_name(category) or Name(category))

    def reply(self, kind: str, context: Context) -> str:
        """A reply of `kind` ("conversation", "detail_description", "complex_reasoning") in the form in which a
        language model is asked for it: blocks of Question: and Answer: between lines of ===, or, for a description,
        plain text.

        The same for the same seed, kind and context. Empty where the boxes allow nothing to be said for certain.
        Raises KeyError for another kind, UserError where a category has no name in the language.
        """
        write = {
            "conversation": self._conversation,
            "detail_description": self._description,
            "complex_reasoning": self._reasoning,
        }[kind]
        return write(Scene(context), random.Random(f"{self.seed} {kind} {context.id}"))

    def _conversation(self, scene: Scene, rng: random.Random) -> str:
        alike = [facts for facts in questions(scene, rng) if self._can_say(facts[0])]
        rng.shuffle(alike)
        asked: dict[str, str] = {}
        for facts in alike[: rng.randint(*TURNS)]:
            question, answer = self._phrases.say("conversation", rng.choice(facts), rng)
            asked.setdefault(question, answer)
        return _blocks(asked)

    def _description(self, scene: Scene, rng: random.Random) -> str:
        facts = [fact for fact in description(scene, rng) if self._can_say(fact)]
        return " ".join(self._phrases.say("description", fact, rng)[1] for fact in facts)

    def _reasoning(self, scene: Scene, rng: random.Random) -> str:
        """What there is to see, of the things in question first, and then what follows from it."""
        alike = inferences(scene)
        if not alike:
            return ""
        inference = rng.choice(rng.choice(alike))
        question, answer = self._phrases.say("reasoning", inference, rng)
        told, names = [], inference.names
        for fact in sorted(description(scene, rng), key=lambda fact: not fact.names & names):
            if len(" ".join([*told, answer]).split()) >= WORDS:
                break
            if self._can_say(fact) and fact.key != "nothing_else":
                told.append(self._phrases.say("description", fact, rng)[1])
        return _blocks({question: " ".join([*told, answer])})

    def _can_say(self, fact: Fact) -> bool:
        return self.language == "en" or fact.key != "caption"  # captions are taken to be English


def _blocks(asked: dict[str, str]) -> str:
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in asked.items())
