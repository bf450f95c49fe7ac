"""Words of errors that others raise."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
