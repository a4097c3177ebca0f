"""The whole way from nothing to a model that plain transformers loads, in a few small steps."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from clip_lessons import TEXT as CLIP_TEXT
from clip_lessons import ClipLessons, ClipPupil, clip_keys
from lessons import GRID, IGNORE, TEXT, Lessons, keys
from model import IMAGE, WIDTHS, make_model, make_processor
from pupils import CrossPupil, Pupil
from train import begin_with, parse, train

from foveate.evaluation import answer
from foveate.glimpse import SMALL_PATH, clips


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def run(folder, *more):
    options = ["--out", str(folder), "--see-steps", "2", "--batch", "2", "--workers", "0", "--log-every", "1"]
    return train(parse([*options, *more]))


@pytest.mark.parametrize("size", WIDTHS)
def test_few_steps_train_resume_and_load(tmp_path, size):
    log = run(tmp_path, "--size", size, "--steps", "3", "--warmup", "1", "--decay", "1")
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert "answer" not in log[1] and log[2]["answer"] > 0
    log = run(tmp_path, "--size", size, "--steps", "4", "--resume")
    assert [entry["step"] for entry in log] == [4], "goes on where it stopped"

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    loaded = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.config.image_token_id == loaded.image_token_id
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 15e6
    (said,) = answer(model.float(), loaded, [Image.new("RGB", (90, 60))], ["What do you see?"], max_new_tokens=3)
    assert isinstance(said, str)


def test_an_earlier_model_hands_over_what_its_words_mean(processor, tmp_path):
    """Also where the vocabulary has grown, and its words have other ids."""
    earlier = make_model(processor, "small")
    tokenizer = processor.tokenizer
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))
    vocabulary = {piece: int(order[index]) for piece, index in tokenizer.get_vocab().items()}
    earlier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["model"]["vocab"] = vocabulary
    for token in written["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    model = make_model(processor, "small")
    begin_with(model, processor, tmp_path)
    theirs, ours = (each.get_input_embeddings().weight for each in (earlier, model))
    for piece, index in tokenizer.get_vocab().items():
        assert torch.equal(ours[index], theirs[vocabulary[piece]])
    assert torch.equal(model.model.vision_tower.post_layernorm.weight, earlier.model.vision_tower.post_layernorm.weight)


def test_what_a_model_knew_of_places_is_reduced_to_the_places_of_a_frame():
    processor = make_processor("video")
    model = make_model(processor, "video")
    begin_with(model, processor, SMALL_PATH)
    earlier = AutoModelForImageTextToText.from_pretrained(SMALL_PATH, dtype=torch.float32)
    theirs, ours = (m.model.vision_tower.embeddings.position_embedding.weight for m in (earlier, model))
    assert torch.equal(ours[0], theirs[0])
    # the fourth of 8 rows and columns has its middle at 3.5 / 8 = 5.25 / 12: between two of 12
    before = theirs[1:].view(12, 12, -1)
    near = [((4, 0.25), (5, 0.75)), ((4, 0.25), (5, 0.75))]
    mixed = sum(a * b * before[i, j] for i, a in near[0] for j, b in near[1])
    torch.testing.assert_close(ours[1 + 3 * 8 + 3], mixed)


def stirred(pupil):
    """With large random weights, so that everything matters."""
    torch.manual_seed(0)
    for parameter in pupil.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return pupil.eval()


@pytest.mark.parametrize(("size", "pictures"), [("glimpse", 1), ("glimpse", 2), ("glimpse", 3), ("cross", 1)])
def test_an_example_trains_what_a_chat_asks(size, pictures):
    """The answers' loss in a packed example is the mean loss of its talks, each as a chat of its own."""
    processor = make_processor(size)
    lessons = Lessons(processor)
    example = lessons[0, pictures]
    pupil = stirred((CrossPupil if size == "cross" else Pupil)(make_model(processor, size), lessons))
    batch = {name: value[None] for name, value in example.items()}
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in example["pixels"]]
    losses, counts = [], []
    with torch.no_grad():
        tokens, _ = pupil.see(batch["pixels"])
        packed = pupil.answer_loss(tokens, batch)["answer"]
        for turn in range(1, int(example["turn"].max()) + 1):
            own = example["turn"] == turn
            question = processor.tokenizer.decode(example["ids"][own])
            chat = processor(
                images=images, text="<s>USER: " + "<image>" * pictures + question, return_tensors="pt",
                add_special_tokens=False,
            )  # fmt: skip
            assert chat["input_ids"][0, -int(own.sum()) :].tolist() == example["ids"][own].tolist()
            labels = torch.full_like(chat["input_ids"], IGNORE)
            labels[0, -int(own.sum()) :] = example["labels"][own]
            losses.append(pupil.model(**chat, labels=labels).loss)
            counts.append((labels != IGNORE).sum())
    weights = torch.stack(counts).float()
    plain = (torch.stack(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(packed, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("number", [1, 0])
def test_an_example_of_a_clip_trains_what_a_chat_asks(number):
    """The same where a clip is watched in parts: what was asked between them stands in front of all later questions."""
    processor = make_processor("video")
    lessons = ClipLessons(processor)
    example = lessons[number, 4]
    pupil = stirred(ClipPupil(make_model(processor, "video"), lessons))
    ids, labels, turn = (example[name] for name in ("ids", "labels", "turn"))
    pauses = int((ids[turn == 0] == processor.tokenizer.eos_token_id).sum())
    assert pauses == (2 if number == 0 else 0)
    batch = {name: value[None] for name, value in example.items()}
    losses, counts = [], []
    with torch.no_grad():
        tokens, _ = pupil.see(batch["pixels"])
        packed = pupil.answer_loss(tokens, batch)
        pixels = processor.image_processor(list(example["pixels"]), return_tensors="pt")["pixel_values"]
        for own in range(1, int(turn.max()) + 1):
            chat = (turn == 0) | (turn == own)
            asked = torch.where(turn == own, labels, IGNORE) if own > 1 else labels  # the shared part counts once
            losses.append(pupil.model(input_ids=ids[chat][None], pixel_values=pixels, labels=asked[chat][None]).loss)
            counts.append((asked[chat] != IGNORE).sum())
    weights = torch.stack(counts).float()
    plain = (torch.stack(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(packed["answer"], plain, atol=1e-3, rtol=1e-3)
    assert packed["happens"] > 0


def test_examples_of_clips_say_what_has_happened_so_far():
    processor = make_processor("video")
    lessons = ClipLessons(processor)
    seen = set()
    for number, frames in [key for step in range(10) for key in clip_keys(step, 16)]:
        example, again = lessons[number, frames], lessons[number, frames]
        assert all(torch.equal(example[name], again[name]) for name in example)
        assert example["ids"].shape == (2 + frames * clips.TOKENS + CLIP_TEXT,)
        assert int((example["ids"] == lessons.ids[IMAGE]).sum()) == frames * clips.TOKENS
        assert processor.tokenizer.unk_token_id not in example["ids"]
        (happens, to), things = example["happens"], example["patches"][:, 0]
        assert happens.shape == to.shape == things.shape == (frames, clips.TOKENS)
        assert (happens[0] == IGNORE).all() and ((happens == IGNORE) == (to == IGNORE)).all()
        there = things[1:] != lessons.ids["nothing"]
        assert (to[1:] == things[1:])[there].all()
        assert set(happens[1:][~there].tolist()) <= {IGNORE, lessons.ids["disappears"]}, "where a thing was"
        assert (happens[1:][there] != lessons.ids["disappears"]).all()
        seen |= set(happens.flatten().tolist())
    named = {processor.tokenizer.convert_ids_to_tokens(word) for word in seen - {IGNORE}}
    assert named == {*clips.DIRECTIONS, "appears", "disappears", "turns", "nothing"}


def test_steps_of_clips_have_about_as_many_frames_and_all_lengths():
    steps = [clip_keys(step, 64) for step in range(10)]
    assert {frames for step in steps for _, frames in step} == set(clips.LENGTHS)
    assert all(56 < sum(frames for _, frames in step) <= 64 for step in steps)
    assert len({number for step in steps for number, _ in step}) == sum(map(len, steps))


def test_examples_have_one_shape_and_one_seed(processor):
    lessons = Lessons(processor)
    for number, pictures in [(5, 1), (6, 2), (7, 3)]:
        example, again = lessons[number, pictures], lessons[number, pictures]
        assert all(torch.equal(example[name], again[name]) for name in example)
        assert example["ids"].shape == example["labels"].shape == example["turn"].shape == (TEXT,)
        assert example["patches"].shape == (pictures, 4, GRID**2) and example["pixels"].dtype == torch.uint8
        assert processor.tokenizer.unk_token_id not in example["ids"]
    assert not torch.equal(lessons[0, 1]["pixels"], lessons[1, 1]["pixels"])


def test_a_step_has_as_many_pictures_whatever_a_prompt_has():
    shapes = [{pictures for _, pictures in keys(step, 12, False)} for step in range(8)]
    assert shapes == [{1}, {1}, {1}, {2}, {1}, {1}, {1}, {3}]
    assert all(sum(pictures for _, pictures in keys(step, 12, False)) == 12 for step in range(8))
    assert {pictures for step in range(8) for _, pictures in keys(step, 12, True)} == {1}
    assert len({number for step in range(8) for number, _ in keys(step, 12, True)}) == 96


def test_words_are_read_and_written_cleanly(processor):
    tokenizer = processor.tokenizer

    def words(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert words("How many foxes?") == ["how", "many", "fox", "?"]
    assert words("two houses, 407 Dogs")[1:] == ["house", ",", "4", "##0", "##7", "dog"]
    assert words("What's in the middle of an IMAGE?")[:6] == ["what", "is", "in", "the", "middle", "center"]
    assert words("the upper-left") == ["the", "top", "left"]
    text = "number 407 top left, red circle middle center"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.padding_side == "left"
