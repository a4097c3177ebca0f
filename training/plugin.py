"""What every training of a method's own weights shares: the frozen model, its questions, and steps that can be stopped.

The method runs in the engine as it will run afterwards, holding tensors that are being trained; nothing else is.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lessons import IGNORE
from torch import Tensor, nn

import foveate
from foveate.asking.loading import GLIMPSE, built_in, hush, read_config, resolve_device
from foveate.asking.loading import load as load_model
from foveate.asking.mistake import Mistake
from foveate.engine.support import find_target
from foveate.evaluation.questions import Item, from_folder
from foveate.methods.trained import WEIGHTS_NAME, TrainedMethod, write_plugin

Batch = dict[str, Tensor]
CHECKPOINT = "checkpoint.pt"
ALONG = 0.2  # how fast an LLM learns that is trained along, beside the method's own weights


def common(description: str, *, batch: int) -> argparse.ArgumentParser:
    """The options of all commands that make a file of weights, with this default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help=f"folder of {WEIGHTS_NAME}, and of the checkpoint where one trains")
    add("--model", default=GLIMPSE, help="hub id or folder of another model than glimpse; needs --data")
    add("--data", type=Path, help="folder with a data.jsonl, as foveate eval reads it, to learn from")
    add("--device", default="auto")
    add("--dtype", default="auto", help="of the frozen model; what is trained is float32")
    add("--batch", type=int, default=batch, help="pictures a step")
    return parser


def parser(description: str, *, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """The options of all trainings, with these defaults."""
    parser = common(description, batch=batch)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the checkpoint in the folder")
    add("--steps", type=int, default=steps, help="steps in all")
    add("--rate", type=float, default=rate, help="highest learning rate")
    add("--warmup", type=int, default=50, help="steps up to the highest rate")
    add("--decay", type=int, default=steps // 2, help="steps down to rate zero, at the end")
    add("--ema", type=float, default=0.99, help="how slowly the averaged weights, which are written, follow")
    add("--workers", type=int, default=0, help="processes that draw glimpse's pictures")
    add("--log-every", type=int, default=20, help="steps between two lines of the log")
    add("--save-every", type=int, default=100, help="steps between two checkpoints")
    add("--seed", type=int, default=0, help="seed of the first weights and of everything drawn")
    return parser


def load(options: argparse.Namespace, lessons: Sequence[str] = (GLIMPSE,)) -> tuple[Any, Any]:
    """The frozen model and its processor. lessons: the models that need no data of the user's.

    Raises:
        Mistake: where there is no such model, or nothing to learn from.
    """
    if options.model not in lessons and options.data is None:
        raise Mistake(f"--model {options.model} needs --data: a folder of questions about pictures, with answers")
    hush()
    device = resolve_device(options.device)
    source, dtype = built_in(options.model, options.dtype)
    model, processor = load_model(source, read_config(source), device=device, dtype=dtype, attn=None)
    return model.requires_grad_(False), processor


def encode(processor: Any, items: Sequence[Item]) -> Batch:
    """Model inputs and `labels` of some questions with their first answers, through the model's chat template.

    Prompts are padded on the left and answers on the right, so that labels begin at one place.
    """
    pictures = [item.pictures() for item in items]
    asked, told = (
        # The template writes what stands at the beginning.
        processor(
            images=pictures,
            text=[_talk(processor, item, len(images), answered) for item, images in zip(items, pictures, strict=True)],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        for answered in (False, True)
    )
    rows = [_parts(asked, told, row) for row in range(len(items))]
    front, behind = max(len(prompt) for prompt, _ in rows), max(len(answer) for _, answer in rows)
    batch = dict(told)
    for name, value in told.items():
        if value.shape[:2] == told["input_ids"].shape:
            rest = (processor.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
            batch[name] = torch.stack(
                [
                    F.pad(
                        value[row][torch.cat([prompt, answer])], (front - len(prompt), behind - len(answer)), value=rest
                    )
                    for row, (prompt, answer) in enumerate(rows)
                ]
            )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    labels[:, :front] = IGNORE
    return {**batch, "labels": labels}


def _talk(processor: Any, item: Item, pictures: int, answered: bool) -> str:
    content = [*[{"type": "image"}] * pictures, {"type": "text", "text": item.question}]
    talk = [{"role": "user", "content": content}]
    if answered:
        talk.append({"role": "assistant", "content": [{"type": "text", "text": item.answers[0]}]})
    text: str = processor.apply_chat_template(talk, add_generation_prompt=not answered, tokenize=False)
    return text


def _parts(asked: Batch, told: Batch, row: int) -> tuple[Tensor, Tensor]:
    """Where the prompt and the answer of a row stand in `told`: what both texts begin with is the prompt."""
    prompt, whole = (each["input_ids"][row][each["attention_mask"][row].bool()] for each in (asked, told))
    short = min(len(prompt), len(whole))
    same = int((prompt[:short] == whole[:short]).cumprod(0).sum())
    at = told["attention_mask"][row].nonzero().flatten()
    return at[:same], at[same:]


class Talks:
    """Batches of questions and answers from a folder. Those that follow on earlier ones are left out."""

    def __init__(self, processor: Any, folder: Path, batch: int, seed: int) -> None:
        self.processor, self.batch, self.seed = processor, batch, seed
        found, bad, _ = from_folder(folder)
        bad += [
            (item.line or 0, "it asks other questions first, which are not learned from")
            for item in found
            if item.before
        ]
        for line, why in bad:
            print(f"{folder}, line {line} is left out: {why}")
        self.items = [item for item in found if not item.before]
        if not self.items:
            raise Mistake(f'{folder} holds no question that stands alone: ask without "before"')

    def __call__(self, step: int) -> Iterator[Batch]:
        """The batches from some step on; each question comes once before any comes again."""
        for first in itertools.count(step * self.batch, self.batch):
            yield encode(self.processor, [self._item(number) for number in range(first, first + self.batch)])

    def _item(self, number: int) -> Item:
        turn, place = divmod(number, len(self.items))
        order = torch.randperm(len(self.items), generator=torch.Generator().manual_seed(self.seed + turn))
        return self.items[int(order[place])]


def on_device(model: Any, batch: Batch) -> Batch:
    """The batch where the model is, and in its dtype."""
    like = next(model.parameters())
    return {name: value.to(like if value.is_floating_point() else like.device) for name, value in batch.items()}


def answer_loss(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the answers under the pruned model, and the share of answer tokens that are right."""
    inputs = on_device(model, batch)
    labels = inputs.pop("labels")
    front = int((labels != IGNORE).any(0).int().argmax())
    # The engine reads from the labels where the prompt ends.
    logits = model(**inputs, labels=labels, use_cache=False).logits[:, front - 1 : -1].float()
    target = labels[:, front:]
    real = target != IGNORE
    right = (logits.argmax(-1) == target)[real].float().mean()
    return {"loss": F.cross_entropy(logits[real], target[real]), "right": right}


def train(
    options: argparse.Namespace,
    model: Any,
    method: TrainedMethod,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[TrainedMethod, Batch, int], Mapping[str, Tensor]],
    begin: Callable[[dict[str, Tensor]], None] = lambda weights: None,
    joint: Any = None,
) -> list[dict[str, float]]:
    """Run the steps that are left, and write the weights; returns the log.

    batches: from some step on. loss: of a batch at a step, under the pruned model: "loss", and what else the log
    should say. begin: changes the first weights in place. joint: the model's processor, where its LLM is trained along:
    then all three are written, as a model of its own.

    Raises:
        Mistake: where the folder holds another training.
        SystemExit: when interrupted, once everything is saved.
    """
    torch.manual_seed(options.seed)
    target = find_target(model)
    first = method.initial(target.host)
    begin(first)
    own = {name: nn.Parameter(tensor) for name, tensor in first.items()}
    tools = optimizers(own, options.rate) if own else []
    along = {} if joint is None else _language(model)
    if along:
        tools.append(torch.optim.AdamW([{"params": list(along.values()), "share": ALONG}], betas=(0.9, 0.98)))
    weights = {**own, **along}
    average = {name: tensor.detach().clone() for name, tensor in weights.items()}
    step, log = _resume(options, method, weights, average, tools)

    def save() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"weights": weights, "average": average, "step": step, "log": log}
        state |= {"optimizers": [tool.state_dict() for tool in tools], "method": method.to_dict()}
        torch.save(state, options.out / "checkpoint.tmp")
        (options.out / "checkpoint.tmp").replace(options.out / CHECKPOINT)
        with _holding(along, average):
            folder = options.out
            if along:
                folder = options.out / "model"
                model.save_pretrained(folder)
                joint.save_pretrained(folder)
            if ours := {name: average[name] for name in own}:
                write_plugin(folder / WEIGHTS_NAME, method, target.host.model_type, target.host.fingerprint(), ours)

    begun = time.perf_counter() - (log[-1]["seconds"] if log else 0)
    held = method.holding(own)  # type: ignore[arg-type]
    try:
        with foveate.prune(model, held):
            for batch in batches(step) if step < options.steps else ():
                rate = options.rate * min(1.0, (step + 1) / options.warmup, (options.steps - step) / options.decay)
                for group in (group for tool in tools for group in tool.param_groups):
                    group["lr"] = rate * group.get("share", 1.0)
                torch.manual_seed(options.seed + step)  # the same after an interruption
                losses = loss(held, batch, step)
                losses["loss"].backward()
                nn.utils.clip_grad_norm_(weights.values(), 1.0)
                for tool in tools:
                    tool.step()
                    tool.zero_grad(set_to_none=True)
                step += 1
                keep = min(options.ema, (1 + step) / (10 + step))
                for name, tensor in weights.items():
                    average[name].lerp_(tensor.detach(), 1 - keep)
                if step % options.log_every == 0 or step == options.steps:
                    entry = {"step": step, "seconds": time.perf_counter() - begun, "rate": rate}
                    log.append(entry | {name: value.item() for name, value in losses.items()})
                    print(json.dumps({name: round(value, 5) for name, value in log[-1].items()}), flush=True)
                if step == options.steps:
                    break
                if step % options.save_every == 0:
                    save()
    except KeyboardInterrupt:
        save()
        print(f"stopped behind step {step}: the same command with --resume goes on there", flush=True)
        raise SystemExit(130) from None
    save()
    return log


def optimizers(weights: Mapping[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for everything else, as glimpse itself was trained."""
    inner = [tensor for name, tensor in weights.items() if tensor.ndim == 2 and name.endswith("weight")]
    others = [tensor for tensor in weights.values() if all(tensor is not each for each in inner)]
    tools: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))]
    if inner:
        tools.append(torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return tools


def _language(model: Any) -> dict[str, nn.Parameter]:
    """The weights of the LLM by their names in the model, which are trained from now on."""
    parts = [find_target(model).decoder, model.get_output_embeddings()]
    inside = {id(weight) for part in parts for weight in part.requires_grad_(True).parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in inside}


@contextlib.contextmanager
def _holding(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let weights be other values for a while."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        _copy(values, weights)
        yield
    finally:
        _copy(before, weights)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def _resume(
    options: argparse.Namespace,
    method: TrainedMethod,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    tools: Sequence[torch.optim.Optimizer],
) -> tuple[int, list[dict[str, float]]]:
    """Take over the checkpoint in the folder, if that is wanted: the steps done so far, and their log."""
    path = options.out / CHECKPOINT
    if not path.exists():
        return 0, []
    if not options.resume:
        raise Mistake(f"{path} is there already: add --resume to go on with it, or name another --out")
    saved = torch.load(path, map_location=next(iter(weights.values())).device)
    if saved["method"] != method.to_dict():
        raise Mistake(f"{path} is of {saved['method']}, not of {method.to_dict()}: name another --out")
    if saved["weights"].keys() != weights.keys():
        raise Mistake(f"{path} trained other weights (with or without --joint): name another --out")
    _copy(saved["weights"], weights)
    _copy(saved["average"], average)
    for tool, state in zip(tools, saved["optimizers"], strict=True):
        tool.load_state_dict(state)
    return saved["step"], saved["log"]
