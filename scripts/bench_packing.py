"""Compares packed sequences with padded batches grouped by modality and length, on one epoch of the same records.

python scripts/bench_packing.py [--scale 0.1]                                     lengths like those of LLaVA-1.5's mix
python scripts/bench_packing.py --data data/llava_v1_5_mix665k.json --model DIR   the true lengths of a data set

The counterpart is the original's training of LLaVA-1.5 (group_by_modality_length, 8 devices with 16 samples each).
Samples with and without an image are separate groups. 128 random samples at a time are sorted by their words, and
distributed so that all devices get as many words. Every device pads its 16 samples to the longest.
"""

import argparse

import numpy as np

from llava_jax.data.packing import WINDOW, pack
from llava_jax.images import ImageProcessor

DEVICES, BATCH = 8, 16
VISUAL_TOKENS, MAX_TOKENS = ImageProcessor().features_per_tile, 2048
TOKENS_PER_WORD = 1.35
SYSTEM_TOKENS = 36
"""Number of tokens of a conversation besides turns and images: the system text and the roles."""
MIX_665K = (
    ("conversations", 57_000, 1, 280, 90), ("descriptions", 23_000, 1, 150, 40), ("reasoning", 77_712, 1, 240, 60),
    ("VQAv2", 82_783, 1, 100, 35), ("GQA", 72_140, 1, 220, 100), ("OKVQA", 8_998, 1, 45, 10),
    ("OCR-VQA", 80_000, 1, 110, 25), ("A-OKVQA", 66_160, 1, 65, 12), ("TextCaps", 21_953, 1, 120, 60),
    ("RefCOCO", 48_447, 1, 350, 200), ("VG", 86_417, 1, 550, 250), ("ShareGPT", 40_688, 0, 1000, 800),
)
"""Parts of LLaVA-1.5's mix: name, records, images of a record, and mean and standard deviation of its tokens without
image. The counts are published. The tokens are estimates by kind of text."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.1, help="share of the mix's 665,298 records that is drawn")
    parser.add_argument("--data", default="", help="data set whose lengths are used instead")
    parser.add_argument("--model", default="", help="with --data: a LLaVA, for its tokenizer and template")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens, words, images = read(options.data, options.model) if options.data else made_up(rng, options.scale)
    print(f"{len(tokens):,} records, {(images == 0).sum():,} without an image; {tokens.mean():.0f} tokens on average")
    padded = sum(BATCH * tokens[batch].max() for batch in grouped_batches(words, images > 0, rng))
    print(f"\ngrouped by modality and length, padded: {padded:,} positions, {tokens.sum() / padded:.1%} tokens")
    print("\n| sequence_length | tiles_per_sequence | token fill | tile fill | positions, grouped / packed | "
          "padding, the same |")
    print("|---|---|---|---|---|---|")
    order = rng.permutation(len(tokens))
    windows = [order[at : at + WINDOW] for at in range(0, len(order), WINDOW)]
    for length, slots in ((2048, 2), (2048, 3), (2560, 3), (3072, 4), (4096, 5)):
        if images.max() > slots or tokens.max() > length:
            continue
        sequences = sum(len(pack(tokens[window], images[window], length, slots)) for window in windows)
        positions = sequences * length
        print(f"| {length} | {slots} | {tokens.sum() / positions:.1%} | {images.sum() / (sequences * slots):.1%} "
              f"| {padded / positions:.2f} | {(padded - tokens.sum()) / (positions - tokens.sum()):.1f} |")


def made_up(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws tokens, words and images of `scale` times the records of LLaVA-1.5's mix, log-normally distributed."""
    counts = [round(records * scale) for _, records, *_ in MIX_665K]
    spreads = [np.log(1 + (sd / mean) ** 2) for *_, mean, sd in MIX_665K]
    text = np.concatenate([rng.lognormal(np.log(mean) - spread / 2, np.sqrt(spread), count)
                           for (*_, mean, _), spread, count in zip(MIX_665K, spreads, counts, strict=True)])
    images = np.repeat([part[2] for part in MIX_665K], counts)
    tokens = np.minimum(SYSTEM_TOKENS + text + VISUAL_TOKENS * images, MAX_TOKENS).astype(int)
    return tokens, np.maximum(text / TOKENS_PER_WORD, 1).astype(int), images


def read(data: str, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads tokens, words and images of the usable rows of a data set."""
    from llava_jax.data.sources import open_mixture
    from llava_jax.prepare.settings import Settings
    from llava_jax.text.encode import encode_conversation

    settings, found, bad = Settings.load(model, ""), [], 0
    for source in open_mixture(data).sources:
        for i in range(len(source)):
            try:
                record = source[i]
                example = encode_conversation(record.turns, settings.template, settings.tokenizer,
                                              settings.processor.features_per_tile, MAX_TOKENS)
            except ValueError:
                bad += 1
                continue
            words = sum(len(turn["value"].split()) for turn in record.turns)
            found.append((len(example.tokens), words, len(record.images)))
    print(f"{bad:,} rows that cannot be used are left out")
    return tuple(np.array(found).T)


def grouped_batches(words: np.ndarray, has_image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the records of every device's batches over an epoch."""
    mega, last = [], []
    for kind in (True, False):
        order = rng.permutation(np.flatnonzero(has_image == kind))
        ordered = np.concatenate([deal(order[at : at + DEVICES * BATCH], words)
                                  for at in range(0, len(order), DEVICES * BATCH)] or [order])
        parts = [ordered[at : at + DEVICES * BATCH] for at in range(0, len(ordered), DEVICES * BATCH)]
        mega, last = mega + parts[:-1], last + parts[-1:]
    rng.shuffle(mega)
    order = np.concatenate([*mega, np.sort(np.concatenate(last))])
    return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]


def deal(records: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Distributes records, the longest first, to the device with the fewest words that is not full."""
    records = records[np.argsort(-words[records], kind="stable")]
    if len(records) % DEVICES:
        return np.concatenate([records[device::DEVICES] for device in range(DEVICES)])
    chunks, sums = [[] for _ in range(DEVICES)], [0.0] * DEVICES
    for record in records:
        device = int(np.argmin(sums))
        chunks[device].append(record)
        sums[device] = np.inf if len(chunks[device]) == len(records) // DEVICES else sums[device] + words[record]
    return np.concatenate(chunks)


if __name__ == "__main__":
    main()
