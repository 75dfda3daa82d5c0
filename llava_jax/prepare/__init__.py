"""The commands of `python -m llava_jax.prepare`: data checked, shown, packed, divided and fetched."""
