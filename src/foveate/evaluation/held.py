"""What the KV cache holds behind a prefill, beside what the report says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from foveate.engine.upstream import cache_behind, held_layers

if TYPE_CHECKING:
    from foveate.engine.report import PruneReport


@dataclass(frozen=True)
class Held:
    """What a cache layer holds: slots, bytes of a slot, of the tensors, and of their storage."""

    slots: int
    slot_bytes: int
    bytes: int
    storage: int

    @staticmethod
    def of(layer: Any) -> Held:
        """Of a layer with keys and values (batch, heads, slots, dim)."""
        tensors = [layer.keys, layer.values]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        size = sum(t.numel() * t.element_size() for t in tensors)
        slots = layer.keys.shape[-2]
        return Held(slots, size // max(slots, 1), size, sum(storages.values()))


@contextmanager
def note_held(base: nn.Module) -> Iterator[dict[int, Held]]:
    """Measure the cache behind the first forward, when the hooks of the pruning, which came first, have run."""
    held: dict[int, Held] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        cache = cache_behind(output)
        if not held and cache is not None:
            held.update((i, Held.of(layer)) for i, layer in held_layers(cache).items())

    with base.register_forward_hook(note):
        yield held


def faults(report: PruneReport, held: dict[int, Held]) -> Iterator[str]:
    """What the report says of the memory and the cache belies."""
    for layer, real in ((layer, held[layer.index]) for layer in report.layers if layer.index in held):
        assert layer.kept is not None
        kept = int(layer.kept.sum(-1).max())
        if layer.sliding:  # what the window left behind is kept, and held no more
            kept = min(kept, real.slots)
        if layer.kept_length != real.slots:
            yield f"layer {layer.index} reports {layer.kept_length} entries, but its cache has {real.slots}"
        elif kept < layer.length and (real.slots, real.storage) != (kept, kept * real.slot_bytes):
            yield (
                f"layer {layer.index} says that it keeps {kept} of {layer.length} entries, but its cache has "
                f"{real.slots} in {real.storage} bytes instead of {kept * real.slot_bytes}: not freed"
            )
    total = sum(real.bytes for real in held.values())
    if report.kv_bytes != total:
        yield f"the report says that the KV cache has {report.kv_bytes} bytes, but it has {total}"
