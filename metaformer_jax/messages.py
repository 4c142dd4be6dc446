"""Parts of messages: what is said of errors, and how much of a long list."""

from collections.abc import Sequence

_MAX_NAMED = 5


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the name of the error; no full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def first_few(lines: list[str], *, indent: str = "") -> list[str]:
    """The first lines of a message, and how many more there are."""
    more = len(lines) - _MAX_NAMED
    return [*lines[:_MAX_NAMED], *([f"{indent}and {more:,} more"] if more > 0 else [])]


def listing(names: Sequence[str]) -> str:
    """The first names in quotes, and how many more there are.

    >>> listing([])
    'nothing'
    """
    shown = ", ".join(map(repr, names[:_MAX_NAMED])) or "nothing"
    more = len(names) - _MAX_NAMED
    return f"{shown} and {more:,} more" if more > 0 else shown


def cut(text: str, length: int) -> str:
    """The text, or as much of it as fits into so many characters with an ellipsis.

    >>> cut("tench", 5), cut("great white shark", 12)
    ('tench', 'great white…')
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
