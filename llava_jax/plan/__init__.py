"""Predicts memory, time and cost of a recipe on a TPU slice, with the TPU compiler on any machine."""
