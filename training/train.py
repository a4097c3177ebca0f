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
from clip_lessons import ClipLessons, ClipPupil, clip_keys
from lessons import Lessons, keys
from model import WIDTHS, make_model, make_processor
from pupils import Batch, CrossPupil, Pupil, half_precision, plain_attention
from torch import nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from foveate.glimpse import PATH

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


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
            single = silent or options.size == "cross"
            video = options.size == "video"
            yield from DataLoader(
                (ClipLessons if video else Lessons)(processor, silent),
                batch_sampler=[
                    (clip_keys(s, options.batch) if video else keys(s, options.batch, single))[RANK::WORLD]
                    for s in range(step, until)
                ],
                num_workers=options.workers,
                prefetch_factor=4 if options.workers else None,
            )
            step = until


def begin_with(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Takes over the weights of an earlier model; its words keep what they mean, whatever their ids are now.

    Where it saw larger pictures, its embeddings of the places are reduced to as many as there are.
    """
    earlier = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    own = (folder / "tokenizer.json").exists()  # the small model shares that of the other
    known = PreTrainedTokenizerFast.from_pretrained(folder if own else PATH).get_vocab()
    shared = [(new, known[piece]) for piece, new in processor.tokenizer.get_vocab().items() if piece in known]
    new, old = torch.tensor(shared).T
    words = model.get_input_embeddings().weight.detach().clone()
    words[new] = earlier.get_input_embeddings().weight.detach()[old]
    weights = earlier.state_dict()
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = words
        if name.endswith("vision_tower.embeddings.position_embedding.weight"):
            weights[name] = _places(weights[name], model.config.image_seq_length)
    model.load_state_dict(weights)


def _places(embeddings: torch.Tensor, patches: int) -> torch.Tensor:
    """Embeddings (1 + n, width) of CLS and a square of n patches, for a square of `patches` patches."""
    cls, grid = embeddings[:1], embeddings[1:]
    before, side = round(len(grid) ** 0.5), round(patches**0.5)
    grid = grid.T.view(1, -1, before, before)
    return torch.cat([cls, F.interpolate(grid, (side, side), mode="bilinear").flatten(2)[0].T])


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
    kinds = {"cross": CrossPupil, "video": ClipPupil}
    pupil = kinds.get(options.size, Pupil)(model, Lessons(processor)).to(device)
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
        with half_precision(device):
            with contextlib.nullcontext() if watched else torch.no_grad():
                tokens, cls = pupil.see(batch["pixels"])
            losses = pupil.vision_loss(tokens, cls, batch) if watched else {}
            loss = sum(losses.values(), torch.zeros((), device=device))
            if speaks:
                answers = pupil.answer_loss(tokens, batch)
                losses |= answers
                hints = sum(value for name, value in answers.items() if name not in ("answer", "right"))
                loss = answers["answer"] + options.vision_weight * (loss + hints)
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
    add("--size", choices=WIDTHS, default="glimpse", help="which of the models")
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
