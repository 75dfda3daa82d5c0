"""The parts of train_mini_backbones.py."""
