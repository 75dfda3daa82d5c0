"""Questions that test two limits which the paper names: places in an image, and other languages."""
