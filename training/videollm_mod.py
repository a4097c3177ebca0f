"""Trains VideoLLM-MoD: its routers on a frozen model, or with --joint the language model with them.

python training/videollm_mod.py --out training/runs/videollm_mod                     # a plug-in for glimpse-video
python training/videollm_mod.py --joint --out training/runs/videollm_mod-joint       # a model and its plug-in

With --joint the other arms of the paper's tables are trained, too: --router random, uniform, none (all tokens go
through every layer) or exit (what is not drawn leaves for good in front of layer 1, as `random_layer` has it).
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plugin
import torch
import torch.nn.functional as F
from clip_lessons import ClipLessons, clip_keys
from lessons import IGNORE, Lessons, keys
from pupils import Pupil, alone, half_precision, normal, plain_attention
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface

from foveate.asking.loading import GLIMPSE, GLIMPSE_VIDEO
from foveate.asking.mistake import Mistake
from foveate.engine.rows import gather_rows
from foveate.engine.support import find_target
from foveate.evaluation.results import run_script
from foveate.glimpse.clips import TOKENS
from foveate.methods.budgets import floor_budget
from foveate.methods.tokens import ImageGroups
from foveate.methods.trained import TrainedMethod
from foveate.methods.videollm_mod import VideoLLMMoD, router_logits, router_weight

TAUS = (1.0, 0.005)  # at the first step and at the last
SEEN = 5.0  # so that a router's score counts as one in the attention's
ROUTERS = ("learned", "random", "uniform", "none", "exit")


@dataclass
class Relaxed(VideoLLMMoD):
    """VideoLLM-MoD whose choice has a gradient: all tokens go through, but the further a score lies below those of the
    best, the less a token takes of what the layer makes of it, and the less the others look at it. tau: how far is far;
    near zero it is the choice itself.
    """

    tau = 1.0

    def select(self, states: Tensor, groups: ImageGroups, layer: int) -> tuple[Tensor, Tensor | None]:
        logits = router_logits(states, self.tensors[f"{layer}.weight"], self.tensors[f"{layer}.bias"])
        budget = floor_budget(self.share(groups), groups).unsqueeze(1)
        ranked = logits.masked_fill(~groups.present, -torch.inf).sort(dim=1, descending=True).values
        ranked = F.pad(ranked, (0, 1), value=-torch.inf)
        border = (ranked.gather(1, budget - 1) + ranked.gather(1, budget)) / 2
        share = F.logsigmoid((logits - border) / self.tau)
        self.shown = groups, share.clamp(min=-10)
        return groups.present, share.exp() * router_weight(logits)

    def look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """In front of a routed layer's attention: let it see less of what should not be there."""
        (groups, share), hidden = self.shown, kwargs["hidden_states"]
        batch, length = hidden.shape[:2]
        seen = torch.zeros(batch, length + 1, dtype=share.dtype, device=hidden.device)
        # Padding points one past the end.
        at = torch.where(groups.present, groups.positions, length)
        seen = seen.index_put((groups.row.unsqueeze(1).expand_as(at), at), share)[:, None, None, :-1]
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=hidden.device).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return args, {**kwargs, "attention_mask": (mask + seen).to(hidden.dtype)}

    @contextmanager
    def looking(self, layers: nn.ModuleList) -> Iterator[None]:
        """The hooks for that, inside the block."""
        routed = self.routed(len(layers))
        handles = [layers[i].self_attn.register_forward_pre_hook(self.look, with_kwargs=True) for i in routed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Routed:
    """The hooks of layers that run on what a method sends through them. Every sample has as many images of one size.

    As the engine does it, but with the mask of many questions in one sequence, which the engine does not take. A weight
    has two gradients: that of what a token takes from the layer, and that of how much the others look at it, which the
    layer itself does not depend on; without the second the last layer's router, behind which nobody reads image tokens,
    would learn nothing. for_good: what does not go through the first of the layers never comes back, and the others
    are those behind it.
    """

    def __init__(self, method: VideoLLMMoD, is_image: Tensor, tokens: int, for_good: bool = False) -> None:
        self.method, self.for_good = method, for_good
        positions = is_image.nonzero()[:, 1].view(-1, tokens)
        row = torch.arange(len(is_image), device=is_image.device).repeat_interleave(len(positions) // len(is_image))
        count = torch.full_like(row, tokens)
        self.groups = ImageGroups(positions, row, count, torch.zeros_like(row))
        self.length = is_image.shape[1]
        self.hidden: Tensor | None = None  # in front of the layer at hand
        self.source: Tensor | None = None  # (batch, rows), what goes in
        self.weight: Tensor | None = None  # (batch, rows)

    def enter(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if self.hidden is None:
            self._choose(layer, hidden)
            hidden = gather_rows(hidden, self.source)
        embeddings = tuple(gather_rows(part, self.source) for part in kwargs["position_embeddings"])
        mask = kwargs["attention_mask"].expand(len(hidden), -1, -1, -1)
        mask = mask.gather(2, self.source[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        mask = mask.gather(3, self.source[:, None, None].expand(-1, 1, mask.shape[2], -1))
        if self.weight.requires_grad:  # nothing but a gradient
            mask = mask + SEEN * (self.weight - self.weight.detach())[:, None, None]
        return (hidden, *args[1:]), {**kwargs, "position_embeddings": embeddings, "attention_mask": mask}

    def _choose(self, layer: int, hidden: Tensor) -> None:
        at = self.groups.row.unsqueeze(1), self.groups.positions
        with torch.autocast(hidden.device.type, enabled=False):  # the engine's scores are float32
            through, weight = self.method.select(hidden[at], self.groups, layer)
        keep = torch.ones(len(hidden), self.length, dtype=torch.bool, device=hidden.device)
        keep[at] = through
        self.hidden, self.source = hidden, keep.nonzero()[:, 1].view(len(hidden), -1)
        weights = torch.ones(keep.shape, dtype=hidden.dtype, device=hidden.device)
        if weight is not None:
            weights[at] = weight.to(hidden.dtype)
        self.weight = weights.gather(1, self.source)

    def leave(self, last: bool, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.for_good and not last:
            return out
        hidden, source = self.hidden, self.source
        assert hidden is not None and source is not None and self.weight is not None
        if not self.for_good:
            out = torch.lerp(args[0], out, self.weight.unsqueeze(-1))
        self.hidden = None
        return hidden.scatter(1, source.unsqueeze(-1).expand_as(out), out)

    @contextmanager
    def __call__(self, layers: nn.ModuleList) -> Iterator[None]:
        routed = range(1, len(layers)) if self.for_good else self.method.routed(len(layers))
        handles = []
        for i in routed:
            enter, leave = self._hooks(i, i == len(layers) - 1)
            handles.append(layers[i].register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layers[i].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, layer: int, last: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return lambda *given: self.enter(layer, *given), lambda *given: self.leave(last, *given)


class Packed:
    """glimpse's lessons, of clips or pictures: about a dozen questions in one sequence behind the frames."""

    def __init__(self, model: Any, processor: Any, router: str) -> None:
        self.clips, self.router = model.config.image_seq_length == TOKENS, router
        self.lessons = (ClipLessons if self.clips else Lessons)(processor)
        self.pupil = Pupil(model, self.lessons).eval()
        AttentionInterface.register("plain", plain_attention)

    def batches(self, options: argparse.Namespace, step: int) -> Iterator[plugin.Batch]:
        steps = range(step, options.steps)
        chosen = [clip_keys(s, options.batch) if self.clips else keys(s, options.batch, single=False) for s in steps]
        return iter(DataLoader(self.lessons, batch_sampler=chosen, num_workers=options.workers))

    def whole(self, batch: plugin.Batch) -> plugin.Batch:
        """The same with ids, labels and turns of the whole sequence, frames and all."""
        if self.clips:
            return batch
        prefix = torch.tensor(self.lessons.prefix(batch["pixels"].shape[1]), device=batch["ids"].device)
        head = len(prefix)
        ids = torch.cat([prefix.expand(len(batch["ids"]), -1), batch["ids"]], 1)
        return {**batch, "ids": ids, "labels": F.pad(batch["labels"], (head, 0), value=IGNORE)} | {
            "turn": F.pad(batch["turn"], (head, 0))
        }

    def routed(self, method: VideoLLMMoD, is_image: Tensor) -> AbstractContextManager[None]:
        """What the layers run in."""
        if self.router == "none":
            return nullcontext()
        model = self.pupil.model
        hooks = Routed(method, is_image, model.config.image_seq_length, self.router == "exit")
        return hooks(model.model.language_model.layers)

    def loss(self, method: VideoLLMMoD, batch: plugin.Batch) -> dict[str, Tensor]:
        """Cross-entropy of the answers, and the share of their tokens that are right."""
        batch, core = self.whole(batch), self.pupil.model.model
        self.pupil.model.set_attn_implementation("plain")  # which no prompt of the engine's would run on
        ids = batch["ids"]
        with torch.no_grad():  # the vision encoder stays as it is
            states = core.vision_tower(normal(batch["pixels"].flatten(0, 1)), output_hidden_states=True).hidden_states
            tokens = core.multi_modal_projector(states[-2][:, 1:])
        is_image = ids == self.pupil.model.config.image_token_id
        inputs = core.language_model.embed_tokens(ids).to(tokens.dtype).masked_scatter(is_image[..., None], tokens)
        mask, positions = alone(batch["turn"], 0)
        with self.routed(method, is_image):
            hidden = core.language_model(
                inputs_embeds=inputs, attention_mask=mask.to(tokens.dtype), position_ids=positions, use_cache=False
            ).last_hidden_state
        scored = self.pupil.score(hidden, 0, batch)
        return {"loss": scored["answer"], "right": scored["right"]}


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs the steps that are left, and returns the log."""
    if not options.joint and options.router != "learned":
        raise Mistake(f"--router {options.router} has no weights of its own: train the model with it, --joint")
    if options.data is not None and options.router in ("none", "exit"):
        raise Mistake(f"--router {options.router} is an arm on glimpse's own lessons: leave --data out")
    model, processor = plugin.load(options, lessons=(GLIMPSE, GLIMPSE_VIDEO))
    if options.router == "none":
        method = VideoLLMMoD(keep=1.0, router="uniform")
    elif options.router == "exit":
        method = VideoLLMMoD(keep=options.keep, layers=(1,), router="random")
    else:
        kind = VideoLLMMoD if options.joint else Relaxed
        method = kind(keep=options.keep, layers=options.layers, router=options.router)
    target = find_target(model)
    decoder = target.decoder
    packed = Packed(model, processor, options.router) if options.data is None else None

    def loss(held: TrainedMethod, batch: plugin.Batch, step: int) -> dict[str, Tensor]:
        assert isinstance(held, VideoLLMMoD)
        looking: AbstractContextManager[None] = nullcontext()
        if isinstance(held, Relaxed):
            held.tau = TAUS[0] * (TAUS[1] / TAUS[0]) ** (step / options.steps)
            looking = held.looking(decoder.layers)
        with looking:
            if packed is None:
                return plugin.answer_loss(model, batch)
            drawing = dataclasses.replace(held, seed=step) if held.router == "random" else held
            with half_precision(model.device):
                return packed.loss(drawing, {name: value.to(model.device) for name, value in batch.items()})

    if packed is not None:
        batches: Callable[[int], Iterator[plugin.Batch]] = partial(packed.batches, options)
    else:
        batches = plugin.Talks(processor, options.data, options.batch, options.seed)

    def begin(weights: dict[str, Tensor]) -> None:
        if options.begin_with and weights:
            earlier = dataclasses.replace(method, weights=options.begin_with)
            weights.update(earlier.for_host(target.host).tensors)

    return plugin.train(options, model, method, batches, loss, begin, processor if options.joint else None)


def layers(text: str) -> Any:
    """`interleaved`, or `1,3,5`."""
    return tuple(map(int, text.split(","))) if text[:1].isdigit() else text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = plugin.parser(__doc__ or "", steps=200, batch=24, rate=5e-3)
    parser.set_defaults(model=GLIMPSE_VIDEO)
    add = parser.add_argument
    add("--joint", action="store_true", help="train the language model with the routers, and write it, too")
    add("--keep", type=float, default=VideoLLMMoD.keep, help="share of each frame that goes through a routed layer")
    add("--layers", type=layers, default=VideoLLMMoD.layers, help="interleaved, all, ..., or numbers: 1,3,5")
    add("--router", choices=ROUTERS, default="learned", help="with --joint, also the arms it has to beat")
    add("--begin-with", type=Path, help="routers of an earlier training, or their folder, which are the first")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(lambda: train(parse()))
