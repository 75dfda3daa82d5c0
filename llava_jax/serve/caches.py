"""Finds what was computed before: the tokens in slots, and the features of images."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

from llava_jax.serve.jobs import Job, PreparedImage
from llava_jax.text.encode import IMAGE_TOKEN_ID


class SlotTokens:
    """The tokens of one slot: a prompt, and the answer behind it.

    Attributes:
      tokens: int32 [context], of which the first `length` are set.
      images: start and identity of each image, in order. Images with equal identities have equal features.
      adapter: index of the LoRA adapter. Another adapter computes other keys and values for the same tokens.
    """

    def __init__(self, job: Job, context: int):
        self.tokens = np.zeros(context, np.int32)
        self.length, self.adapter = len(job.tokens), job.adapter
        self.tokens[: self.length] = job.tokens
        visual, used = np.flatnonzero(job.tokens == IMAGE_TOKEN_ID), 0
        self.images: list[tuple[int, Hashable]] = []
        for image in job.images:
            self.images.append((int(visual[used]), image_identity(image)))
            used += len(image.layout.index)

    def append(self, token: int) -> None:
        """Adds a token that was written."""
        if self.length < len(self.tokens):
            self.tokens[self.length] = token
            self.length += 1

    def common_prefix(self, other: "SlotTokens") -> int:
        """Returns how many tokens both start with, visual tokens of other images apart."""
        if self.adapter != other.adapter:
            return 0
        length = min(self.length, other.length)
        different = self.tokens[:length] != other.tokens[:length]
        length = int(different.argmax()) if different.any() else length
        for mine, theirs in zip(self.images, other.images, strict=False):
            if mine != theirs:
                return min(length, mine[0], theirs[0])
        return length


def image_identity(image: PreparedImage) -> Hashable:
    """Returns what images with equal features share. Among several images, some processors make fewer tiles of each."""
    return image.digest, len(image.tiles), len(image.layout.index)


class FeatureCache:
    """Features of the images used last, on the host.

    Args:
      encode: computes the features [tokens, D] of an image with an adapter.
      max_bytes: maximum number of bytes of all features. The image used least recently is dropped.
    """

    def __init__(self, encode: Callable[[PreparedImage, int], np.ndarray], max_bytes: int):
        self._encode, self._max_bytes = encode, max_bytes
        self._features: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: tuple[PreparedImage, int]) -> bool:
        return self._key(*key) in self._features

    def get(self, image: PreparedImage, adapter: int) -> np.ndarray:
        """Returns the features of an image, computed if they are not cached."""
        key = self._key(image, adapter)
        features = self._features.pop(key, None)
        if features is None:
            features = self._encode(image, adapter)
            self.bytes += features.nbytes
        self._features[key] = features
        while self.bytes > self._max_bytes:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
        return features

    @staticmethod
    def _key(image: PreparedImage, adapter: int) -> Hashable:
        return image_identity(image), adapter
