"""Benchmarks, one a file: questions, scoring, and files to upload."""
