"""The prompts of a judge: a system prompt, and one rule for each category of questions."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava_jax.endpoint.request import Message
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.reviews import ORDER
from llava_jax.evaluate.tasks.llava_bench import JudgeCase
from llava_jax.files import matches_schema, read_json

PUBLISHED_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""System prompt of LLaVA's scripts. Their rule.json has the other texts."""


class JudgeRule(NamedTuple):
    """The prompt of one category. `role` is the name of the two answers' authors."""

    role: str
    prompt: str


@dataclass(frozen=True)
class JudgeRules:
    """A system prompt, and rules by category."""

    system: str
    rules: Mapping[str, JudgeRule]

    @classmethod
    def load(cls, path: str = "") -> "JudgeRules":
        """Returns the project's own rules, or those of a rule.json of LLaVA: {category: {"role", "prompt"}}."""
        if not path:
            texts = {"": read_prompt("judge_coco"), "llava_bench_": read_prompt("judge_wild")}
            return cls(read_prompt("judge_system"), {prefix + category: JudgeRule("Assistant", text)
                                                     for prefix, text in texts.items() for category in ORDER})
        table = read_json(path, (dict, list))
        if not isinstance(table, dict):
            raise UserError(f"{path}: not a table of rules, {{category: {{\"role\": ..., \"prompt\": ...}}}}")
        for category, rule in table.items():
            if not matches_schema(rule, {"role": str, "prompt": str}):
                raise UserError(f"{path}: the rule of {category!r} needs the texts role and prompt")
        return cls(PUBLISHED_SYSTEM, {category: JudgeRule(rule["role"], rule["prompt"])
                                      for category, rule in table.items()})

    def messages(self, case: JudgeCase, candidate: str, swapped: bool = False) -> tuple[Message, ...]:
        """Returns the messages of LLaVA's scripts: the reference is first, or second if `swapped`.

        Raises KeyError for a category without a rule.
        """
        role, prompt = self.rules[case.category]
        first, second = (candidate, case.reference["text"]) if swapped else (case.reference["text"], candidate)
        content = (f"[Context]\n{case.context}\n\n[Question]\n{case.question.text}\n\n"
                   f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
                   f"[System]\n{prompt}\n\n")
        return {"role": "system", "content": self.system}, {"role": "user", "content": content}

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of the prompts, without question, image and answers."""
        content = [self.system, sorted((category, *rule) for category, rule in self.rules.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_prompt(name: str) -> str:
    """Returns a text of the folder `prompts`."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8").strip()
