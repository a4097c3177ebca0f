"""The models with what only training needs: losses for seeing and for answering."""

import torch
import torch.nn.functional as F
from lessons import IGNORE, Lessons
from model import IMAGE
from torch import nn
from transformers import LlavaForConditionalGeneration, MllamaForConditionalGeneration

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
Batch = dict[str, torch.Tensor]


class Pupil(nn.Module):
    """The model with what only training needs.

    Its vision half learns what lies on each patch *in the words of the language model*: the image tokens are
    compared with the word embeddings (thing, detail, row, column), so that the language model, which shares
    these embeddings, finds "dog", "top" and "left" in the image tokens from its first step. A throw-away head
    makes CLS tell which things are in the picture, because pruning methods read the attention of CLS.
    """

    def __init__(self, model: LlavaForConditionalGeneration, lessons: Lessons) -> None:
        super().__init__()
        self.model = model
        self.present = nn.Linear(model.config.text_config.hidden_size, len(lessons.names))
        groups = (lessons.names, [], ["top", "middle", "bottom"], ["left", "center", "right"])
        self.words = [[lessons.ids[word] for word in group] for group in groups]
        self.words[1] = sorted(
            set(range(model.config.text_config.vocab_size)) - {word for group in self.words for word in group}
        )
        self.register_buffer("prefix", torch.tensor(lessons.prefix()[:2]), persistent=False)

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens `(pictures, 144, hidden)` and the two last states of CLS `(pictures, 2, vision hidden)`.

        pixels: `(batch, pictures of an example, 3, height, width)` in 0 to 255.
        """
        core = self.model.model
        states = core.vision_tower(normal(pixels.flatten(0, 1)), output_hidden_states=True).hidden_states
        return core.multi_modal_projector(states[-2][:, 1:]), torch.stack([states[-2][:, 0], states[-1][:, 0]], 1)

    def vision_loss(self, tokens: torch.Tensor, cls: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """One loss each for things, details, rows, columns and CLS."""
        embeddings = self.model.get_input_embeddings().weight
        targets = batch["patches"].flatten(0, 1).unbind(1)
        losses = {
            name: near(tokens.flatten(0, 1), embeddings, words, target)
            for name, words, target in zip(("thing", "detail", "row", "column"), self.words, targets, strict=True)
        }
        guess = self.present(F.rms_norm(cls.float(), cls.shape[-1:]))
        present = batch["present"].flatten(0, 1)[:, None].expand_as(guess)
        losses["cls"] = F.binary_cross_entropy_with_logits(guess, present) * 10
        return losses

    def answer_loss(self, tokens: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the answers ("answer"), and the share of answer tokens that are right ("right")."""
        core = self.model.model
        ids, turn = batch["ids"], batch["turn"]
        tokens = tokens.reshape(len(ids), -1, tokens.shape[-1])
        head = len(self.prefix) + tokens.shape[1]
        embed = core.language_model.embed_tokens
        start = embed(self.prefix).expand(len(ids), -1, -1)
        inputs = torch.cat([start.to(tokens.dtype), tokens, embed(ids).to(tokens.dtype)], 1)

        mask, positions = alone(turn, head)
        hidden = core.language_model(
            inputs_embeds=inputs, attention_mask=mask.to(tokens.dtype), position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.score(hidden, head, batch)

    def score(self, hidden: torch.Tensor, head: int, batch: Batch) -> dict[str, torch.Tensor]:
        """What `answer_loss` returns. hidden: of the whole sequence; head: tokens in front of the questions."""
        target = batch["labels"][:, 1:]
        asked = target != IGNORE
        logits = self.model.lm_head(hidden[:, head:-1][asked]).float()
        right = (logits.argmax(-1) == target[asked]).float().mean()
        return {"answer": F.cross_entropy(logits, target[asked]), "right": right}


class CrossPupil(Pupil):
    """The same for the model with cross-attention: its image tokens are keys of a few layers, and no part of a prompt.

    It sees one picture at a time: nothing tells it which of several a feature belongs to.
    """

    def __init__(self, model: MllamaForConditionalGeneration, lessons: Lessons) -> None:
        super().__init__(model, lessons)
        self.register_buffer("prefix", torch.tensor([*lessons.prefix()[:2], lessons.ids[IMAGE]]), persistent=False)

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        core, one = self.model.model, torch.ones(len(pixels), 1, dtype=torch.long, device=pixels.device)
        seen = core.vision_model(normal(pixels.flatten(0, 1))[:, None, None], one, one[..., None]).last_hidden_state
        features = core.multi_modal_projector(seen)[:, 0, 0]
        return features, features[:, :1]

    def vision_loss(self, tokens: torch.Tensor, cls: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return super().vision_loss(tokens[:, 1:], cls, batch)

    def answer_loss(self, tokens: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        decoder, head = self.model.model.language_model, len(self.prefix)
        mask, positions = alone(batch["turn"], head)
        ids = torch.cat([self.prefix.expand(len(batch["ids"]), -1), batch["ids"]], 1)
        looks = torch.ones(*ids.shape, 1, dtype=tokens.dtype, device=ids.device)
        looks[:, : head - 1] = 0  # nothing is in sight in front of the picture
        hidden = decoder(
            inputs_embeds=decoder.embed_tokens(ids).to(tokens.dtype),
            attention_mask=mask.to(tokens.dtype),
            position_ids=positions,
            cross_attention_states=tokens,
            full_text_row_masked_out_mask=looks[:, None],
            use_cache=False,
        ).last_hidden_state
        return self.score(hidden, head, batch)


def near(tokens: torch.Tensor, embeddings: torch.Tensor, words: list[int], target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of tokens (n, hidden), each to be nearer to the embedding of its word than to those of other words.

    words: ids to choose from. target: n of them, in any shape; -100 where a token is free.
    """
    known = target.flatten() != IGNORE
    logits = F.rms_norm(tokens[known].float(), tokens.shape[-1:]) @ embeddings.float().T
    chosen = torch.full_like(embeddings[:, 0], float("-inf"), dtype=torch.float32)
    chosen[words] = 0
    loss = F.cross_entropy(logits + chosen, target.flatten()[known], reduction="sum")
    return loss / known.sum().clamp(min=1)


def normal(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (pictures, 3, height, width) in 0 to 255, as the image processors hand them to a model."""
    return (pixels.float() / 255 - MEAN.to(pixels.device)) / DEVIATION.to(pixels.device)


def alone(turn: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions under which each question sees what is in front of all, and itself.

    turn: (batch, n), the question that each token belongs to, 0 for those that are in front of all. head: further
    tokens in front of all. Returns an additive mask (batch, 1, head + n, head + n) and positions (batch, head + n).
    """
    turn = F.pad(turn, (head, 0))
    order = torch.arange(turn.shape[1], device=turn.device)
    visible = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == 0)
    visible &= order[None] <= order[:, None]
    mask = torch.zeros(visible.shape, device=turn.device).masked_fill_(~visible, -1e4)
    begins = torch.where(turn[:, 1:] != turn[:, :-1], order[1:], 0).cummax(1).values
    shared = (turn == 0).sum(1, keepdim=True)
    return mask[:, None], torch.where(turn == 0, order, order - F.pad(begins, (1, 0)) + shared)


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, except on a CPU without instructions for it, which is many times slower at it."""
    units = device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device.type, torch.bfloat16, enabled=units)


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in the precision of the values, with an additive mask: on a CPU a third faster to train than sdpa."""
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = (query * scaling).reshape(batch * groups, -1, width).to(value.dtype)  # norms leave float32
    key, value = (states.reshape(batch * groups, keys, width).to(value.dtype) for states in (key, value))
    logits = torch.bmm(rows, key.transpose(1, 2)).view(batch, heads, length, keys)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=logits.dtype).view(batch * groups, -1, keys)
    mixed = torch.bmm(weights.to(value.dtype), value).view(batch, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None
