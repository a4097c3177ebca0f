"""The one exception that the command line shows as a line instead of a traceback."""


class Mistake(Exception):
    """Something the user did or can put right; the text is one line that says how."""
