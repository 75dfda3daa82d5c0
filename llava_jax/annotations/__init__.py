"""Captions and boxes of images: readers, what boxes say for certain, and words for it in English and Korean."""
