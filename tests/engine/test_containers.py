"""Families hand on image features in containers of their own; what was chosen travels with all of them."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.engine.images import EncodedImage, attach, attached, by_image, refilled, repeated
from foveate.layout import ImageLayout, Tile


def layout(tokens: int) -> ImageLayout:
    index = torch.arange(tokens)
    return ImageLayout(tokens, (Tile(index, (1, tokens), index),))


LAYOUTS = [layout(n) for n in (4, 8, 2, 2)]
FLAT = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
CONTAINERS = {
    "a tensor for each image": tuple(FLAT.split([4, 8, 2, 2])),
    "a list for each image": list(FLAT.split([4, 8, 2, 2])),
    "one for the images of each sample": list(FLAT.split([12, 4])),
    "one of all tiles": FLAT.view(8, 2, 5),
    "one of all tokens": FLAT,
}
containers = pytest.mark.parametrize("features", CONTAINERS.values(), ids=list(CONTAINERS))


@containers
def test_images_are_found_in_every_container_and_put_back(features):
    images = by_image(features, LAYOUTS, "mine")
    assert [len(image) for image in images] == [4, 8, 2, 2] and torch.equal(torch.cat(images), FLAT)
    back = refilled(features, [image + 1 for image in images])
    assert type(back) is type(features)
    parts = zip(back, features, strict=True)
    assert all(torch.equal(new, old + 1) for new, old in parts)
    with pytest.raises(foveate.UnsupportedError, match=r"made 16 tokens of these .* sizes have 14"):
        by_image(features, LAYOUTS[:3], "mine")


@containers
def test_what_was_chosen_travels(features):
    images = [EncodedImage(each, None) for each in LAYOUTS]
    output = BaseModelOutputWithPooling(pooler_output=features)
    assert attached(output, "pooler_output") is None
    attach(output, "pooler_output", images)
    assert attached(output, "pooler_output") == images
    # A sample of two images, one without, and one of two, for two beams: what transformers makes of it.
    expected = [*images[:2], *images[:2], *images[2:], *images[2:]]
    if isinstance(features, torch.Tensor):
        first = 12 * len(features) // 16
        output.pooler_output = torch.cat([features[:first], features[:first], features[first:], features[first:]])
    else:
        half = len(features) // 2
        output.pooler_output = [*features[:half], *features[:half], *features[half:], *features[half:]]
    found = attached(output, "pooler_output")
    assert repeated(found, [12, 12, 0, 0, 4, 4]) == expected
    assert repeated(images, [12, 0, 4]) == images
    assert repeated(images, [12, 7]) == images, "what does not fit is left to be refused"


def test_features_of_somebody_else_are_known_for_it():
    output = BaseModelOutputWithPooling(pooler_output=FLAT)
    attach(output, "pooler_output", [EncodedImage(each, None) for each in LAYOUTS])
    output.pooler_output = FLAT.flip(0)
    assert attached(output, "pooler_output") is None
    output.pooler_output = [FLAT]
    assert attached(output, "pooler_output") is None
