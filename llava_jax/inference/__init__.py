"""Answers from a model: prompts are read at once, then tokens are written one by one with a key-value cache."""
