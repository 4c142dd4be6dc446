"""Errors with weights: files that do not fit, and downloads that fail."""


class CheckpointError(ValueError):
    """A file or its content is not what the model needs; nothing of it was used."""


class DownloadError(RuntimeError):
    """Published weights could not be fetched, or arrived damaged."""


def first_line(error: Exception) -> str:
    """The first line of another library's error message, or the name of the error."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
