"""`prune`: installing methods on a model, and taking them off again.

The session installs the places of `places`, opens a `Forward` for every pass of the base model, lets the places act in
it in their order, and makes the report. It knows nothing about any one place.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import KeepsOneToken, UnsupportedError
from ..families.base import Family
from ..methods.base import Method
from ..methods.trained import TrainedMethod
from .adoption import adopt_cache, evict_hidden, new_cache
from .ahead import Peeked
from .attention import Attention
from .cache import active
from .certified import certified, check_certificate
from .chunks import Chunks
from .fixtures import Fixtures, NotPickled
from .forward import Forward
from .gaps import close_unused, is_gapped
from .generation import PIXELS, brings_pixels, made_name, run_prompt, split_prompt
from .images import attached
from .passes import EnteredPass, Passes
from .places import PLACES, Call
from .report import GuideAnswer, Outcome, PruneReport
from .rows import add_to_rows
from .sayings import Sayings
from .short import ShorterWay, past_of, watch_decoder
from .steps import UNSAID, Steps
from .support import check_inputs, check_methods, find_target, pruned_models, resolve_methods, unwrapped
from .target import Target
from .upstream import PreTrainedModel, cache_in, release_note, untraced, without_cache
from .watching import watch_layers


def prune(
    model: PreTrainedModel,
    method: str | Method | Sequence[Method | str] | None = None,
    *,
    certificate: str | Path | None = None,
    record: bool = False,
    **options: Any,
) -> Pruned:
    """Make `model` keep only the image tokens it needs, through its own `generate()` and forward.

    Works from this call until `remove()`; as a context manager until the block ends, however it ends.

    model: a transformers model of a supported family, or what wraps one: adapters of PEFT that change weights,
        torch.compile, a pipeline.
    method: a name (with its `options`), a method object, or a list of them that act at different places; each chooses
        among the tokens that the ones before it left.
    certificate: in place of a method, the file of one that `foveate calibrate` wrote, which must be of this model,
        dtype and attention backend; so must a method that `Method.from_pretrained` read from such a file.
    record: also keep boolean masks of what every layer and head kept in `report.layers`, and by what numbers the
        methods chose in `report.scores`.

    Raises:
        ValueError: an unknown method or option, or a value outside its range; a file that is no certificate.
        UnsupportedError: a model, method or mode that cannot be pruned correctly. Modes that only show when
            the model runs (cache kinds, custom masks, videos) raise then, before anything changes.
    """
    if certificate is not None:
        method, options = certified(certificate, method, options), {}
    methods = resolve_methods(method, options)
    if note := release_note():
        warnings.warn(note, stacklevel=2)
    target = find_target(model)
    check_methods(target, methods)
    for place in PLACES:
        place.check(target, methods)
    for each in methods:
        check_certificate(target, each, alone=len(methods) == 1)
    for each in methods:
        # Weights are trained for a number of tokens, which may well be 1.
        if each.keep == 1 and isinstance(each.keep, int) and not isinstance(each, TrainedMethod):
            warnings.warn(
                f"{each.name} keep=1 keeps one token of each image; keep=1.0 keeps all", KeepsOneToken, stacklevel=2
            )
    host = target.host
    greedy = any(method.certificate is not None for method in methods)
    return Pruned(target, tuple(method.for_host(host) for method in methods), record, greedy=greedy)


def restore(model: Any) -> None:
    """Take off whatever `prune` put on a model, when what it returned is lost; harmless where there is nothing.

    model: what was given to `prune`, or the model inside it.

    Raises:
        UnsupportedError: for what is no model.
    """
    inside = unwrapped(model)
    if not isinstance(inside, nn.Module):
        raise UnsupportedError(f"foveate.restore takes a model, not a {type(model).__name__}")
    for base, pruned in list(pruned_models.items()):
        session = pruned()
        if session is not None and (base is inside or session.model is inside):
            session.remove()


class Pruned(Sayings, NotPickled):
    """A pruned model: what `prune` returns.

    report: what the last prefill kept; None before the first, and when the last answer is a guide's.
    guided: what the guide said last, for methods that have one.
    """

    def __init__(self, target: Target, methods: tuple[Method, ...], record: bool, *, greedy: bool = False) -> None:
        self._target, self.methods = target, methods
        self._outcome = Outcome(records=record)
        # With keep = 1.0 a method has nothing to say, and the model runs as it is.
        self._acting = [m for m in methods if not m.keeps_all]
        found = [place.of(target, self._acting, self._outcome) for place in PLACES]
        self._places = [place for place in found if place is not None]
        self._parameters = list(inspect.signature(target.base.forward).parameters)
        acts, late = bool(self._acting), [method.name for method in self._acting if method.place != "encoder"]
        self._shorter, self._chunks = ShorterWay(target, acts=acts, late=bool(late)), Chunks(target, late, acts)
        self._steps, self._passes = Steps(self._shorter.prepare, greedy=greedy), Passes()
        self._fixtures, self._routing = Fixtures(), threading.Lock()
        self._routed = False
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def model(self) -> Any:
        """The transformers model that is pruned: what was passed to `prune`, or what that wraps."""
        return self._target.model

    @property
    def family(self) -> Family:
        """The family of the model."""
        return self._target.family

    @property
    def base(self) -> Any:
        """The module inside the model whose forward receives token ids and pixels."""
        return self._target.base

    @property
    def decoder(self) -> Any:
        """The language model inside it."""
        return self._target.decoder

    @property
    def report(self) -> PruneReport | None:
        """What the last prefill kept."""
        return self._outcome.report

    @property
    def guided(self) -> GuideAnswer | None:
        """What the guide said last."""
        return self._outcome.guided

    # -- installing -------------------------------------------------------------------------------------------

    def _install(self) -> None:
        pruned_models[self.base] = weakref.ref(self)
        fixtures = self._fixtures
        self._steps.install(fixtures, self.model)  # in front of the base model's, which may be the same
        self._chunks.install(fixtures)
        fixtures.hook(self.base.register_forward_pre_hook(self._enter, with_kwargs=True))
        fixtures.hook(self.base.register_forward_hook(self._exit, always_call=True))
        for place in self._places:
            place.install(fixtures)
        if self.family.deepstack is not None:
            fixtures.wrap(self.decoder, self.family.deepstack, self._add)
        if self._shorter.late:
            self._route()

    def _route(self) -> None:
        """Send the decoder's attention through `_attend`, once; the shorter way needs none of it, and compiles better
        without."""
        with self._routing:
            if self._acting and not self._routed:
                attentions = self._target.attentions()
                self._fixtures.route({m: functools.partial(self._attend, index) for index, m in attentions.items()})
                self._routed = True

    def remove(self) -> None:
        """Restore the model to what it was; harmless when done already."""
        # An interrupt inside a forward skips its last hook.
        while active.forward is not None and active.forward.target is self._target:
            active.forward.unhook()
            active.forward = active.forward.outer
        self._passes.entered.clear()
        self._fixtures.remove()
        pruned_models.pop(self.base, None)

    def __repr__(self) -> str:
        state = "active" if self._fixtures else "removed"
        return f"<foveate.Pruned {self.family.model_type} model, {state}: {self.report or 'no prefill yet'}>"

    def __deepcopy__(self, memo: object) -> Pruned:
        raise UnsupportedError("a pruned model cannot be copied: copy it before foveate.prune or after remove()")

    def __enter__(self) -> Pruned:
        """The pruned model itself; pruning began when it was made."""
        if not self._fixtures:
            raise UnsupportedError("this pruning was removed already; call foveate.prune again")
        return self

    def __exit__(self, *exception: object) -> None:
        """See `remove`."""
        self.remove()

    # -- the forward pass -------------------------------------------------------------------------------------

    @untraced
    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        outer, entered = active.forward, None
        try:
            kwargs, entered = self._begin(args, kwargs)
            if entered is not None:
                entered.forward.outer, active.forward = outer, entered.forward
            return (), kwargs
        except BaseException:
            close_unused(cache_in(kwargs))
            raise
        finally:
            # The hook behind the forward runs even when it was refused here.
            self._passes.entered.append(entered)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], EnteredPass | None]:
        step = self._steps.take()
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        encoded = kwargs.get("mm_encoder_outputs") or {}
        images = (*(encoded.get(medium) for medium in PIXELS), kwargs.get("cross_attention_states"))
        brings_images = brings_pixels(kwargs) or any(given is not None for given in images)
        call = Call(kwargs, brings_images, step.behind if step.assisted else 0)
        if not all(place.admits(call) for place in self._places):
            return kwargs, None
        cache, said = cache_in(kwargs), {}
        if step.prepared and getattr(kwargs.get("attention_mask"), "ndim", None) != 2:
            # generate() made other masks of it, or left it out.
            said["attention_mask"] = step.mask if step.mask is None else step.mask.to(self.base.device)
        short = cache is not None and self._shorter.opens(cache)
        check_inputs(self._target, kwargs | said, call.brings_images)
        for place in self._places:
            place.refuse(call)
        splits = step.assisted or any(place.reads_prompt for place in self._places)
        if not short:
            self._route()
            cache = self._adopt(cache, call, in_parts=call.brings_images and splits and step.behind > 0)
        if cache is not None:
            kwargs = {**without_cache(kwargs), self._target.cache_name: cache}
        prompt, brings_images = None, call.brings_images
        if brings_images and splits and step.uneven:
            raise UnsupportedError(
                "the labels of this batch begin at different places, and methods choose at the end of the prompt: pad "
                "the prompts on the left and the answers on the right, or run one sample at a time"
            )
        if brings_images and splits and step.unsaid:
            warnings.warn(UNSAID, stacklevel=2)
        if brings_images and splits and step.behind:
            # The prompt runs without what stands behind it, so that methods see its true end.
            head, kwargs = split_prompt(kwargs, step.behind)
            if bool(self._target.is_image(kwargs["input_ids"]).any()):
                raise UnsupportedError(
                    "a picture stands behind the end of this prompt (the first label): run the turns one by one"
                )
            prompt, kwargs = run_prompt(self.base, self.decoder, head, kwargs)
            encoded, brings_images = {}, False
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None:
            if embeds is None:
                return kwargs, None  # the model has its own words for this
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        past = past_of(cache, step, ids) if short else None
        forward = Forward(self._target, cache, ids, kwargs | said, brings_images=brings_images, past=past)
        whole = self._chunks.part(forward, self._places) if step.prepared else None
        if whole is None:
            forward.actions = [action for place in self._places if (action := place.act(forward)) is not None]
            for medium in PIXELS:
                if encoded.get(medium) is not None:
                    forward.encoded[medium] = attached(encoded[medium], self.family.features)
        if forward.past and forward.mask is not None:
            evict_hidden(cache, forward.mask)
        forward.short = short
        if short:
            if not step.over_slots and (brings_images or whole is not None or is_gapped(cache)):
                watch_decoder(forward)
        elif brings_images or whole is not None:
            watch_layers(forward, routed=bool(self._acting))
        # A forward of words alone beside the steps of generate(), as guidance_scale makes, is no prefill of the user's.
        return kwargs, EnteredPass(forward, prompt, step.verifies or (step.beside and not brings_images), whole)

    def _adopt(self, cache: Any, call: Call, *, in_parts: bool) -> Any:
        """The cache that the pass will use, its layers swapped for pruned ones; None without a cache.

        in_parts: the prompt runs first, and what stands behind it reads its keys and values.
        """
        use_cache = call.arguments.get("use_cache")
        if cache is None and (in_parts or (self.decoder.config.use_cache if use_cache is None else use_cache)):
            cache = new_cache(self.decoder.config)
        if cache is not None:
            adopt_cache(cache, self._target.kinds)
        elif call.brings_images and (names := [m.name for m in self.methods if m.place not in ("encoder", "depth")]):
            raise UnsupportedError(f"{', '.join(names)} needs the KV cache: call the model with use_cache=True")
        return cache

    @untraced
    def _exit(self, module: Any, args: Any, output: Any) -> Any:
        entered = self._passes.entered.pop() if self._passes.entered else None
        if entered is None:
            return None
        forward = entered.forward
        active.forward = forward.outer
        forward.unhook()
        close_unused(forward.cache)
        if output is None:  # an exception is on its way
            return None
        forward.follow(forward.home)
        for action in forward.actions:
            action.finish()
        if forward.past and forward.mask is not None:
            evict_hidden(forward.cache, forward.mask)
        for layer in forward.held:
            layer.slide()
        if entered.reports:
            report = self._outcome.report = PruneReport(entered.whole, self.methods, self._outcome.records)
            for place in self._places:
                place.tell(report)
        if entered.prompt is not None:
            name = made_name(output)
            output[name] = torch.cat([entered.prompt, output[name]], dim=1)
        return output

    def _add(self, add: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Features that the model adds to image tokens between two layers: to those that still come."""
        forward = active.forward
        if forward is None or forward.target is not self._target or forward.rows is None:
            return add(*args, **kwargs)
        return add_to_rows(forward.rows, *args, **kwargs)

    def _attend(
        self, index: int, kernel: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        forward = active.forward
        if forward is None or forward.target is not self._target or forward.short:
            return kernel(module, query, key, value, mask, **options)
        forward.follow(query.device)
        kind = self._target.kinds[index]
        attention = Attention(forward, index, kind, kernel, module, query, key, value, mask, options)
        if forward.peeks:
            raise Peeked(attention)
        return attention.through(forward.actions)
