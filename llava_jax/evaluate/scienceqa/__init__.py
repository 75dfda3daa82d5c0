"""ScienceQA: its problems, the task, and the ensemble with a language model."""
