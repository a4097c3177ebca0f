"""What a server is told (`hf_overrides`), what a request may ask for, and what is refused. Needs no vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..families import get_family
from ..families.base import Family
from ..layout import ImageLayout
from ..methods.base import EncoderMethod, Method, check_keep
from ..methods.places import PLACES
from ..methods.selection import kept_tokens
from ..methods.tokens import ATTENTION

VERSIONS = ">=0.32,<0.34"
PREFIX = "Foveate"
# The architectures that are tested, by vLLM's names.
SERVED = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
)

# Others that foveate knows in transformers, and why not here.
UNSERVED = {
    "Gemma3ForConditionalGeneration": "its pictures see themselves both ways, and its windows count what is left",
    "PixtralForConditionalGeneration": "its tokenizer writes the placeholders before foveate is asked",
    "InternVLChatModel": "its configuration is the checkpoint's own: take the one in transformers' format (-hf)",
}

# The same of a model type with another encoder than its architecture was compared with.
UNCOMPARED = {("llava", "pixtral"): "it was not compared with transformers yet"}

Positions = Literal["original", "compact"]
_READABLE = ATTENTION | {"features", "states"}


def supported(version: str) -> bool:
    """Whether this version of vLLM is one of `VERSIONS`; development versions count as the release they lead to."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (0, 32) <= (int(found[1]), int(found[2])) < (0, 34)


def check_served(architectures: Sequence[str], model: str) -> None:
    """Raise ValueError where foveate serves none of these classes of vLLM. model: what to call it."""
    if set(architectures) & set(SERVED):
        return
    named = ", ".join(architectures) or "of no named class"
    reasons = "".join(f" ({UNSERVED[name]})" for name in architectures if name in UNSERVED)
    raise ValueError(
        f"{model} is {named}{reasons}, and foveate serves {', '.join(SERVED)}: run it in transformers with "
        "foveate.prune, or serve it without foveate"
    )


@dataclass(frozen=True)
class Settings:
    """Of a server.

    method: with the `keep` of requests that ask for none. positions: "original", those that tokens have in the unpruned
    prompt, or "compact", closed up. lowest, highest: the range of `keep` that requests may ask for.
    """

    method: EncoderMethod
    positions: Positions
    lowest: float | int
    highest: float | int

    @classmethod
    def parse(cls, options: object) -> Settings:
        """Read what `--hf-overrides '{"foveate": {...}}'` says.

        options: the method as `Method.to_dict` writes it, and `positions`, `lowest` and `highest`.

        Raises:
            ValueError: for everything that cannot be served, with the way out.
        """
        if not isinstance(options, Mapping) or "method" not in options:
            raise ValueError(
                f'foveate takes {{"method": NAME, "keep": KEEP}} and other options of the method, not {options!r}'
            )
        own = dict(options)
        positions = own.pop("positions", "original")
        lowest, highest = own.pop("lowest", None), own.pop("highest", None)
        if positions not in get_args(Positions):
            raise ValueError(f'foveate: positions must be "original" or "compact", got {positions!r}')
        try:
            method = Method.from_dict(own)
        except TypeError as error:  # an option that the method does not have
            raise ValueError(f"foveate: {error}") from error
        if not isinstance(method, EncoderMethod):
            raise ValueError(
                f"{method.name} drops tokens {PLACES[method.place]}, and vLLM has one number of tokens for all layers "
                "and frees its cache by position: serve with a method that acts before the LLM (`foveate methods` "
                f"lists them), or run {method.name} in transformers with foveate.prune"
            )
        if beyond := method.reads - _READABLE:
            raise ValueError(
                f"{method.name} reads {' and '.join(sorted(beyond))}, which vLLM does not show: run it in transformers "
                "with foveate.prune, or serve with another method"
            )
        if not method.fills_budget:
            raise ValueError(
                f"how many tokens {method.name} keeps with these options depends on the picture, and vLLM counts them "
                "before the picture is encoded: take other options or another method"
            )
        settings = cls(
            method,
            positions,
            method.keep if lowest is None else lowest,
            method.keep if highest is None else highest,
        )
        for name, keep in (("lowest", settings.lowest), ("highest", settings.highest)):
            try:
                check_keep(keep)
            except ValueError as error:
                raise ValueError(f"foveate: {name}: {error}") from error
            if isinstance(keep, int) != isinstance(method.keep, int):
                raise ValueError(
                    f"foveate: {name}={keep} and keep={method.keep} must both be fractions or both tokens per image"
                )
        if not settings.lowest <= method.keep <= settings.highest:
            raise ValueError(
                f"foveate: keep={method.keep} must lie in [lowest, highest], [{settings.lowest}, {settings.highest}]"
            )
        return settings

    def check_model(self, config: Any, m_rope: bool) -> Family:
        """The family of a model's configuration, under these settings.

        m_rope: whether its positions have several coordinates.

        Raises:
            ValueError: where they do not go together, with the way out.
        """
        family = get_family(config)
        if family is None:
            raise ValueError(f"foveate knows no {config.model_type} models: `foveate families` lists those it knows")
        parts = config.model_type, getattr(config.vision_config, "model_type", None)
        if parts in UNCOMPARED:
            raise ValueError(
                f"foveate serves no {parts[0]} models with a {parts[1]} encoder ({UNCOMPARED[parts]}): run it in "
                "transformers with foveate.prune, or serve it without foveate"
            )
        if family.deepstack is not None and not self.method.only_drops:
            raise ValueError(
                f"{self.method.name} merges tokens, and {config.model_type} models add features of each token to later "
                "layers, which nobody would merge: serve with a method that only drops"
            )
        if m_rope and self.positions == "compact":
            raise ValueError(
                f'"positions": "compact" is for models with one position a token; under M-RoPE ({config.model_type}) a '
                "picture takes few positions anyway: leave the option out"
            )
        if self.method.reads & ATTENTION:
            reason = _unread_layers(self.method, family, config)
            if reason is not None:
                raise ValueError(reason)
        return family

    def of_request(self, asked: object) -> EncoderMethod:
        """The method of one request. asked: None, or what it says in `mm_processor_kwargs["foveate"]`.

        Raises:
            ValueError: for a `keep` that is none, or outside the server's range.
        """
        if asked is None:
            return self.method
        if not isinstance(asked, Mapping) or set(asked) != {"keep"}:
            raise ValueError(f'mm_processor_kwargs["foveate"] takes {{"keep": KEEP}}, got {asked!r}')
        keep = asked["keep"]
        check_keep(keep)
        alike = isinstance(keep, int) == isinstance(self.lowest, int)
        if alike and not self.lowest <= keep <= self.highest:
            self._refuse(keep)
        return replace(self.method, keep=keep)

    def check_range(self, layout: ImageLayout, keep: float | int) -> None:
        """Raise ValueError where this `keep` leaves fewer or more tokens of a picture than requests may ask for.

        A fraction and a number of tokens compare only on a picture.
        """
        if not kept_tokens(layout, self.lowest) <= kept_tokens(layout, keep) <= kept_tokens(layout, self.highest):
            self._refuse(keep)

    def _refuse(self, keep: float | int) -> None:
        raise ValueError(
            f"keep={keep} is outside of what this server allows, {self.lowest} to {self.highest}: ask for a keep in "
            'that range, or start the server with another "lowest" or "highest"'
        )

    @property
    def mark(self) -> dict[str, Any]:
        """What distinguishes an encoded picture beside the request's method."""
        return {"positions": self.positions}


def _unread_layers(method: EncoderMethod, family: Family, config: Any) -> str | None:
    """Why a method that reads the encoder's attention cannot read this model's, or None."""
    if not family.shows_attention:
        return (
            f"{method.name} reads the vision encoder's attention, and that of {config.model_type} models shows none: "
            "serve with a method that reads features only, such as divprune"
        )
    layer, depth = feature_layer(config), encoder_depth(config)
    if layer is not None and family.readable(config, depth) and max(family.readable(config, depth)) >= layer:
        return (
            f"{method.name} reads the vision encoder up to its penultimate layer, number {depth - 1}, and vLLM builds "
            f"only the {layer} that this model's features need: serve with a method that reads features only, such as "
            "divprune"
        )
    return None


def encoder_depth(config: Any) -> int:
    """How many layers the vision encoder of this configuration has."""
    vision = config.vision_config
    return next(int(n) for n in (getattr(vision, name, None) for name in ("num_hidden_layers", "depth")) if n)


def feature_layer(config: Any) -> int | None:
    """Behind how many encoder layers the features are taken; None where the configuration does not say.

    vLLM builds no more layers than that.
    """
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        return None
    depth = encoder_depth(config)
    return max(at % (depth + 1) for at in ([layers] if isinstance(layers, int) else layers))


def uses_m_rope(model_config: Any) -> bool:
    """Whether the positions of a vLLM model have several coordinates of their own, and not only by `Checks`."""
    return bool(model_config.uses_mrope) and not getattr(model_config.hf_config, "foveate_one_coordinate", False)
