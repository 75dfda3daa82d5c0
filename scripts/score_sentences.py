"""Scores the sentences of a miniature's descriptions and reasoning: are they grammatical, and true of the boxes?

    python scripts/score_sentences.py [--model runs/mini/model] [--data runs/mini/data] [--pictures 400]
                                      [--languages en ko]

The model is asked for a description of each held-out picture, and a question that takes reasoning. Every sentence of
its answers is read by the readers that test the rules teacher's texts and share no code with the teacher
(tests/synthesize). The output is a Markdown table, and sentences that are false:

- grammatical: the sentence has a form that the teacher writes, and its articles, numbers, verbs and particles agree.
- read: the reader decides whether the sentence is true. One that is not grammatical counts as false. The English
  reader decides every sentence. The Korean one skips conclusions, unless they name an object that is not there.
- answers all true: no sentence of the answer is false.
"""

import argparse
import random
import sys
from pathlib import Path

from llava_jax import load
from llava_jax.annotations.scene import Scene
from llava_jax.inference.llava import Request
from llava_jax.synthesize.rules import RulesTeacher, open_split

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "synthesize"))
import korean_reader  # noqa: E402  (both are beside the tests)
import rules_reader  # noqa: E402

LANGUAGES = {"en": "English", "ko": "Korean"}
NUM_SHOWN = 5


def percent(values: list[bool]) -> float:
    return 100 * sum(values) / max(len(values), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/mini/model"))
    parser.add_argument("--data", type=Path, default=Path("runs/mini/data"))
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--languages", nargs="+", default=["en"], choices=LANGUAGES)
    args = parser.parse_args()
    llava, contexts = load(args.model), open_split(args.data, "test")[: args.pictures]
    print("| | answers | sentences | grammatical, % | read, % | true of those read, % | answers all true, % |")
    print("|---" * 7 + "|")
    failed = []
    for language in args.languages:
        teacher, rng = RulesTeacher(language), random.Random(0)
        for kind in ("description", "reasoning"):
            drawn = [(context, getattr(teacher, kind)(Scene(context), rng)) for context in contexts]
            asked = [(context, question) for context, question in drawn if question]
            requests = [Request(question.question, [args.data / context.image], max_new_tokens=160)
                        for context, question in asked]
            read = [rules_reader.read(answer.text, context, question.question * (kind == "reasoning"))
                    if language == "en" else korean_reader.read(answer.text, context)
                    for (context, question), answer in zip(asked, llava.batch(requests, batch_size=32), strict=True)]
            sentences = [sentence for answer in read for sentence in answer]
            parsed = percent([parsed for _, parsed, _ in sentences])
            known = [holds for _, _, holds in sentences if holds is not None]
            all_true = percent([all(holds is not False for *_, holds in answer) for answer in read])
            print(f"| {LANGUAGES[language]}, {kind} | {len(read)} | {len(sentences):,} | {parsed:.1f} | "
                  f"{100 * len(known) / len(sentences):.1f} | {percent(known):.1f} | {all_true:.1f} |", flush=True)
            failed += [text for text, _, holds in sentences if holds is False][:NUM_SHOWN]
    print("\n" + "\n".join(f"- {sentence}" for sentence in failed))


if __name__ == "__main__":
    main()
