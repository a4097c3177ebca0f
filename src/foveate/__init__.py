"""Keep only the image tokens a vision-language model needs, training-free, through its own `generate()`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .families import family_names as families
from .families import get_family
from .methods import get_method, method_class
from .methods import method_names as methods

if TYPE_CHECKING:
    from .engine import Pruned, PruneReport, UnsupportedError, prune
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
# torch and transformers take seconds to import; `foveate --help` should not.
_LAZY = {
    **dict.fromkeys(("Pruned", "PruneReport", "UnsupportedError", "prune"), "engine"),
    "Method": "methods.base",
    **dict.fromkeys(("Random", "Uniform"), "methods.baselines"),
    "FastV": "methods.fastv",
    "FoPru": "methods.fopru",
    "PLPHP": "methods.plphp",
    "TrimmedLlama": "methods.trimmed_llama",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
