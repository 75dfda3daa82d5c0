"""MME: two yes-or-no questions about an image, one with either answer, in 14 categories (Fu et al. 2023)."""

import io
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import PHRASE_INSTRUCTION, Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, require_file
from llava_jax.files import read_text

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSTRUCTION = "Please answer yes or no."
"""Last sentence of MME's own questions."""

Truth = Mapping[tuple[str, str, str], str]
"""(category, file, question) -> "Yes" or "No"."""


@dataclass(frozen=True)
class Mme(QuestionFileTask):
    """MME: for each category the percentage of questions right plus that of pictures with both right; their sums."""

    title = "MME"
    required_files = "llava_mme.jsonl, MME_Benchmark_release_version/ (pictures and questions_answers_YN)"
    question_file = "llava_mme.jsonl"
    image_folder = "MME_Benchmark_release_version"
    num_published = 2374
    choices = ("Yes", "No")
    uses_answer_order = uses_prompts = True

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for a question that MME's own files lack."""
        questions = super().load(data)
        truth = self._truth(data, questions)
        for question in questions:
            find_question(truth, str(question.id), question.text)
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns the figures of the official tool.

        An answer is "other", and wrong, if its first four characters have no yes or no. Two consecutive answers of a
        category are a pair. A category is worth 200. The figures are perception and cognition, then the categories'
        scores, then for each category accuracy and accuracy+ in percent and the number of "other" answers.
        """
        truth = self._truth(data, questions)
        lines, items = defaultdict(list), []
        for answer in answers:
            category, _, _, label = find_question(truth, str(answer.id), answer.prompt)
            word = parse_yes_no(answer.text)
            lines[category].append((word, word == label.lower()))
            items.append(ScoredAnswer(answer.id, float(word == label.lower()), label, word, category))
        notes, sums, scores, parts = self.size_notes(questions), {}, {}, {}
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            answered = [category for category in categories if category in lines]
            if len(answered) < len(categories):
                notes.append(f"{name} without {', '.join(c for c in categories if c not in lines)}")
            for category in answered:
                scores[category], rates = _score_category(lines[category])
                parts |= {f"{category} {rate}": value for rate, value in rates.items()}
                if len(lines[category]) % 2:
                    notes.append(f"{category}: an odd number of answers; the official tool ends with an error")
            if answered:
                sums[name] = sum(scores[category] for category in answered)
        if not sums:
            raise UserError("MME: there are no answers of its categories to score")
        unparsed = [answer for answer in answers if parse_yes_no(answer.text) == "other"]
        notes += unparsed_notes(unparsed, len(answers), "have neither yes nor no in their first four characters, and "
                                "are wrong")
        unknown = sorted(set(lines) - {*PERCEPTION, *COGNITION})
        if unknown:
            notes.append(f"not counted: {', '.join(unknown)}")
        order = [(question.id, question.text) for question in questions]
        if [(answer.id, answer.prompt) for answer in answers] != order:
            notes.append("the answers are in another order than the questions, or some are missing; pairs are made by "
                         "their order, as in the official tool")
        return Scores({**sums, **scores, **parts}, next(iter(sums)), items, notes)

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns the input of the official tool: for each category lines of image, question, truth and answer."""
        truth, lines = self._truth(data, questions), defaultdict(str)
        for answer in answers:
            category, *row = find_question(truth, str(answer.id), answer.prompt)
            text = re.sub("[\t\r\n]", " ", answer.text)  # because the tool splits at tabs and line breaks
            lines[category] += "\t".join([*row, text]) + "\n"
        # An answer may have half a surrogate pair, which UTF-8 cannot hold.
        return {f"mme/{category}.txt": text.encode(errors="replace") for category, text in lines.items()}

    def _truth(self, data: str, questions: Sequence[Question]) -> Truth:
        root = self.image_root or require_file(data, self.image_folder)
        truth = {}
        for category in sorted({str(question.id).split("/")[0] for question in questions}):
            folder = os.path.join(root, category)
            if category in ("", ".", ".."):
                raise UserError(f"MME: {category!r} is no category, and the id of a question starts with it")
            if os.path.isdir(own := os.path.join(folder, "questions_answers_YN")):  # images may be elsewhere
                folder = own
            if not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder, for MME's questions and answers of {category}")
            for name in sorted(os.listdir(folder)):
                if name.endswith(".txt"):
                    for question, label in _read_pairs(os.path.join(folder, name)):
                        truth[category, name, question] = label
        return truth


def parse_yes_no(text: str) -> str:
    """Returns "yes" or "no" if the first four characters have it, in any case, else "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def find_question(truth: Truth, id: str, prompt: str) -> tuple[str, str, str, str]:
    """Returns category, file, question and label of a prompt. Raises UserError if MME has no such question.

    MME's instruction replaces LLaVA's, after one blank or, as in some of MME's files, two.
    """
    parts = id.split("/")
    category, name = parts[0], parts[-1].split(".")[0] + ".txt"
    llava_instruction = PHRASE_INSTRUCTION[1:]
    question = prompt.replace(llava_instruction, "").strip() if llava_instruction in prompt else prompt
    if INSTRUCTION not in question:
        question += f" {INSTRUCTION}"
        if (category, name, question) not in truth:
            question = question.replace(f" {INSTRUCTION}", f"  {INSTRUCTION}")
    if (category, name, question) not in truth:
        raise UserError(f"MME: {category}/{name} has no question {question!r}; the files are of different versions")
    return category, name, question, truth[category, name, question]


def _score_category(lines: Sequence[tuple[str, bool]]) -> tuple[float, dict[str, float]]:
    pairs = [lines[n : n + 2] for n in range(0, len(lines), 2)]
    accuracy = sum(right for _, right in lines) / len(lines)
    both = sum(len(pair) == 2 and all(right for _, right in pair) for pair in pairs) / len(pairs)
    others = sum(word == "other" for word, _ in lines)
    return 100 * accuracy + 100 * both, {"accuracy": 100 * accuracy, "accuracy+": 100 * both, "other": others}


def _read_pairs(path: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(io.StringIO(read_text(path, encoding="utf-8-sig"), newline=None), 1):
        parts = line.strip().split("\t")
        if parts == [""]:
            continue
        if len(parts) != 2 or parts[1].lower() not in ("yes", "no"):
            raise UserError(f"{path}, line {number}: not a question, a tab and Yes or No")
        pairs.append((parts[0], parts[1]))
    return pairs
