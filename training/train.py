"""Trains glimpse: first to see, then to speak. See README.md for the commands that made the shipped model."""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lessons import IGNORE, Lessons, keys
from model import IMAGE, WIDTHS, make_model, make_processor
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
Batch = dict[str, torch.Tensor]
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


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
        logits = (F.rms_norm(tokens.float(), tokens.shape[-1:]) @ embeddings.float().T).flatten(0, 1)
        losses = {}
        targets = batch["patches"].flatten(0, 1).unbind(1)
        for name, words, target in zip(("thing", "detail", "row", "column"), self.words, targets, strict=True):
            chosen = torch.full_like(logits[:1], float("-inf"))
            chosen[:, words] = 0
            loss = F.cross_entropy(logits + chosen, target.flatten(), ignore_index=IGNORE, reduction="sum")
            losses[name] = loss / (target != IGNORE).sum().clamp(min=1)
        guess = self.present(F.rms_norm(cls.float(), cls.shape[-1:]))
        present = batch["present"].flatten(0, 1)[:, None].expand_as(guess)
        losses["cls"] = F.binary_cross_entropy_with_logits(guess, present) * 10
        return losses

    def answer_loss(self, tokens: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the answers and the share of answer tokens that are right."""
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

    def score(self, hidden: torch.Tensor, head: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What `answer_loss` returns. hidden: of the whole sequence; head: tokens in front of the questions."""
        target = batch["labels"][:, 1:]
        asked = target != IGNORE
        logits = self.model.lm_head(hidden[:, head:-1][asked]).float()
        return F.cross_entropy(logits, target[asked]), (logits.argmax(-1) == target[asked]).float().mean()


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

    def answer_loss(self, tokens: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
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


def normal(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (pictures, 3, height, width) in 0 to 255, as the image processors hand them to a model."""
    return (pixels.float() / 255 - MEAN.to(pixels.device)) / DEVIATION.to(pixels.device)


def alone(turn: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions under which each question sees what is in front of all, and itself.

    turn: (batch, n), the question that each token belongs to. head: tokens in front of all. Returns an additive mask
    (batch, 1, head + n, head + n) and positions (batch, head + n).
    """
    turn = F.pad(turn, (head, 0))
    order = torch.arange(turn.shape[1], device=turn.device)
    visible = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == 0)
    visible &= order[None] <= order[:, None]
    mask = torch.zeros(visible.shape, device=turn.device).masked_fill_(~visible, -1e4)
    begins = torch.where(turn[:, 1:] != turn[:, :-1], order[1:], 0).cummax(1).values
    return mask[:, None], torch.where(turn == 0, order, order - F.pad(begins, (1, 0)) + head)


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in bfloat16 products, with an additive mask: on a CPU a third faster to train than sdpa."""
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


def optimizers(pupil: Pupil, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and heads."""
    matrices, others = [], []
    for name, parameter in pupil.named_parameters():
        inner = parameter.ndim == 2 and "layers" in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def endless(processor: LlavaProcessor, options: argparse.Namespace, step: int) -> Iterator[Batch]:
    """Batches of fresh examples, from some step on: silent ones first, then those with questions."""
    for silent, until in ((True, options.see_steps), (False, options.steps)):
        if step < until:
            yield from DataLoader(
                Lessons(processor, silent),
                batch_sampler=[
                    keys(s, options.batch, silent or options.size == "cross")[RANK::WORLD] for s in range(step, until)
                ],
                num_workers=options.workers,
                prefetch_factor=4 if options.workers else None,
            )
            step = until


def begin_with(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Takes over the weights of an earlier model; its words keep what they mean, whatever their ids are now."""
    earlier = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    shared = [(new, known[piece]) for piece, new in processor.tokenizer.get_vocab().items() if piece in known]
    new, old = torch.tensor(shared).T
    words = model.get_input_embeddings().weight.detach().clone()
    words[new] = earlier.get_input_embeddings().weight.detach()[old]
    weights = earlier.state_dict()
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = words
    model.load_state_dict(weights)


def share_gradients(pupil: Pupil) -> None:
    """Averages the gradients over the processes of a torchrun."""
    if WORLD > 1:
        gradients = [parameter.grad for parameter in pupil.parameters() if parameter.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients]) / WORLD
        dist.all_reduce(joined)
        for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs the steps that are left, and returns the log."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = make_processor(options.size)
    model = make_model(processor, options.size)
    if options.begin_with and options.size == "cross":
        raise SystemExit("--begin-with takes over LLaVAs only: leave it out with --size cross")
    if options.begin_with:
        begin_with(model, processor, options.begin_with)
    pupil = (CrossPupil if options.size == "cross" else Pupil)(model, Lessons(processor)).to(device)
    AttentionInterface.register("plain", plain_attention)
    pupil.model.set_attn_implementation("plain")
    tools = optimizers(pupil, options.rate)
    average = {name: value.detach().clone() for name, value in pupil.model.state_dict().items()}
    step = 0
    if options.resume and (checkpoint := options.out / "checkpoint.pt").exists():
        saved = torch.load(checkpoint, map_location=device)
        pupil.load_state_dict(saved["pupil"])
        for tool, state in zip(tools, saved["optimizers"], strict=True):
            tool.load_state_dict(state)
        average, step = saved["average"], saved["step"]

    def save() -> None:
        if RANK:
            return
        options.out.mkdir(parents=True, exist_ok=True)
        state = {
            "pupil": pupil.state_dict(),
            "optimizers": [tool.state_dict() for tool in tools],
            "average": average,
            "step": step,
        }
        torch.save(state, options.out / "checkpoint.tmp")
        (options.out / "checkpoint.tmp").replace(options.out / "checkpoint.pt")
        export(pupil.model, processor, average, options.out / "model")

    log: list[dict[str, float]] = []
    begun = time.perf_counter()
    for batch in endless(processor, options, step):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        speaks = step >= options.see_steps
        warm = step - options.see_steps if speaks else step
        rate = options.rate * min(1.0, (warm + 1) / options.warmup, (options.steps - step) / options.decay)
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = rate
        watched = not speaks or step % options.watch_every == 0
        with torch.autocast(device.type, torch.bfloat16):
            with contextlib.nullcontext() if watched else torch.no_grad():
                tokens, cls = pupil.see(batch["pixels"])
            losses = pupil.vision_loss(tokens, cls, batch) if watched else {}
            loss = sum(losses.values(), torch.zeros((), device=device))
            if speaks:
                losses["answer"], losses["right"] = pupil.answer_loss(tokens, batch)
                loss = losses["answer"] + options.vision_weight * loss
        loss.backward()
        share_gradients(pupil)
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad(set_to_none=True)
        step += 1
        keep = min(options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in pupil.model.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - keep)
        if RANK == 0 and (step % options.log_every == 0 or step == options.steps):
            entry = {"step": step, "seconds": time.perf_counter() - begun, "rate": rate}
            entry |= {name: value.item() for name, value in losses.items()}
            log.append(entry)
            print(json.dumps({name: round(value, 5) for name, value in entry.items()}), flush=True)
        if step % options.save_every == 0:
            save()
    save()
    return log


def export(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Writes the model in bfloat16, as plain transformers loads it."""
    ship = type(model)(model.config)
    ship.load_state_dict({name: value.cpu() for name, value in weights.items()})
    ship.generation_config = model.generation_config
    ship.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint, and of the model beside it")
    add("--size", choices=WIDTHS, default="glimpse", help="which of the two models")
    add("--begin-with", type=Path, help="folder of an earlier model, whose weights are the first")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder")
    add("--see-steps", type=int, default=700, help="steps of learning to see only")
    add("--steps", type=int, default=4000, help="steps in all")
    add("--batch", type=int, default=32, help="pictures a step")
    add("--rate", type=float, default=1.5e-3, help="highest learning rate")
    add("--warmup", type=int, default=100, help="steps up to the highest rate, in each part")
    add("--decay", type=int, default=800, help="steps down to rate zero, at the end")
    add("--ema", type=float, default=0.995, help="how slowly the averaged weights follow")
    add("--vision-weight", type=float, default=0.1, help="weight of the vision losses beside the answers'")
    add("--watch-every", type=int, default=1, help="steps between two that train vision, in the second part")
    add("--workers", type=int, default=1, help="processes that draw pictures")
    add("--log-every", type=int, default=20, help="steps between two lines of the log")
    add("--save-every", type=int, default=250, help="steps between two checkpoints")
    add("--seed", type=int, default=0, help="seed of the first weights")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
