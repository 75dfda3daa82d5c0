"""Reads training data of every format as Records, and packs them into batches with Grain."""
