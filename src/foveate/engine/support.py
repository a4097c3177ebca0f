"""What can be pruned, and the refusals of everything else."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..families import get_family, unknown_family
from ..families.base import Family
from ..methods import get_method, method_class, method_names
from ..methods.base import Method
from ..methods.grammar import parse_method, shared
from ..methods.places import PLACES
from ..methods.tokens import ATTENTION
from ..registry import PluginError
from .target import Target
from .upstream import PreTrainedModel, cache_name

pruned_models: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""What prunes each base model, for as long as it does."""


def resolve_methods(
    method: str | Method | Sequence[Method | str] | None, options: dict[str, Any]
) -> tuple[Method, ...]:
    """The method objects that the arguments of `prune` ask for."""
    given = tuple(method) if isinstance(method, (list, tuple)) else (method,)
    if not given or not all(isinstance(m, (str, Method)) for m in given):
        raise ValueError(
            f"a method is a name ({', '.join(method_names())}), a method object such as foveate.FoPru(keep=0.25), or a "
            f"list of them, not {method!r}"
        )
    read = [parse_method(m) if isinstance(m, str) else m for m in given]
    if options and not all(isinstance(m, str) for m in given):
        raise ValueError(f"options ({', '.join(options)}) go with a method's name; give a method object its own")
    own = iter(shared([part for m in read if not isinstance(m, Method) for part in m], options))
    built: list[Method] = []
    for m in read:
        built += [m] if isinstance(m, Method) else [get_method(part.name, **next(own)) for part in m]
    return tuple(built)


def unwrapped(model: Any) -> Any:
    """The transformers model inside what wraps it: adapters of PEFT, torch.compile, a pipeline; others as they are.

    Raises:
        UnsupportedError: for adapters that put tokens of their own in front of a prompt.
    """
    while not isinstance(model, PreTrainedModel):
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise UnsupportedError(
                "prompt tuning puts tokens of its own in front of every prompt, which no report could place: use an "
                "adapter that changes weights, such as LoRA"
            )
        if hasattr(model, "get_base_model"):
            inside = model.get_base_model()
        else:
            inside = next((getattr(model, name) for name in ("_orig_mod", "model") if hasattr(model, name)), None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside
    return model


def find_target(model: Any) -> Target:
    """The model and its parts, or the reason why no method can prune it."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"foveate prunes transformers models, not a {type(model).__name__}; pass the model, or the PEFT model, "
            "compiled model or pipeline that holds one"
        )
    try:
        family = get_family(model.config)
    except PluginError as error:
        raise UnsupportedError(str(error)) from error
    if family is None:
        raise UnsupportedError(unknown_family(model.config.model_type))
    base = family.base(model)
    if not model.can_generate():
        raise UnsupportedError(f"pass the whole model, the one with generate(), not its {type(model).__name__}")
    decoder = family.decoder(base)
    if base in pruned_models:
        raise UnsupportedError(
            "this model is pruned already; remove() that first, or foveate.restore(model), or pass a list of methods"
        )
    if reason := family.check(base):
        raise UnsupportedError(f"foveate cannot prune this {family.model_type} model: {reason}")
    cache_name(base.forward)  # or the reason why there is none
    target = Target(model, family, base, decoder)
    check_attention(target)
    if target.norm is None or None in target.attentions().values():
        raise UnsupportedError(
            f"foveate does not know its way round a {decoder.config.model_type} decoder: it needs layers with "
            "self_attn and a norm behind them; use a model with another language model"
        )
    return target


def check_attention(target: Target) -> None:
    """Refuse attention that foveate cannot follow."""
    implementation = target.decoder.config._attn_implementation
    if implementation not in ("eager", "sdpa") and not implementation.startswith("flash_attention"):
        raise UnsupportedError(
            f"foveate does not know the attention implementation {implementation!r}; load the model with "
            'attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    if "flash" in implementation and (any(target.windows) or not getattr(target.base, "_supports_flash_attn", True)):
        raise UnsupportedError(
            "this decoder sees a window, or images both ways, and flash attention takes no masks that say so once "
            'tokens are dropped: load the model with attn_implementation="sdpa"'
        )


def reads_encoder(method: Method) -> bool:
    """Whether a method reads what happens between the layers of a vision encoder."""
    return bool(getattr(method, "reads", frozenset()) & (ATTENTION | {"levels", "readers"}))


def fitting(family: Family) -> list[str]:
    """The methods that find in models of this family what they need."""
    carries = type(family).keys_and_values is not Family.keys_and_values

    def fits(name: str) -> bool:
        place = method_class(name).place
        if place != "encoder" or place not in family.places:
            return place in family.places
        method = get_method(name)
        if "readers" in getattr(method, "reads", ()) and not carries:
            return False
        return family.shows_attention or not reads_encoder(method)

    return [name for name in method_names() if fits(name)]


def fitting_in_words(family: Family, quote: str = "") -> str:
    """The same in as few words as it takes, such as "all but vistog". quote: around each name."""
    fits = fitting(family)
    named, others = ([f"{quote}{n}{quote}" for n in method_names() if (n in fits) is fit] for fit in (True, False))
    if len(named) <= len(others):
        return ", ".join(named)
    return f"all but {', '.join(others)}" if others else "all"


def check_methods(target: Target, methods: Sequence[Method]) -> None:
    """Refuse methods whose place the model does not offer, and two of one place."""
    taken: dict[str, str] = {}
    for method in methods:
        if method.place not in target.family.places:
            raise UnsupportedError(
                f"{method.name} acts {PLACES[method.place]}, which {target.family.model_type} does not offer; "
                f"methods that fit: {', '.join(fitting(target.family))}"
            )
        if reads_encoder(method) and not target.family.shows_attention:
            others = [name for name in fitting(target.family) if method_class(name).place == "encoder"]
            raise UnsupportedError(
                f"{method.name} reads the layers of the vision encoder, and that of {target.family.model_type} models "
                f"shows none whose tokens are the LLM's: use a method that does not ({', '.join(others)}), or one "
                "inside the LLM"
            )
        if other := taken.get(method.place):
            raise UnsupportedError(
                f"{other} and {method.name} both act {PLACES[method.place]}; use one of them, "
                "or methods of other places"
            )
        taken[method.place] = method.name


def check_inputs(target: Target, kwargs: dict[str, Any], brings_images: bool) -> None:
    """Refuse what a forward of the base model cannot do while tokens are dropped. kwargs: its arguments."""
    decoder = target.decoder
    check_attention(target)  # it may have been switched since the model was pruned
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        raise UnsupportedError("gradient checkpointing runs layers a second time: prune in eval() mode, or without it")
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedError("foveate needs the 2-D attention mask of the processor, not a prepared 4-D mask")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        positions = positions[0]  # of text, or of time: those of height and width start again in every picture
    if brings_images and mask is None and positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise UnsupportedError(
            "these position ids start again inside a row, as those of samples packed into one do, and samples cannot "
            "be told apart once tokens were dropped: pass them as a batch, padded, with an attention mask"
        )
    videos = (kwargs.get("pixel_values_videos"), (kwargs.get("mm_encoder_outputs") or {}).get("video"))
    if any(given is not None for given in videos) and "video" not in target.token_ids:
        raise UnsupportedError(
            f"foveate knows where the images of {target.family.model_type} models lie, not the frames of their videos: "
            "pass the frames as images (and say so with `with pruned.clips(frames):`), or run videos outside the block"
        )
    if brings_images and "encoder" in target.family.places and kwargs.get("input_ids") is None:
        raise UnsupportedError("foveate finds image tokens by their ids: pass input_ids, not inputs_embeds")
    for name in ("output_attentions", "output_hidden_states"):
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(target.base.config, name, False)):
            raise UnsupportedError(
                f"{name} would return tensors of different lengths per layer while tokens are dropped; ask for it "
                "outside the pruned block, or read the report (record=True)"
            )
