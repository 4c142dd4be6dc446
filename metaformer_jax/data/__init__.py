"""Data: sources, transforms, batches. Knows nothing of models."""
