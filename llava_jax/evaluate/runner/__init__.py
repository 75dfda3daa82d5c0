"""Puts questions to a model, keeps the answers, and writes figures and pages of a run."""
