"""Questions that test two limits named in the paper: positions in an image, and other languages."""
