"""Keep only the image tokens a vision-language model needs, training-free, through its own `generate()`."""

from importlib.metadata import version

from .engine import Pruned, PruneReport, UnsupportedError, prune
from .families import family_names as families
from .families import get_family
from .methods import get_method, method_class
from .methods import method_names as methods
from .methods.base import Method
from .methods.baselines import Random, Uniform
from .methods.fastv import FastV
from .methods.fopru import FoPru
from .methods.plphp import PLPHP
from .methods.trimmed_llama import TrimmedLlama

__version__ = version("foveate")
__all__ = [
    "PLPHP",
    "FastV",
    "FoPru",
    "Method",
    "PruneReport",
    "Pruned",
    "Random",
    "TrimmedLlama",
    "Uniform",
    "UnsupportedError",
    "families",
    "get_family",
    "get_method",
    "method_class",
    "methods",
    "prune",
]
