"""What goes wrong with weights: files that do not fit, and files that do not arrive."""


class CheckpointError(ValueError):
    """A file or its content is not what the model needs; nothing of it was used."""


class DownloadError(RuntimeError):
    """Published weights could not be fetched, or arrived damaged."""


def first_line(error: Exception) -> str:
    """What an error of another library says, without the rest of its story."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
