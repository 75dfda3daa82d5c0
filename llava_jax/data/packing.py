"""Which conversations share a row: long ones with short ones, so that tokens and image slots are used up together."""

from collections.abc import Sequence

import numpy as np

from llava_jax.errors import UserError

WINDOW = 8192  # records packed together: more fill rows better, but all are tokenised before the first row is ready


def pack(tokens: Sequence[int], images: Sequence[int], sequence_length: int, tiles_per_sequence: int
         ) -> list[list[int]]:
    """Groups records into rows of at most `sequence_length` tokens and `tiles_per_sequence` images.

    `tokens[i]` and `images[i]` are the record's. A row begins with the longest record that is left. As many records
    with images follow as slots and tokens allow, each the longest up to its share of the tokens that are free, the last
    one up to all of them; then records without images, each the longest that fits. (Best fit decreasing, the usual
    choice, joins long records with long ones, and at the end is left with short ones that fill the slots but not the
    tokens.)

    Returns the rows as ascending lists of i, in the order of their first record. Raises UserError for a record that
    fits into no row.
    """
    tokens, images = np.asarray(tokens, np.int64), np.asarray(images, np.int64)
    for number in np.flatnonzero((tokens > sequence_length) | (images > tiles_per_sequence))[:1]:
        raise UserError(f"record {number} has {tokens[number]} tokens and {images[number]} images: more than a row's "
                         f"{sequence_length} and {tiles_per_sequence}")
    left = _Left(tokens.tolist(), images.tolist(), tiles_per_sequence)
    rows = []
    while left.number:
        count, length = left.longest(sequence_length, tiles_per_sequence, 0)
        row, space, slots = [left.take(count, length)], sequence_length - length, tiles_per_sequence - count
        while shortest := left.shortest(slots):
            several = min(slots, space // shortest)
            if not several:
                break
            found = left.longest(space // several, slots, 1) or left.shortest_from(space // several, slots)
            if found is None or found[1] > space:
                break
            row.append(left.take(*found))
            space, slots = space - found[1], slots - found[0]
        while found := left.longest(space, 0, 0):
            row.append(left.take(*found))
            space -= found[1]
        rows.append(sorted(row))
    return sorted(rows, key=lambda row: row[0])


class _Left:
    """The records that are in no row yet, by number of images and length.

    Bit t of `lengths[c]` says that there is a record of t tokens with c images: an integer of some thousand bits
    answers which length is nearest to another in a microsecond.
    """

    def __init__(self, tokens: list[int], images: list[int], tiles_per_sequence: int):
        self.number = len(tokens)
        self.records: dict[tuple[int, int], list[int]] = {}
        self.lengths = [0] * (tiles_per_sequence + 1)
        for i in reversed(range(len(tokens))):
            self.records.setdefault((images[i], tokens[i]), []).append(i)
            self.lengths[images[i]] |= 1 << tokens[i]

    def longest(self, most: int, most_images: int, fewest_images: int) -> tuple[int, int] | None:
        """(images, tokens) of the longest record of at most so many tokens."""
        mask = (2 << most) - 1
        counts = range(fewest_images, most_images + 1)
        length, count = max(((self.lengths[c] & mask).bit_length() - 1, c) for c in counts)
        return (count, length) if length >= 0 else None

    def shortest_from(self, least: int, most_images: int) -> tuple[int, int] | None:
        """(images, tokens) of the shortest record with an image, of at least so many tokens."""
        found = []
        for count in range(1, most_images + 1):
            lengths = self.lengths[count] >> least
            if lengths:
                found.append((least + (lengths & -lengths).bit_length() - 1, count))
        length, count = min(found, default=(-1, 0))
        return (count, length) if length >= 0 else None

    def shortest(self, most_images: int) -> int:
        """Tokens of the shortest record with an image; 0 if there is none."""
        found = self.shortest_from(0, most_images)
        return found[1] if found else 0

    def take(self, count: int, length: int) -> int:
        """Removes a record of this kind, the first that is left."""
        here = self.records[count, length]
        self.number -= 1
        if len(here) == 1:
            self.lengths[count] ^= 1 << length
        return here.pop()
