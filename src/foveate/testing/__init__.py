"""For authors of plug-ins: the proof that foveate's own methods and families pass, on tiny random models.

Nothing is downloaded. Both functions raise AssertionError with a sentence that names method, family and what differs.
"""

from .families import check_family
from .methods import check_method
from .summary import Line, Summary

__all__ = ["Line", "Summary", "check_family", "check_method"]
