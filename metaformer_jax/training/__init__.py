"""Training: the recipe, the step, the run. Takes models and data as arguments."""
