"""Generates and scores text: prefill and decode with a key-value cache, and the public `Llava`."""
