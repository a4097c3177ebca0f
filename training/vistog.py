"""Trains VisToG's semantic tokens, its grouping layer and its copy of the projector; the model stays as it is.

python training/vistog.py --out training/runs/vistog
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plugin
import torch
import torch.nn.functional as F
from lessons import Lessons
from pupils import Pupil, alone, half_precision, normal, plain_attention
from torch import Tensor
from train import endless
from transformers import AttentionInterface

from foveate.engine.images import attached
from foveate.engine.support import find_target
from foveate.evaluation.results import run_script
from foveate.families import get_family
from foveate.methods.trained import TrainedMethod
from foveate.methods.vistog import VisToG, members


@dataclass
class Learner(VisToG):
    """VisToG whose grouping has a gradient: groups are drawn with Gumbel noise, and weighted on the way back."""

    tau = 1.0
    """Of the softmax whose gradient is taken; no option, since what is trained does not depend on it."""

    def joins(self, affinities: Tensor) -> Tensor:
        noise = -torch.empty_like(affinities).exponential_().log()
        soft = ((affinities + noise) / self.tau).softmax(-2)
        return members(soft).float() - soft.detach() + soft


class Packed:
    """glimpse's lessons: about a dozen questions in one sequence behind the groups of its pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.lessons = Lessons(processor)
        self.pupil = Pupil(model, self.lessons).eval()
        AttentionInterface.register("plain", plain_attention)

    def batches(self, options: argparse.Namespace, step: int) -> Iterator[plugin.Batch]:
        settings = {"see_steps": 0, "steps": options.steps, "batch": options.batch, "workers": options.workers}
        return endless(self.lessons.processor, argparse.Namespace(**settings, size="glimpse"), step)

    def loss(self, batch: plugin.Batch) -> dict[str, Tensor]:
        """Cross-entropy of the answers, with every group at the place where the engine puts it."""
        self.pupil.model.set_attn_implementation("plain")  # now, since prune() refuses it; no pruned layer runs here
        core = self.pupil.model.model
        pixels = normal(batch["pixels"].flatten(0, 1))
        encoded = core.get_image_features(pixel_values=pixels)
        features, images = encoded.pooler_output, attached(encoded, "pooler_output")
        assert images is not None
        tokens = torch.stack([feature[image.keep] for feature, image in zip(features, images, strict=True)])
        at = torch.stack([image.keep.nonzero().flatten() for image in images])
        size, ids = len(features[0]), batch["ids"]
        at = at.unflatten(0, (len(ids), -1))
        at = (at + size * torch.arange(at.shape[1], device=at.device).unsqueeze(-1)).flatten(1)
        tokens = tokens.reshape(len(ids), -1, tokens.shape[-1])

        embed, prefix = core.language_model.embed_tokens, self.pupil.prefix
        head = len(prefix) + tokens.shape[1]
        inputs = torch.cat([embed(prefix).expand(len(ids), -1, -1), tokens, embed(ids)], 1)
        mask, positions = alone(batch["turn"], head)
        positions[:, len(prefix) : head] = len(prefix) + at
        positions[:, head:] += batch["pixels"].shape[1] * size - tokens.shape[1]
        hidden = core.language_model(
            inputs_embeds=inputs, attention_mask=mask.to(inputs.dtype), position_ids=positions, use_cache=False
        ).last_hidden_state
        scored = self.pupil.score(hidden, head, batch)
        return {"loss": scored["answer"], "right": scored["right"]}


@torch.no_grad()
def spread(model: Any, pixels: Tensor, weights: dict[str, Tensor]) -> None:
    """Let the semantic tokens begin as patches: the mean of what stands in each cell of an even split of the picture.

    pixels: (pictures, 3, height, width), or (pictures, tiles, 3, height, width), as the model takes them.
    """
    seen: list[Tensor] = []
    layer = get_family(model.config).encoder_layers(model.model)[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.model.vision_tower(pixels.flatten(0, -4).to(model.device, model.dtype))
    handle.remove()
    states = seen[0].float()
    side = int(states.shape[1] ** 0.5)  # in front of the patches stands [CLS], or nothing
    patches = states[:, states.shape[1] - side**2 :].mean(0).T.unflatten(-1, (side, side))
    count = len(weights["seeds"])
    rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
    cells = F.adaptive_avg_pool2d(patches, (rows, count // rows)).flatten(1).T
    # As loud as a patch: what differs between pictures went out of the mean.
    weights["seeds"] += cells * (states.square().mean() / cells.square().mean()).sqrt()


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs the steps that are left, and returns the log."""
    model, processor = plugin.load(options)
    method = Learner(keep=options.keep, grouping=options.grouping, carriers=options.carriers)
    packed = Packed(model, processor) if options.data is None else None

    def loss(held: TrainedMethod, batch: plugin.Batch, step: int) -> dict[str, Tensor]:
        assert isinstance(held, Learner)
        held.tau = 1 - 0.5 * step / options.steps
        if packed is None:
            return plugin.answer_loss(model, batch)
        with half_precision(model.device):
            return packed.loss({name: value.to(model.device) for name, value in batch.items()})

    if packed is not None:
        batches = partial(packed.batches, options)
    else:
        batches = plugin.Talks(processor, options.data, options.batch, options.seed)
    first = next(batches(0))
    pixels = first["pixel_values"] if packed is None else normal(first["pixels"].flatten(0, 1))

    def begin(weights: dict[str, Tensor]) -> None:
        if options.begin_with:
            earlier = VisToG(options.keep, options.begin_with, options.grouping, options.carriers)
            weights.update(earlier.for_host(find_target(model).host).tensors)
        else:
            spread(model, pixels, weights)

    return plugin.train(options, model, method, batches, loss, begin, processor if options.joint else None)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = plugin.parser(__doc__, steps=1200, batch=16, rate=1.5e-3)
    add = parser.add_argument
    add("--keep", type=int, default=VisToG.keep, help="semantic tokens")
    add("--grouping", choices=("hard", "soft"), default=VisToG.grouping)
    add("--carriers", choices=("centroid", "first"), default=VisToG.carriers, help="where the groups stand")
    add("--begin-with", type=Path, help="weights of an earlier training, or their folder, which are the first")
    add("--joint", action="store_true", help="train the LLM along, and write a model of its own in place of a plug-in")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(lambda: train(parse()))
