"""Benchmarks: questions with known answers for a model."""
