"""Builds glimpse untrained: a small LLaVA, its tokenizer, image processor and chat template."""

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from foveate.glimpse import facts, scene

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:"
IMAGE = "<image>"
WIDTHS = {"glimpse": 192, "small": 96}  # of both halves; a head is 32 wide, three heads share a key head
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


def make_processor() -> LlavaProcessor:
    """The processor: any picture becomes 168 x 168 pixels, any question words of a closed vocabulary."""
    image_processor = CLIPImageProcessorPil(
        size={"height": scene.SIZE, "width": scene.SIZE}, do_center_crop=False, crop_size=None
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(),
        patch_size=scene.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT,
    )


def make_model(processor: LlavaProcessor, size: str = "glimpse") -> LlavaForConditionalGeneration:
    """The untrained model in float32: 4.8 million parameters, or 1.3 million when small."""
    tokenizer = processor.tokenizer
    width = WIDTHS[size]
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=6,
        num_attention_heads=width // 32,
        image_size=scene.SIZE,
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
        num_attention_heads=width // 32,
        num_key_value_heads=width // 96,
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
        image_seq_length=(scene.SIZE // scene.PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).to(torch.float32)
    for name, value in (("pad", PAD), ("bos", BOS), ("eos", EOS)):
        setattr(model.generation_config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(value))
    model.generation_config.max_new_tokens = 64
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, and numbers digit by digit; a WordPiece so that "4" and "##2" decode to "42"."""
    digits = [str(digit) for digit in range(10)]
    names = [*scene.SPRITES, *scene.SHAPES, *scene.COLOURS, *scene.WORDS, *scene.ROWS, *scene.COLUMNS]
    asked = " ".join(template for templates in facts.ASK.values() for template in templates).lower()
    said = ["a", "an", "and", "nothing", "yes", "no", "number", "word", "line", "same", "different", "none"]
    words = sorted({*re.findall(r"[a-z]+", asked), *said, *facts.ORDINALS})
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
            *(normalizers.Replace(Regex(rf"\b(?:{others})\b"), word) for word, others in SYNONYMS.items()),
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
