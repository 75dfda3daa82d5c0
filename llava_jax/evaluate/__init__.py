"""Questions with known answers, put to a model."""
