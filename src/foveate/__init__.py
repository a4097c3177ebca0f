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
    from .methods.aircache import AirCache
    from .methods.base import Method
    from .methods.baselines import Random, RandomCache, RandomCross, RandomLayer, Uniform
    from .methods.csp import CSP
    from .methods.dart import DART
    from .methods.divprune import DivPrune
    from .methods.elastic_cache import ElasticCache
    from .methods.fastv import FastV
    from .methods.fopru import FoPru
    from .methods.mint import MINT
    from .methods.plphp import PLPHP
    from .methods.pooling import Pooling
    from .methods.pyramiddrop import PyramidDrop
    from .methods.sgl import SGL
    from .methods.sparsevlm import SparseVLM
    from .methods.topv import TopV
    from .methods.trimmed_llama import TrimmedLlama
    from .methods.visionzip import VisionZip
    from .methods.visual_snapkv import VisualSnapKV
    from .methods.vtc_cls import VTCCLS
    from .methods.zipvl import ZipVL

__version__ = version("foveate")
__all__ = [
    "CSP",
    "DART",
    "MINT",
    "PLPHP",
    "SGL",
    "VTCCLS",
    "AirCache",
    "DivPrune",
    "ElasticCache",
    "FastV",
    "FoPru",
    "Method",
    "Pooling",
    "PruneReport",
    "Pruned",
    "PyramidDrop",
    "Random",
    "RandomCache",
    "RandomCross",
    "RandomLayer",
    "SparseVLM",
    "TopV",
    "TrimmedLlama",
    "Uniform",
    "UnsupportedError",
    "VisionZip",
    "VisualSnapKV",
    "ZipVL",
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
    **dict.fromkeys(("Random", "RandomCache", "RandomCross", "RandomLayer", "Uniform"), "methods.baselines"),
    "FastV": "methods.fastv",
    "FoPru": "methods.fopru",
    "PLPHP": "methods.plphp",
    "TrimmedLlama": "methods.trimmed_llama",
    "DivPrune": "methods.divprune",
    "Pooling": "methods.pooling",
    "VTCCLS": "methods.vtc_cls",
    "VisionZip": "methods.visionzip",
    "AirCache": "methods.aircache",
    "CSP": "methods.csp",
    "ElasticCache": "methods.elastic_cache",
    "VisualSnapKV": "methods.visual_snapkv",
    "ZipVL": "methods.zipvl",
    "PyramidDrop": "methods.pyramiddrop",
    "SparseVLM": "methods.sparsevlm",
    "DART": "methods.dart",
    "TopV": "methods.topv",
    "SGL": "methods.sgl",
    "MINT": "methods.mint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
