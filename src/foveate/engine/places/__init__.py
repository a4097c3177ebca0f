"""The places of action: one file each, all with the protocol of `place.py`. A new place is a file and an entry here."""

from .cache import CachePlace
from .cross import CrossPlace
from .decode import DecodePlace
from .depth import DepthPlace
from .encoder import EncoderPlace
from .guide import GuidePlace
from .layer import LayerPlace
from .logits import LogitsPlace
from .place import Action, Call, Place

__all__ = ["PLACES", "Action", "Call", "Place"]

PLACES: tuple[type[Place], ...] = (
    GuidePlace,
    LogitsPlace,
    EncoderPlace,
    LayerPlace,
    DepthPlace,
    CachePlace,
    DecodePlace,
    CrossPlace,
)
"""In the order in which they act."""
