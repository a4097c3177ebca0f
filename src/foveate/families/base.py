"""What a model family tells: where things are, and which tokens form an image."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..layout import ImageLayout, Tile

__all__ = ["Family", "ImageLayout", "Tile"]


class Family:
    """One model family. Subclasses say where things are and know no method.

    A family implements what its places need; what belongs to other places is never asked for and raises here.

    model_type: of the configuration. places: where methods may act. self_attention, cross_attention: name of
    the attention module inside a decoder layer. features: field of `get_image_features`' output that the LLM gets.
    deepstack: the decoder's method that adds features to image tokens behind a layer: hidden states, where, features.
    shows_attention: whether the encoder's attention can be read, token by token; else nothing asks for its layers.
    needs_prompt: whether `layouts` reads `input_ids`, where the other inputs do not say how many tokens an image has.
    frames_apart: whether the frames of a video come as videos of their own, and no input says which form one.
    """

    model_type: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    places: ClassVar[frozenset[str]] = frozenset({"encoder", "layer", "depth", "cache", "decode", "logits"})
    self_attention: ClassVar[str] = "self_attn"
    cross_attention: ClassVar[str] = "cross_attn"
    features: ClassVar[str] = "pooler_output"
    shows_attention: ClassVar[bool] = True
    deepstack: ClassVar[str | None] = None
    needs_prompt: ClassVar[bool] = False
    frames_apart: ClassVar[bool] = False

    def of(self, config: Any) -> Family:
        """The family of this very configuration, where models of one type lay images out in several ways."""
        return self

    def seeing(self, medium: str) -> Family:
        """The family as it tells of the encoder of "image" or "video", where each has one of its own."""
        return self

    def check(self, base: Any) -> str | None:
        """Why this very model cannot be pruned, or None."""
        return None

    def base(self, model: Any) -> Any:
        """The module whose forward receives token ids and pixels."""
        return getattr(model, "model", model)

    def decoder(self, base: Any) -> Any:
        """The language model: has `layers` and a final `norm`."""
        return base.language_model

    def image_token_id(self, config: Any) -> int:
        """The id of the image placeholder in the prompt. config: of the model, here and below."""
        return config.image_token_id

    def layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        """One layout per image, in order. Needs no model.

        inputs: the arguments of the model's `get_image_features`; with `needs_prompt` also `input_ids`, (batch, q).
        """
        raise NotImplementedError  # asked only of families with the place "encoder"

    def video_token_id(self, config: Any) -> int | None:
        """The id of the video placeholder in the prompt; None where the model takes no videos."""
        return None

    def video_layouts(self, config: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
        """One layout per video, in order, a tile per frame. inputs: the arguments of `get_video_features`.

        A frame is what has tokens of its own: some encoders join pictures of a film into one. With `frames_apart` one
        layout per frame; the engine joins them to clips, sample by sample or as the user says.
        """
        raise NotImplementedError  # asked only of families with a `video_token_id`

    def vision_attentions(self, base: Any) -> list[nn.Module]:
        """The attention modules of the vision encoder that may be read: those of the `readable` layers, in order."""
        raise NotImplementedError  # asked only of families with the place "encoder"

    def readable(self, config: Any, depth: int) -> list[int]:
        """Which layers of a vision encoder show their attention: to the penultimate. Needs no model.

        depth: how many layers the encoder has.
        """
        return list(range(depth - 1))

    def encoder_layers(self, base: Any) -> list[nn.Module]:
        """The vision encoder's layers up to the one whose output the features are made of."""
        raise NotImplementedError  # asked only of families with the place "encoder"

    def keys_and_values(self, layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The modules that make an encoder layer's keys and values; None where it has no room for further tokens.

        layer: one of `encoder_layers`.
        """
        return None

    def carry(self, layer: nn.Module, readers: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Further tokens behind an encoder layer, which read the tokens in it and each other.

        readers: (pictures, m, width). key, value: (pictures, tokens, width), what `keys_and_values` made of the tokens.
        Returns (pictures, m, width).
        """
        raise NotImplementedError  # asked only of families with `keys_and_values`

    def width(self, config: Any) -> int:
        """Of the vision encoder's states."""
        return config.vision_config.hidden_size

    def side(self, config: Any) -> int | None:
        """Patches along one side of the pictures that the encoder sees; None where they keep their shapes."""
        return None

    def prefix_tokens(self, config: Any) -> int:
        """How many tokens of the vision encoder come before the patches ([CLS])."""
        return 0

    def projector(self, base: Any) -> nn.Module | None:
        """The module from the encoder's states to the LLM's, one token a patch; None where it joins patches."""
        return None

    def encoder_states(self, base: Any, states: Tensor) -> Tensor:
        """The projector's input in the order that `Tile.patches` counts in: (all patches, width)."""
        raise NotImplementedError  # asked only of families with the place "encoder"

    def as_seen(self, base: Any, features: Tensor) -> Tensor:
        """What the LLM sees of features, (..., hidden), where the model does more to them behind its encoder.

        Methods that only drop choose by this; those that merge choose, and merge, among what the encoder gave.
        """
        return features

    def features_per_image(self, config: Any) -> int:
        """Cross-attention features that every image slot occupies, padded tiles included."""
        raise NotImplementedError  # asked only of families with the place "cross"

    def feature_places(self, config: Any, inputs: dict[str, Any]) -> list[list[tuple[Tensor, tuple[Tile, ...]]]]:
        """Per sample the indices of each image's features among the sample's, and its tiles. inputs: of the forward."""
        raise NotImplementedError  # asked only of families with the place "cross"
