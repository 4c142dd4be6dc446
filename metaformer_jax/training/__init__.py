"""Training: recipes, the training step, and the training program around it."""
