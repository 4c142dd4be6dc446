"""Errors with weights: files that do not fit, and downloads that fail."""


class CheckpointError(ValueError):
    """A file or its content is not what the model needs; nothing of it was used."""


class DownloadError(RuntimeError):
    """Published weights could not be fetched, or arrived damaged."""
