"""A device that is not there: its tensors are computed on the CPU, and what a real device would punish is seen.

Operations that mix it with the CPU fail, and those that make the host wait for it are noted.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
ASSIGNS = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Their results, or the sizes of these, depend on values.
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}


class Pretended(Tensor):
    """A tensor on the device. held: what it is, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.cpu()!r} on {DEVICE}"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Device() as device:
            return device.__torch_dispatch__(func, types, args, kwargs)


class _Lists(TorchFunctionMode):
    """torch.tensor([...]) reads tensors in its list where no dispatch mode can see it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            args = tree_map_only(Pretended, lambda t: t.item(), args)
        return func(*args, **(kwargs or {}))


class Device(TorchDispatchMode):
    """While entered, the device exists. waits: a stack for every operation that the host had to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.before: list[bool] = []
        self.lists = _Lists()

    def __enter__(self) -> Device:
        # torch.tensor(data, device=...) is seen here only if it makes its tensor on the CPU and moves it then.
        self.before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.lists.__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self.before.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        away = [t for t in tensors if isinstance(t, Pretended)]
        asked = kwargs.get("device")
        lands = bool(away) if asked is None else torch.device(asked).type == DEVICE.type
        if func is aten.copy_.default:
            lands = isinstance(args[0], Pretended)
        if not away and not lands:
            return func(*args, **kwargs)
        if func in COPIES:
            waits = not lands or len(away) < len(tensors)
        else:
            indexes = func is aten.index.Tensor or func in ASSIGNS
            index = [i for i in args[1] if i is not None] if indexes else []
            brought = [t for t in tensors if t.ndim and not isinstance(t, Pretended)]
            if any(all(t is not i for i in index) for t in brought):  # an index may come from the CPU
                raise RuntimeError(f"{func} mixes the device and the CPU")
            # To select by a mask its places must be counted; one value for all of them is filled in without.
            masks = any(i.dtype in (torch.bool, torch.uint8) for i in index)
            counts = masks and (func is aten.index.Tensor or args[2].numel() > 1)
            waits = func in WAITS or counts or bool(brought)
        if waits:
            self.waits.append("".join(traceback.format_stack(limit=16)[:-1]))
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*_here(args), **_here(kwargs))
        if func is aten.copy_.default:
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, _there(out)) if lands else out


def _here(tree: Any) -> Any:
    return tree_map_only(Pretended, lambda t: t.held, tree)


def _there(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t if isinstance(t, Pretended) else Pretended(t), tree)


def move(model: nn.Module) -> nn.Module:
    """Put a model on the device, in place."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(Pretended(weight.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Pretended(buffer)
    return model


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    """The same inputs on the device."""
    return _there(batch)
