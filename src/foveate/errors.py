"""The error of everything that cannot be pruned correctly, and a warning about what is seldom meant."""


class UnsupportedError(RuntimeError):
    """This model, cache or mode cannot be pruned correctly; the message says what to do instead.

    Raised before anything changes.
    """


class KeepsOneToken(UserWarning):
    """`keep=1` was given, which is one token of each image, where other notations write 1 for all of them."""
