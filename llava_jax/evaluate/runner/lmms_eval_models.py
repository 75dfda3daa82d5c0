"""Classes of a llava_jax model for lmms-eval, which alone imports this file."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from llava_jax.errors import UserError
from llava_jax.evaluate.runner.generation import too_long
from llava_jax.inference.llava import Request, load
from llava_jax.text.templates import IMAGE

MAX_NEW_TOKENS = 1024
"""Default if a task has none, as in lmms-eval's own LLaVA."""
MAX_CHOICE_TOKENS = 32
"""Number of generated tokens that are compared with a given answer."""


class LlavaJax(lmms):
    """A model for tasks with a text and a list of images.

    Args:
      pretrained: Model directory that `llava_jax.load` opens.
      dtype: "bfloat16" or "float32"; by default bfloat16 on TPU and GPU.
      batch_size: Number of requests at a time. lmms-eval's --device and --max_batch_size are not used.
    """

    is_simple = True

    def __init__(self, pretrained: str, dtype: str | None = None, batch_size: int | str = 1,
                 device: str | None = None, max_batch_size: int | None = None):
        super().__init__()
        self.llava, self.batch_size = load(pretrained, dtype), int(batch_size)
        self.device = "cpu"  # device of lmms-eval's own messages between processes

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the answers in the order of the requests, an empty one if a request is longer than the context."""
        results: list[GenerationResult] = [GenerationResult("")] * len(requests)
        numbers: list[int] = []

        def asked() -> Iterator[Request]:
            for number, instance in enumerate(requests):
                request = self._request(*instance.args)
                if why := too_long(self.llava, request):
                    print(f"request {number} is not asked, its answer is empty: {why}", file=sys.stderr)
                    continue
                numbers.append(number)
                yield request

        answered = self.llava.batch_unordered(asked(), self.batch_size)
        for position, answer in tqdm(answered, "llava_jax", len(requests), disable=self.rank != 0):
            number = numbers[position]
            counts = TokenCounts(len(answer.prompt_tokens), len(answer.tokens))
            results[number] = GenerationResult(answer.text, counts)
            self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer.text)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns minus the log-probability of each request's answer, and whether the model's text starts with it.

        lmms-eval chooses the smallest value. The pair is in a GenerationResult, because lmms-eval 0.7.3 makes a string
        of a bare pair. If the context has no room for a question and its answers, the value is infinite.
        """
        together: dict[tuple, list[int]] = {}  # requests with equal questions
        for number, (context, _, _, *document) in enumerate(request.args for request in requests):
            together.setdefault((context, *document), []).append(number)
        asked, wanted, groups = [], [], []
        for numbers in together.values():
            context, _, to_images, *document = requests[numbers[0]].args
            request = self._request(context, {"max_new_tokens": MAX_CHOICE_TOKENS}, to_images, *document)
            answers = [requests[number].args[1] for number in numbers]
            answers = [answer if isinstance(answer, str) else answer(self._doc(*document)) for answer in answers]
            answers = [answer.strip() for answer in answers]
            if why := too_long(self.llava, request, answers):
                print(f"request {numbers[0]} is not asked, none of its answers is likely: {why}", file=sys.stderr)
                continue
            asked.append(request)
            wanted.append(answers)
            groups.append(numbers)
        completions = self.llava.batch(asked, self.batch_size)
        results: list[GenerationResult] = [GenerationResult((math.inf, False))] * len(requests)
        for group, scores in self.llava.log_likelihoods(zip(asked, wanted, strict=True), self.batch_size):
            for number, answer, score in zip(groups[group], wanted[group], scores, strict=True):
                results[number] = GenerationResult((-score, completions[group].text.startswith(answer)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("llava_jax answers tasks of one round; this one has several")

    def _request(self, context: str, settings: Mapping[str, Any], to_images: Any, *document: Any) -> Request:
        images = to_images(self._doc(*document)) or [] if to_images else []
        return _make(context, images, settings)

    def _doc(self, id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][id]


class LlavaJaxChat(LlavaJax):
    """A model for tasks with messages that contain images. Multiple choice needs --force_simple."""

    is_simple = False

    def _request(self, context: str, to_messages: Any, settings: Mapping[str, Any], *document: Any) -> Request:
        messages, images = [], []
        for message in to_messages(self._doc(*document)):
            text = ""
            for part in message["content"]:
                if part["type"] == "text":
                    text += part["text"]
                else:
                    text += f"{IMAGE}\n"
                    images.append(part["url"])
            messages.append({"role": message["role"], "content": text})
        return _make(messages, images, settings)


def _make(messages: Any, images: Sequence[Any], settings: Mapping[str, Any]) -> Request:
    if other := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
        raise UserError(f"llava_jax sees pictures only; this task shows it something else ({other[0]})")
    stop = settings.get("until") or []
    stop = [stop] if isinstance(stop, str) else stop
    return Request(
        messages, images,
        max_new_tokens=settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        temperature=(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0,
        top_p=settings.get("top_p") or 1.0,
        # A task without stop texts has a blank line here, which would end every longer answer.
        stop=[text for text in stop if text.strip()],
    )
