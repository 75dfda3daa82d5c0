"""What the model in training answers to a few fixed questions."""

import dataclasses

import jax

from llava_jax import config
from llava_jax.data.sources import Source
from llava_jax.inference.llava import Llava, Request
from llava_jax.models.llava import Parameters
from llava_jax.training.start import Run

SHOWN = 4
LONGEST = 48  # tokens


class Samples:
    """The first questions of a stage's validation data (of its training data where it has none), with their answers."""

    def __init__(self, run: Run, stage: config.Stage):
        if jax.process_count() > 1:
            raise ValueError("sample_every: sample answers are made in runs of one process; set it to 0")
        source = Source(stage.data.validation or stage.data.path, stage.data.image_root)
        self.run = run
        self.model = dataclasses.replace(run.model, template=stage.data.template or run.model.template)
        self.records = [source[i % len(source)] for i in range(SHOWN)]
        self.llava: Llava | None = None

    def answer(self, parameters: Parameters) -> list[dict[str, str]]:
        """Question, expected and given answer of each record's first round, greedily."""
        if self.llava is None:
            self.llava = Llava(self.model, parameters, self.run.tokenizer, self.run.dtype)
        self.llava.parameters = parameters
        rounds = [_first_round(record.turns) for record in self.records]
        requests = [Request(question, record.images[: question.count("<image>")], max_new_tokens=LONGEST)
                    for (question, _), record in zip(rounds, self.records, strict=True)]
        # As many rows as the mesh splits a batch into: a row more for a device is no more work.
        groups = self.run.mesh.shape["replica"] * self.run.mesh.shape["fsdp"]
        rows = requests + [requests[0]] * (-len(requests) % groups)
        answers = self.llava.batch(rows, batch_size=len(rows))[: len(requests)]
        return [{"question": question, "expected": expected, "answer": answer.text}
                for (question, expected), answer in zip(rounds, answers, strict=True)]


def _first_round(turns: tuple[dict[str, str], ...]) -> tuple[str, str]:
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
    following = turns[first + 1]["value"] if first + 1 < len(turns) else ""
    return turns[first]["value"], following
