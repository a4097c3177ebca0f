"""Keep only the image tokens a vision-language model needs, through its own `generate()`.

Type checkers read `__init__.pyi`, which `python docs/generate.py` writes.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .families import family_names as families
from .families import get_family
from .methods import built_in_classes as _built_in_classes
from .methods import get_method, method_class
from .methods import method_names as methods

__version__ = version("foveate")
_QUICK = {
    "families": families,
    "get_family": get_family,
    "get_method": get_method,
    "method_class": method_class,
    "methods": methods,
}
# torch and transformers take seconds to import; `foveate --help` should not. The classes of the methods come from the
# registry, and `__all__` with them: both load the methods, and with them torch.
_LAZY = {
    **dict.fromkeys(("Pruned", "PruneReport", "UnsupportedError", "prune", "restore"), "engine"),
    "Method": "methods.base",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name in _LAZY:
        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    elif name == "__all__":
        value = sorted([*_QUICK, *_LAZY, *_built_in_classes()])
    elif name[:1].isupper() and name in (classes := _built_in_classes()):  # submodules and dunders load nothing
        value = classes[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
