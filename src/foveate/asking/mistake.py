"""The one exception that the command line shows as a line instead of a traceback, and other errors as such a line."""


class Mistake(Exception):
    """Something the user did or can put right; the text is one line that says how."""


def one_line(error: BaseException) -> str:
    """The text of an exception on one line, shortened; its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
