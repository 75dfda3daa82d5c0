"""One benchmark a file: its questions, how it is scored, and its upload."""
