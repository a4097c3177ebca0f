"""The error of everything that cannot be pruned correctly."""


class UnsupportedError(RuntimeError):
    """This model, cache or mode cannot be pruned correctly; the message says what to do instead.

    Raised before anything changes.
    """
