"""Asks a model questions, stores the answers, and writes figures and pages of a run."""
