"""Commands that check, show, pack, split, sample, mix, filter and fetch instruction data."""
