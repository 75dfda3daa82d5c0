"""Defines the Flax NNX modules: the vision tower, the projector, the decoder, and LLaVA, which joins them."""
