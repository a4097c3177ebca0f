"""Methods that merge tokens of several frames, against plain models whose embeddings went through the same arithmetic.

The reference reads an untouched eager encoder, chooses and merges in plain Python, writes the new embeddings over the
old ones of the whole prompt, and hides what left from every query. Nothing of foveate's code takes part in it.
"""

from __future__ import annotations

from unittest.mock import patch

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE
from test_maths_video import slow_fastvid, slow_holitom
from test_merging_encoder import logits_of, tower_parts
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.vision_utils import get_vision_window_index

import foveate

FAR = 1e-2  # what a mistake costs at least
METHODS = {
    "fastvid": (slow_fastvid, dict(keep=0.5, segments=1, alike=-1.0)),
    "holitom": (slow_holitom, dict(keep=0.4, alike=0.5)),
}
names = pytest.mark.parametrize("name", METHODS)
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
decodings = pytest.mark.parametrize("decoding", [oracle.GREEDY, oracle.BEAMS], ids=["greedy", "beams"])


def qwen_scores(base, batch: dict) -> list[torch.Tensor]:
    """Of each video (frames, n), what each token receives in the last full-attention block but the final one."""
    visual, eager, scores = base.visual, qwen.eager_attention_forward, []
    block = visual.blocks[[i for i in visual.fullatt_block_indexes if i <= len(visual.blocks) - 2][-1]].attn

    def watched(module, query, key, *args, **kwargs):
        output, weights = eager(module, query, key, *args, **kwargs)
        if module is block:
            scores.append(weights[0].mean(0).mean(0))  # a frame at a time
        return output, weights

    grids = batch["video_grid_thw"]
    with patch.object(qwen, "eager_attention_forward", watched):
        base.get_video_features(batch["pixel_values_videos"], grids)
    order, _ = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
    merged = torch.cat(scores).unflatten(0, (-1, 4)).mean(1)[order.argsort()]
    each = (grids.prod(1) // 4).tolist()
    return [part.unflatten(0, (int(t), -1)) for part, t in zip(merged.split(each), grids[:, 0], strict=True)]


def llava_scores(base, batch: dict, clips) -> list[torch.Tensor]:
    """Of each clip (frames, n), what [CLS] pays, summed over heads, which ranks as the mean does."""
    scores, _, _ = tower_parts(base, batch["pixel_values"], 1)
    return list(scores.split(clips))


@torch.no_grad()
def reference(family, name, batch, spans, scores_of, sequences, rows, merge: bool = True):
    """Logits of every step, and bool (batch, prompt), what was kept. spans: of each clip its row and its frames."""
    slow, options = METHODS[name]
    method = foveate.get_method(name, **options)
    model = tiny.build(family, "eager")
    embeds, positions = oracle.embedded(model, batch)
    kept, embeds = batch["attention_mask"].bool(), embeds.clone()
    ids = batch["input_ids"]
    where = [list((row.eq(tiny.IMAGE) | row.eq(tiny.VIDEO)).nonzero().flatten()) for row in ids]
    for (row, frames), scores in zip(spans, scores_of(model.model), strict=True):
        n = scores.shape[1]
        at = torch.stack([where[row].pop(0) for _ in range(frames * n)])
        old = embeds[row, at].unflatten(0, (frames, n)).clone()
        become = slow(old, scores, max(frames, int(options["keep"] * frames * n)), method)
        kept[row, at] = False
        for (frame, token), value in become.items():
            kept[row, at[frame * n + token]] = True
            if merge:
                embeds[row, at[frame * n + token]] = value
    return logits_of(model, embeds, positions, kept, sequences, rows), kept


def check(family, name, batch, spans, scores_of, attn, decoding, clips=None) -> float:
    """Compare a run with the one by hand, and return the largest difference."""
    with foveate.prune(tiny.build(family, attn), name, record=True, **METHODS[name][1]) as handle:
        if clips is None:
            run = oracle.run(handle.model, batch, **decoding)
        else:
            with handle.clips(clips):
                run = oracle.run(handle.model, batch, **decoding)
        report = handle.report
    copies = len(report.layers[0].kept) // len(batch["input_ids"])  # the prefill runs a row for each beam
    rows = run.rows // copies
    dense, kept = reference(family, name, batch, spans, scores_of, run.sequences, rows)
    for layer in report.layers:
        assert torch.equal(layer.kept[:, 0], kept.repeat_interleave(copies, 0))
    worst = (dense - run.logits).abs().max()
    assert worst < TOLERANCE
    unmerged, _ = reference(family, name, batch, spans, scores_of, run.sequences, rows, merge=False)
    assert (unmerged - run.logits).abs().max() > FAR, "merging makes a difference"
    return float(worst)


def check_videos(name, spec: dict, attn, decoding) -> float:
    batch = tiny.videos("qwen2_5_vl", **spec)
    counts = tiny.video_counts("qwen2_5_vl", spec["videos"])
    spans = [(row, len(frames)) for row, films in enumerate(counts) for frames in films]
    return check("qwen2_5_vl", name, batch, spans, lambda base: qwen_scores(base, batch), attn, decoding)


@names
@backends
@decodings
def test_videos_equal_a_plain_model_with_merged_embeddings(name, attn, decoding):
    check_videos(name, dict(videos=(1, 2, 1), text=(4, 9, 2)), attn, decoding)


@names
@decodings
def test_frames_that_are_pictures_equal_a_plain_model_with_merged_embeddings(name, decoding):
    batch = tiny.inputs("llava", images=(5, 3), text=(4, 8), between=1)
    rng = torch.Generator().manual_seed(5)
    pixels = batch["pixel_values"]
    batch["pixel_values"] = pixels[:1] + 0.3 * torch.randn(pixels.shape, generator=rng)
    spans = [(0, 5), (1, 1), (1, 2)]
    check(
        "llava",
        name,
        batch,
        spans,
        lambda base: llava_scores(base, batch, [5, 1, 2]),
        "sdpa",
        decoding,
        clips=[5, 1, 2],
    )
