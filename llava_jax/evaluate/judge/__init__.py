"""A language model as the judge of open answers."""
