"""What a recipe takes on a TPU slice, found out with the TPU compiler on any machine."""
