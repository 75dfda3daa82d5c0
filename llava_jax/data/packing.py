"""Packs conversations into sequences: long with short ones, so that both tokens and tiles are used up."""

from collections.abc import Sequence

import numpy as np

from llava_jax.errors import UserError

WINDOW = 8192
"""Number of records packed together. More would fill sequences better, but all are tokenised before the first one."""


def pack(tokens: Sequence[int], tiles: Sequence[int], sequence_length: int, tiles_per_sequence: int
         ) -> list[list[int]]:
    """Groups records into sequences of at most `sequence_length` tokens and `tiles_per_sequence` tiles.

    `tokens[i]` and `tiles[i]` are the numbers of record i. A sequence starts with the longest remaining record. Records
    with tiles follow, as many as free tiles and tokens allow: each is the longest within its share of the free tokens,
    and the last one may use all of them. Then records without tiles follow, each the longest that there is room for.
    (Best-fit decreasing, the usual choice, packs long records with long ones. The last sequences then have short ones,
    which fill the tiles but not the tokens.)

    Returns ascending lists of i, in the order of their first record. Raises UserError for a record that is larger than
    a sequence.
    """
    tokens, tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    too_large = np.flatnonzero((tokens > sequence_length) | (tiles > tiles_per_sequence))
    if len(too_large):
        number = too_large[0]
        raise UserError(f"record {number} has {tokens[number]} tokens and {tiles[number]} tiles: more than a "
                        f"sequence's {sequence_length} and {tiles_per_sequence}")
    remaining = _Remaining(tokens.tolist(), tiles.tolist(), tiles_per_sequence)
    sequences = []
    while remaining.number:
        count, length = remaining.longest(sequence_length, tiles_per_sequence, 0)
        chosen = [remaining.remove(count, length)]
        free_tokens, free_tiles = sequence_length - length, tiles_per_sequence - count
        while shortest := remaining.shortest(free_tiles):
            max_records = min(free_tiles, free_tokens // shortest)
            if not max_records:
                break
            share = free_tokens // max_records
            size = remaining.longest(share, free_tiles, 1) or remaining.shortest_from(share, free_tiles)
            if size is None or size[1] > free_tokens:
                break
            chosen.append(remaining.remove(*size))
            free_tokens, free_tiles = free_tokens - size[1], free_tiles - size[0]
        while size := remaining.longest(free_tokens, 0, 0):
            chosen.append(remaining.remove(*size))
            free_tokens -= size[1]
        sequences.append(sorted(chosen))
    return sorted(sequences, key=lambda chosen: chosen[0])


class _Remaining:
    """The records that are in no sequence yet, by number of tiles and tokens.

    Bit t of the integer `lengths[c]` is set if there is a record of t tokens with c tiles. Such an integer of some
    thousand bits returns the nearest length to another in a microsecond.
    """

    def __init__(self, tokens: list[int], tiles: list[int], tiles_per_sequence: int):
        self.number = len(tokens)
        self.records: dict[tuple[int, int], list[int]] = {}
        self.lengths = [0] * (tiles_per_sequence + 1)
        for i in reversed(range(len(tokens))):
            self.records.setdefault((tiles[i], tokens[i]), []).append(i)
            self.lengths[tiles[i]] |= 1 << tokens[i]

    def longest(self, max_tokens: int, max_tiles: int, min_tiles: int) -> tuple[int, int] | None:
        """Returns (tiles, tokens) of the longest record within these limits."""
        mask = (2 << max_tokens) - 1
        counts = range(min_tiles, max_tiles + 1)
        length, count = max(((self.lengths[c] & mask).bit_length() - 1, c) for c in counts)
        return (count, length) if length >= 0 else None

    def shortest_from(self, min_tokens: int, max_tiles: int) -> tuple[int, int] | None:
        """Returns (tiles, tokens) of the shortest record with a tile and at least `min_tokens` tokens."""
        candidates = []
        for count in range(1, max_tiles + 1):
            lengths = self.lengths[count] >> min_tokens
            if lengths:
                candidates.append((min_tokens + (lengths & -lengths).bit_length() - 1, count))
        length, count = min(candidates, default=(-1, 0))
        return (count, length) if length >= 0 else None

    def shortest(self, max_tiles: int) -> int:
        """Returns the number of tokens of the shortest record with a tile; 0 if there is none."""
        record = self.shortest_from(0, max_tiles)
        return record[1] if record else 0

    def remove(self, count: int, length: int) -> int:
        """Removes the first remaining record of these numbers and returns it."""
        same_size = self.records[count, length]
        self.number -= 1
        if len(same_size) == 1:
            self.lengths[count] ^= 1 << length
        return same_size.pop()
