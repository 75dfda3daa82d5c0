"""Captions and boxes of images: readers, facts that follow from boxes, and their words in English and Korean."""
