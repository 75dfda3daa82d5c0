"""The two-stage schedule: the train step, its optimizer, checkpoints, metrics, and the loop over a recipe's stages."""
