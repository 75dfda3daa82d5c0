"""Converts text to tokens and back: tokenizers, conversation templates, labels. Imports no JAX."""
