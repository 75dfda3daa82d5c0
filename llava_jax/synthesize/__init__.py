"""Instruction data from captions and boxes."""
