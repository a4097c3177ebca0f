"""A clip goes to a processor that knows videos as the video it is: Qwen2.5-VL's own, which needs torchvision."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import foveate
from foveate import glimpse
from foveate.asking.asker import Asker
from foveate.asking.clips import open_clip
from foveate.evaluation.runner import model_inputs

pytest.importorskip("av")
MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}"
    "<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def loaded():
    """A random model and the family's processor, with the words of glimpse."""
    pytest.importorskip("torchvision")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    words = AutoTokenizer.from_pretrained(glimpse.PATH)
    words.add_tokens(list(MARKS.values()), special_tokens=True)
    words.image_token, words.video_token = MARKS["image_token_id"], MARKS["video_token_id"]
    limits = dict(min_pixels=56 * 56, max_pixels=112 * 112)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=TEMPLATE,
    )
    vision = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14, window_size=56)
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(vocab_size=len(words) + 8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config=vision | dict(fullatt_block_indexes=[1, 3], out_hidden_size=64),
        text_config=text | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        **{name: words.convert_tokens_to_ids(mark) for name, mark in MARKS.items()},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


@pytest.mark.parametrize("name", ["evs", "fastvid", "fopru"])
def test_a_clip_and_a_picture_are_asked_about(loaded, name):
    model, processor = loaded
    shown = [open_clip("examples/clip.mp4"), Image.open("examples/demo.png")]
    asker = Asker(model, processor, shown, "what happens to the dog ?", 4)
    assert asker.clips is None, "a video needs no word"
    assert asker.inputs["video_grid_thw"].tolist() == [[3, 8, 8]], "all six frames, two of them to one"
    assert asker.inputs["second_per_grid_ts"].tolist() == [1.0], "of a film of two frames a second"
    answer = asker.ask(foveate.get_method(name, keep=0.5), {"keep": 0.5}, record=True)
    assert answer.images == [(48, 24), (16, 16 if name == "evs" else 8)]
    clip, picture = answer.report.image_tokens[0]
    assert [tile.frame for tile in clip.tiles] == [0, 1, 2] and len(picture.tiles) == 1


def test_batches_of_clips(loaded):
    clip = open_clip("examples/clip.mp4", max_frames=4)
    inputs = model_inputs(loaded[1], [[clip], clip], ["what happens ?", "what is there in the end ?"])
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 8]] * 2
