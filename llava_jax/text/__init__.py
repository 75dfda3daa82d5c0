"""Text in and out of the model: tokenizers, conversation templates, tokens and labels. Imports no JAX."""
