"""Builds the models untrained: small LLaVAs, a small Llama-3.2-Vision, tokenizer, image processors, chat template."""

import re
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from foveate.glimpse import clips, facts, happenings, scene

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:"
IMAGE = "<image>"
# Of both halves; three heads share a key head and are 32 wide, in "tiny" 16. "cross" is the one with cross-attention,
# "video" sees the frames of clips.
WIDTHS = {"glimpse": 192, "small": 96, "tiny": 48, "cross": 96, "video": 96}
SYNONYMS = {
    "picture": "image|photo|scene",
    "pictures": "images|photos|scenes",
    "top": "upper",
    "bottom": "lower",
    "center": "centre",
    "things": "objects|items",
    "describe": "caption",
    "middle center": "(?<=the )(?:middle|center)(?! (?:left|center|right))",
}
SAID_OF_CLIPS = ("moves", "appears", "disappears", "turns", "nowhere")
CHAT = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor(size: str = "glimpse") -> LlavaProcessor | MllamaProcessor:
    """The processor: any picture becomes 168 x 168 pixels, or 112 x 112, any question words of a closed vocabulary."""
    side = _side(size)
    if size == "cross":
        same = {"image_mean": CLIPImageProcessorPil.image_mean, "image_std": CLIPImageProcessorPil.image_std}
        tiles = MllamaImageProcessorPil(size={"height": scene.SIZE, "width": scene.SIZE}, max_image_tiles=1, **same)
        return MllamaProcessor(tiles, _tokenizer(), chat_template=CHAT)
    image_processor = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, crop_size=None)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(of_clips=size == "video"),
        patch_size=scene.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT,
    )


def make_model(processor: Any, size: str = "glimpse") -> LlavaForConditionalGeneration | MllamaForConditionalGeneration:
    """The untrained model in float32."""
    make = _make_cross if size == "cross" else _make_llava
    model = make(processor.tokenizer, WIDTHS[size], _side(size)).to(torch.float32)
    for name, value in (("pad", PAD), ("bos", BOS), ("eos", EOS)):
        setattr(model.generation_config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(value))
    model.generation_config.max_new_tokens = 64
    return model


def _side(size: str) -> int:
    """Pixels a side of what the model sees."""
    return clips.SIZE if size == "video" else scene.SIZE


def _make_llava(tokenizer: PreTrainedTokenizerFast, width: int, side: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=6,
        num_attention_heads=max(3, width // 32),
        image_size=side,
        patch_size=scene.PATCH,
        projection_dim=width,
        hidden_act="gelu",
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=6,
        num_attention_heads=max(3, width // 32),
        num_key_value_heads=max(1, width // 96),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // scene.PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def _make_cross(tokenizer: PreTrainedTokenizerFast, width: int, side: int) -> MllamaForConditionalGeneration:
    vision = MllamaVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=5,
        num_global_layers=1,
        attention_heads=width // 32,
        image_size=side,
        patch_size=scene.PATCH,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[3],
        vision_output_dim=2 * width,
    )
    text = MllamaTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=8,
        cross_attention_layers=[1, 3, 5],
        num_attention_heads=width // 32,
        num_key_value_heads=width // 96,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config=vision, text_config=text, image_token_index=image, pad_token_id=tokenizer.pad_token_id
        )
    )
    with torch.no_grad():  # gates begin closed for a language model that can talk already, and this one cannot
        for index in text.cross_attention_layers or []:
            layer = model.model.language_model.layers[index]
            layer.cross_attn_attn_gate.fill_(1.0)
            layer.cross_attn_mlp_gate.fill_(1.0)
    return model


def _tokenizer(of_clips: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, and numbers digit by digit; a WordPiece so that "4" and "##2" decode to "42".

    of_clips: with the words of clips as well.
    """
    digits = [str(digit) for digit in range(10)]
    names = [*scene.SPRITES, *scene.SHAPES, *scene.COLOURS, *scene.WORDS, *scene.ROWS, *scene.COLUMNS]
    asked = " ".join(template for templates in facts.ASK.values() for template in templates).lower()
    said = ["a", "an", "and", "nothing", "yes", "no", "number", "word", "line", "same", "different", "none"]
    words = sorted({*re.findall(r"[a-z]+", asked), *said, *facts.ORDINALS})
    synonyms = dict(SYNONYMS)
    if of_clips:
        asked = " ".join(template for templates in happenings.ASK.values() for template in templates).lower()
        words = sorted({*words, *re.findall(r"[a-z]+", asked), *clips.DIRECTIONS, *SAID_OF_CLIPS})
        synonyms["clip"] = "video|film|movie"
        synonyms["picture"] += "|frame"
    special = [PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT]
    inside = [f"##{digit}" for digit in digits]
    pieces = dict.fromkeys([*special, "?", ".", ",", ":", *digits, *inside, *names, *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}

    things = [*scene.SPRITES, *scene.SHAPES]
    normal = "|".join(thing for thing in things if not facts.plural(thing).endswith("es") or thing.endswith("e"))
    hissing = "|".join(thing for thing in things if facts.plural(thing) == thing + "es")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            *(normalizers.Replace(Regex(rf"\b(?:{others})\b"), word) for word, others in synonyms.items()),
            normalizers.Replace("-", " "),
            normalizers.Replace("'s", " is"),
            # "dogs" is read as "dog": the world has no use for plurals of its own.
            normalizers.Replace(Regex(rf"(?<=\b(?:{normal}))s\b"), ""),
            normalizers.Replace(Regex(rf"(?<=\b(?:{hissing}))es\b"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
