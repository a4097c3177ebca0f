"""`prune`: installing a method on a model, and taking it off again."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..families.base import Family, Tile
from ..methods.base import (
    CacheMethod,
    ContrastMethod,
    CrossMethod,
    EncoderMethod,
    GuidedMethod,
    LayerMethod,
    Method,
)
from .attention import add_routes, remove_routes
from .cache import active, adopt_cache, check_cache, new_cache
from .contrast import Contrast
from .errors import UnsupportedError
from .forward import Forward
from .guide import Guide, GuideAnswer
from .report import PruneReport
from .support import check_inputs, check_model, pruned_models, resolve_methods
from .upstream import PreTrainedModel, cache_in, cache_name, without_cache
from .vision import Vision

# What a forward over later tokens of the same prompt must not bring again.
_IMAGE_INPUTS = (
    "pixel_values", "mm_encoder_outputs", "image_sizes", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask"
)  # fmt: skip


def prune(
    model: PreTrainedModel,
    method: str | Method | Sequence[Method | str],
    *,
    record: bool = False,
    **options: Any,
) -> Pruned:
    """Make `model` keep only the image tokens it needs, through its own `generate()` and forward.

    Works from this call until `remove()`; as a context manager until the block ends, however it ends.

    model: a transformers model of a supported family. method: a name (with its `options`), a method object, or a
    list of them that act at different places; each chooses among the tokens that the ones before it left.
    record: also keep boolean masks of what every layer and head kept in `report.layers`.

    Raises:
        ValueError: an unknown method or option, or a value outside its range.
        UnsupportedError: a model, method or mode that cannot be pruned correctly. Modes that only show when
            the model runs (cache kinds, custom masks, videos) raise then, before anything changes.
    """
    methods = resolve_methods(method, options)
    return Pruned(model, *check_model(model, methods), methods, record)


class _Thread(threading.local):
    """What one thread is doing with the model.

    entered: forwards of the base model that it is in, None for one that was refused. first: what generate() said of
    the step it is about to make. candidates: guessed tokens at the end of the coming forward. verifies: whether it
    checks guesses.
    """

    def __init__(self) -> None:
        self.entered: list[Forward | None] = []

    first: bool | None = None
    candidates = 0
    verifies = False


class Pruned:
    """A pruned model: what `prune` returns.

    report: what the last prefill kept; None before the first, and when the last answer is a guide's.
    guided: what the guide said last, for methods that have one.
    """

    def __init__(self, model: Any, family: Family, base: Any, methods: tuple[Method, ...], record: bool) -> None:
        self.model, self.family, self.base, self.methods = model, family, base, methods
        self.decoder = family.decoder(base)
        self.record = record
        self.report: PruneReport | None = None
        self.guided: GuideAnswer | None = None
        # With keep = 1.0 a method has nothing to say, and the model runs as it is.
        acting = [m for m in methods if not m.keeps_all]
        self.encoder_method = next((m for m in acting if isinstance(m, EncoderMethod)), None)
        self.layer_method = next((m for m in acting if isinstance(m, LayerMethod)), None)
        self.cache_method = next((m for m in acting if isinstance(m, CacheMethod)), None)
        self.cross_method = next((m for m in acting if isinstance(m, CrossMethod)), None)
        self.acts_in_decoder = bool(acting)
        self.needs_cache = any(m.place != "encoder" for m in methods)
        self.kinds: list[Any] = [
            "cross" if hasattr(layer, family.cross_attention) else "self" for layer in self.decoder.layers
        ]
        self.text_layers = [i for i, kind in enumerate(self.kinds) if kind == "self"]
        crosses = "cross" in self.kinds
        self.stages = self.layer_method.stages(len(self.kinds)) if self.layer_method is not None else ()
        self.features_per_image = family.features_per_image(base) if crosses else 0
        self.image_token_id = -1 if crosses else family.image_token_id(base)
        layer = self.layer_method
        self.guide = Guide(self, layer) if isinstance(layer, GuidedMethod) else None
        self.contrast = Contrast(self, layer) if isinstance(layer, ContrastMethod) else None
        self._parameters = list(inspect.signature(base.forward).parameters)
        self._cache_name = cache_name(base.forward)
        self._thread = _Thread()
        self._replaced: list[tuple[Any, str, Any]] = []
        self._handles: list[Any] = []
        self._routed: list[Any] = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    # -- installing -------------------------------------------------------------------------------------------

    def _install(self) -> None:
        pruned_models.add(self.base)
        hooks = self._handles
        hooks.append(self.base.register_forward_pre_hook(self._enter, with_kwargs=True))
        hooks.append(self.base.register_forward_hook(self._exit, always_call=True))
        hooks.append(self.model.register_forward_pre_hook(self._announce, with_kwargs=True))
        self._wrap(self.model, "prepare_inputs_for_generation", self._prepare)
        around = self.guide or self.contrast
        if around is not None:
            self._wrap(self.model, "generate", around.generate)
        routes: dict[Any, Any] = {}
        if self.acts_in_decoder:
            for index, (kind, layer) in enumerate(zip(self.kinds, self.decoder.layers, strict=True)):
                attention = getattr(layer, getattr(self.family, f"{kind}_attention"))
                routes[attention] = functools.partial(self._attend, kind, index)
        if "encoder" in self.family.places:
            vision = Vision(self.family, self.base, self.encoder_method)
            self._wrap(self.base, "get_image_features", vision.encode)
            hooks += vision.hooks()
            routes.update(vision.routes())
        add_routes(routes)
        self._routed = list(routes)

    def _watch_layers(self, forward: Forward) -> None:
        """Drop rows in front of the layers, in this forward only: decoding steps do without these hooks."""
        before = functools.partial(self._before_layer, forward)
        forward.hooks = [
            layer.register_forward_pre_hook(functools.partial(before, index), with_kwargs=True)
            for index, layer in enumerate(self.decoder.layers)
        ]
        forward.hooks.append(self.decoder.norm.register_forward_hook(functools.partial(self._after_layers, forward)))

    def _wrap(self, module: Any, name: str, wrapper: Any) -> None:
        original = getattr(module, name)

        # generate() reads the signatures of both methods to know what to pass.
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, args, kwargs)

        self._replaced.append((module, name, module.__dict__.get(name)))
        setattr(module, name, wrapped)

    def remove(self) -> None:
        """Restore the model to what it was; harmless when done already."""
        remove_routes(self._routed)
        # An interrupt inside a forward skips its last hook.
        while active.forward is not None and active.forward.session is self:
            active.forward.unhook()
            active.forward = active.forward.outer
        self._thread.entered.clear()
        for handle in self._handles:
            handle.remove()
        for module, name, previous in self._replaced:
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        self._handles, self._routed, self._replaced = [], [], []
        pruned_models.discard(self.base)

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"<foveate.Pruned {self.family.model_type} model, {state}: {self.report or 'no prefill yet'}>"

    def __deepcopy__(self, memo: object) -> Pruned:
        raise UnsupportedError("a pruned model cannot be copied: copy it before foveate.prune or after remove()")

    def __enter__(self) -> Pruned:
        """The pruned model itself; pruning began when it was made."""
        if not self._handles:
            raise UnsupportedError("this pruning was removed already; call foveate.prune again")
        return self

    def __exit__(self, *exception: object) -> None:
        """See `remove`."""
        self.remove()

    # -- what generate() is about to do -----------------------------------------------------------------------

    def _prepare(self, prepare: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # generate() reads the last logits only; assisted decoding asks for more, but after this call.
        if isinstance(kwargs.get("logits_to_keep"), int):
            kwargs["logits_to_keep"] = 1
        inputs = prepare(*args, **kwargs)
        self._thread.first = bool(kwargs.get("is_first_iteration", False))
        return inputs

    def _announce(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Assisted decoding guesses tokens ahead; only here it says how many of the coming ones are guesses."""
        if self.contrast is not None:
            self.contrast.note(kwargs)
        first, self._thread.first = self._thread.first, None
        wanted = kwargs.get("logits_to_keep")
        self._thread.candidates = wanted - 1 if first is not None and isinstance(wanted, int) and wanted > 1 else 0
        self._thread.verifies = first is False

    def _prefill_prompt(self, kwargs: dict[str, Any], candidates: int) -> tuple[dict[str, Any], Tensor]:
        """Run the prompt without the guessed tokens behind it, so that methods see its true end.

        Returns the arguments of the forward over the guesses, and the prompt's hidden states.
        """
        prompt = kwargs["input_ids"].shape[1] - candidates
        head, tail = dict(kwargs), {k: v for k, v in kwargs.items() if k not in _IMAGE_INPUTS}
        for name, dim in (("input_ids", 1), ("position_ids", -1), ("mm_token_type_ids", -1)):
            if kwargs.get(name) is not None:
                head[name], tail[name] = kwargs[name].tensor_split([prompt], dim=dim)
        if kwargs.get("attention_mask") is not None:
            head["attention_mask"] = kwargs["attention_mask"][:, :-candidates]
        return tail, self.base(**head).last_hidden_state

    # -- the forward pass -------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        outer, forward = active.forward, None
        try:
            kwargs, forward = self._begin(args, kwargs)
            if forward is not None:
                forward.outer, active.forward = outer, forward
            return (), kwargs
        finally:
            # The hook behind the forward runs even when it was refused here.
            self._thread.entered.append(forward)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Forward | None]:
        candidates, self._thread.candidates = self._thread.candidates, 0
        verifies, self._thread.verifies = self._thread.verifies, False
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        encoded = kwargs.get("mm_encoder_outputs") or {}
        brings_images = (
            kwargs.get("pixel_values") is not None
            or encoded.get("image") is not None
            or kwargs.get("cross_attention_states") is not None
        )
        if self.contrast is not None and not self.contrast.reduced:
            self.contrast.check(brings_images)
            return kwargs, None
        cache = cache_in(kwargs)
        if cache is not None:
            check_cache(cache)
        check_inputs(self.family, self.base.config, kwargs, brings_images)
        if self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise UnsupportedError(
                "gradient checkpointing runs layers a second time: prune in eval() mode, or without it"
            )
        if candidates and self.cross_method is not None:
            raise UnsupportedError(
                "assisted decoding would crop the image features of cross-attention layers: generate without "
                "prompt_lookup_num_tokens or an assistant model"
            )
        if candidates and self.cache_method is not None and self.cache_method.decode_distance is not None:
            raise UnsupportedError(
                f"{self.cache_method.name} evicts at every decoding step, and assisted decoding takes several at once: "
                "generate without prompt_lookup_num_tokens or an assistant model, or with decode_distance=None"
            )
        use_cache = kwargs.get("use_cache")
        use_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = new_cache(self.decoder.config)
        if cache is not None:
            adopt_cache(cache, self.kinds)
            kwargs = {**without_cache(kwargs), self._cache_name: cache}
        elif self.needs_cache and brings_images:
            raise UnsupportedError(
                f"{', '.join(m.name for m in self.methods if m.place != 'encoder')} needs the KV cache: call the model "
                "with use_cache=True"
            )
        prompt = None
        if candidates and brings_images:
            kwargs, prompt = self._prefill_prompt(kwargs, candidates)
            encoded, brings_images = {}, False
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None:
            if embeds is None:
                return kwargs, None  # the model has its own words for this
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        forward = Forward(self, cache, ids, kwargs.get("attention_mask"))
        if not brings_images:
            forward.check_fixed()
        if forward.past:
            forward.evict_masked()
        if encoded.get("image") is not None:
            forward.features = encoded["image"].pooler_output
        if brings_images:
            if self.guide is not None:
                forward.guidance = self.guide.guidance(len(ids))
            self._watch_layers(forward)
        forward.pixels = kwargs if brings_images and self.features_per_image else None
        forward.prompt, forward.verifies = prompt, prompt is not None or verifies
        return kwargs, forward

    def _exit(self, module: Any, args: Any, output: Any) -> Any:
        forward = self._thread.entered.pop() if self._thread.entered else None
        if forward is None:
            return None
        active.forward = forward.outer
        forward.unhook()
        if output is None:  # an exception is on its way
            return None
        forward.finish()
        if not forward.verifies and (forward.queries > 1 or not forward.past):
            self.report = PruneReport(forward, self.record)
        if forward.prompt is not None:
            output.last_hidden_state = torch.cat([forward.prompt, output.last_hidden_state], dim=1)
        return output

    def _forward(self) -> Forward | None:
        forward = active.forward
        return forward if forward is not None and forward.session is self else None

    def _before_layer(self, forward: Forward, index: int, module: Any, args: Any, kwargs: Any = None) -> Any:
        # Another thread's; torch passes no kwargs where that thread takes its hook off at this very moment.
        if active.forward is not forward:
            return None
        if index == 0:
            forward.begin()
        if self.kinds[index] == "cross":
            return args, forward.cross.enter(kwargs, forward.valid())
        hidden, kwargs = forward.enter(index, args[0], kwargs)
        return (hidden, *args[1:]), kwargs

    def _after_layers(self, forward: Forward, module: Any, args: Any, hidden: Tensor) -> Tensor | None:
        return forward.leave(hidden) if active.forward is forward else None

    def _attend(self, kind: str, index: int, kernel: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward()
        if forward is None:
            return kernel(module, *args, **kwargs)
        attend = forward.attend_cross if kind == "cross" else forward.attend_self
        return attend(index, kernel, module, *args, **kwargs)

    # -- for the report ---------------------------------------------------------------------------------------

    def places(self, forward: Forward) -> list[list[tuple[Tensor, tuple[Tile, ...]]]]:
        """Per sample the logical positions and tiles of each image of this forward."""
        rows: list[list[tuple[Tensor, tuple[Tile, ...]]]] = [[] for _ in range(forward.ids.shape[0])]
        for image, (row, positions) in zip(forward.images, forward.places, strict=True):
            rows[row].append((positions + forward.past, image.layout.tiles))
        if forward.pixels is not None:
            for row, images in enumerate(self.family.feature_places(self.base, forward.pixels)):
                rows[row].extend(images)
        return rows
