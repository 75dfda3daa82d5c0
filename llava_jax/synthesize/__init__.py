"""Instruction data, made from captions and boxes."""
