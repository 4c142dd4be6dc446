"""Weights: PyTorch checkpoints in and out. Knows the models only."""
