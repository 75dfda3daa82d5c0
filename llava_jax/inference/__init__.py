"""Generates and scores text: prefill, insert and decode with a key-value cache, and the public `Llava`."""
