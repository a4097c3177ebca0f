"""Where the tiles of a picture lie: the prompt says it, the user, or nobody, and then nothing is drawn wrongly."""

from __future__ import annotations

import itertools

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE, prune
from PIL import Image

import foveate
from foveate.asking.pictures import draw_kept
from foveate.evaluation.maps import views
from foveate.layout import WHOLE, grid_boxes
from foveate.testing.tiny.tiles import GRIDS

SHAPES = [(20, 40), (30, 30), (20, 20), (90, 30)]  # (height, width) of pictures that become these tiles


def boxes(image) -> list:
    return [tile.box for tile in image.tiles]


def expected(kind: int) -> list:
    rows, columns = GRIDS[kind]
    return [*grid_boxes(rows, columns), WHOLE] if rows * columns > 1 else [WHOLE]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_a_prompt_with_row_and_column_tokens_says_it(family):
    batch, model = tiny.inputs(family, images=(1, 3), text=(3, 5)), tiny.build(family)
    with prune(model, "fopru_rank") as pruned:
        oracle.run(model, batch, max_new_tokens=1)
    (first,), others = pruned.report.image_tokens
    assert [boxes(image) for image in (first, *others)] == [expected(kind) for kind in range(4)]
    for images in pruned.report.image_tokens:
        ends = [(int(image.positions[0]), int(image.positions[-1])) for image in images]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends)), "one image behind the other"


def test_the_user_says_it_where_no_input_does():
    batch, model = tiny.inputs("internvl", images=(1, 3), text=(3, 5)), tiny.build("internvl")
    with prune(model, "fopru_rank") as pruned:
        with pruned.saying(image_sizes=SHAPES):
            oracle.run(model, batch, max_new_tokens=1)
        said = [boxes(image) for images in pruned.report.image_tokens for image in images]
        assert said == [expected(kind) for kind in range(4)]
        model(**batch)
        unsaid = [image for images in pruned.report.image_tokens for image in images]
        assert [boxes(image) for image in unsaid] == [[None] * (len(each) - 1) + [WHOLE] for each in said]
        with pruned.saying(image_sizes=SHAPES[:2]), pytest.raises(ValueError, match=r"of 2 pictures, .* has 4"):
            oracle.run(model, batch, max_new_tokens=1)


def test_a_tile_of_unknown_place_is_not_drawn():
    batch, model = tiny.inputs("internvl", seed=1), tiny.build("internvl")
    with prune(model, "fopru_rank") as pruned:
        oracle.run(model, batch, max_new_tokens=1)
    ((image,),) = pruned.report.image_tokens
    picture, white = Image.new("RGB", (60, 60), "red"), torch.ones(45)
    (view,) = views([[picture]], [image.tiles])
    assert view.tiles == image.tiles[-1:] and view.name == ""
    drawn = draw_kept(picture, image.tiles, torch.cat([torch.zeros(36), white[36:]]))
    assert drawn.tobytes() == draw_kept(picture).tobytes(), "only the whole picture counts, which is kept"


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_pictures_apart_from_their_prompt_are_refused(family):
    model, batch = tiny.build(family), tiny.inputs(family)
    pixels = {name: batch[name] for name in batch if name.startswith("pixel")}
    with prune(model, "divprune"), pytest.raises(foveate.UnsupportedError, match="stands only in the prompt"):
        model.model.get_image_features(**pixels)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_several_images_of_a_onevision_sample_are_one_tile_each(attn):
    """The processor says how many images a sample has; of several each is one square and one newline token."""
    family = tiny.found["llava_onevision"]
    batch, model = (
        tiny.inputs("llava_onevision", images=(2,), text=(6,), between=0),
        tiny.build("llava_onevision", attn),
    )
    words = batch["input_ids"][0, [0, 1, -3, -2, -1]].tolist()
    ids = torch.tensor([[*words[:2], *[family.image_id] * 17, 7, *[family.image_id] * 17, *words[2:]]])
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "batch_num_images": torch.tensor([2])}
    batch["pixel_values"] = batch["pixel_values"][:, :1]
    with prune(model, "fopru_rank") as pruned:
        run = oracle.run(model, batch, max_new_tokens=6)
    assert [tokens for tokens, _ in pruned.report.images[0]] == [17, 17]
    assert [len(image.tiles) for image in pruned.report.image_tokens[0]] == [1, 1]
    hides = oracle.hidden(pruned.report, ids.shape[1])
    assert oracle.errors(tiny.build("llava_onevision", "eager"), batch, run, hides).max() < TOLERANCE
