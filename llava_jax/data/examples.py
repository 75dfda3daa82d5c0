"""A record's number -> its tokens, and its images. What the worker processes do; imports neither Grain nor JAX."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llava_jax.data.records import BadRow, Record
from llava_jax.data.sources import Mixture
from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, MissingImage, open_image
from llava_jax.images import prepare
from llava_jax.text.encode import IMAGE_TOKEN_ID, Example, NoSupervisedTokens, TooLong, encode_conversation
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Makes examples of the records of a mixture, numbered through.

    A bad row raises BadRow, with one line that names file and row, if `bad_rows` is "error", and else stands in the
    result as its reason.
    """

    mixture: Mixture
    tokenizer: Tokenizer
    template: Template
    tokens_per_image: int
    image_size: int
    image_mode: str
    sequence_length: int
    tiles_per_sequence: int
    bad_rows: Literal["error", "skip"]
    context: int | None = None  # the most tokens of a conversation, where the model's context is shorter than a row
    exif: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, what: Literal["texts", "images"], numbers: Sequence[int]) -> list:
        """`text` or `pixels` of each record, or its reason."""
        load, results = {"texts": self.text, "images": self.pixels}[what], []
        for number in numbers:
            try:
                results.append(load(number))
            except BadRow as bad:
                if self.bad_rows == "error":
                    raise
                results.append(bad.reason)
        return results

    def text(self, number: int) -> Example:
        """Tokens and labels, int32 [T]."""
        record = self._record(number)
        images = len(record.images)
        if images > self.tiles_per_sequence:
            message = (f"{images} images do not fit into the {self.tiles_per_sequence} slots of a row "
                       "(data.tiles_per_sequence)")
            raise BadRow("too_long", f"{record.source}: {message}")
        try:
            most, limit = min((self.sequence_length, "data.sequence_length"),
                              (self.context or math.inf, "the model's context"))
            example = encode_conversation(
                record.turns, self.template, self.tokenizer, self.tokens_per_image, max_length=most
            )
        except NoSupervisedTokens as error:
            raise BadRow("no_supervised_tokens", f"{record.source}: {error}") from None
        except TooLong as error:
            raise BadRow("too_long", f"{record.source}: {error} ({limit})") from None
        except UserError as error:
            raise BadRow("malformed", f"{record.source}: {error}") from None
        used = np.count_nonzero(example.tokens == IMAGE_TOKEN_ID) // self.tokens_per_image
        if used != images:  # an <image> stood in a turn that is left out
            raise BadRow("image_count", f"{record.source}: {images} images, but {used} in the turns that are used")
        return example

    def pixels(self, number: int) -> np.ndarray:
        """The images as the model sees them, uint8 [I, size, size, 3]."""
        record = self._record(number)
        tiles = []
        for image in record.images:
            try:
                opened = open_image(image, self.exif, self.max_pixels)
                tiles.append(prepare(opened, self.image_size, self.image_mode)[0])
            except MissingImage as error:
                raise BadRow("missing_image", f"{record.source}: {error}") from None
            except UserError as error:
                raise BadRow("broken_image", f"{record.source}: {error}") from None
        return np.stack(tiles) if tiles else np.zeros((0, self.image_size, self.image_size, 3), np.uint8)

    def _record(self, number: int) -> Record:
        source, index = self.mixture.locate(number)
        return source[index]
