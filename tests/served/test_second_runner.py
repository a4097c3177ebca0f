"""Positions under vLLM's second model runner, which needs a GPU: its own pruner, on buffers like its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

HIDDEN, TEXT, PICTURE = 16, 1, 9


class Grids:
    """A stock model with the M-RoPE of Qwen."""

    def get_mrope_input_positions(self, tokens: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
        table, at, begins = [], 0, 0
        for feature in features:
            words = feature.mm_position.offset - at
            table.append(torch.arange(words).expand(3, -1) + begins)
            rows, columns = feature.data["grid"].data
            index = torch.arange(rows * columns)
            table.append(torch.stack([index * 0, index // columns, index % columns]) + begins + words)
            at, begins = feature.mm_position.offset + len(index), begins + words + max(rows, columns)
        table.append(torch.arange(len(tokens) - at).expand(3, -1) + begins)
        positions = torch.cat(table, 1)
        return positions, int(positions.max()) + 1 - len(tokens)


def pruned_model(m_rope: bool) -> Any:
    from foveate.families import get_family
    from foveate.vllm.model import PrunedModel

    class Model(PrunedModel, Grids):
        def __init__(self) -> None:
            self._m_rope, self._hidden = m_rope, HIDDEN
            self._family = get_family("qwen2_vl")
            self._config = SimpleNamespace(image_token_id=PICTURE, video_token_id=8)

    return Model()


class Rope:
    """RopeState without the GPU: int32, three rows a request."""

    def __init__(self, requests: int, longest: int) -> None:
        self.table = torch.zeros(3 * requests, longest, dtype=torch.int32)
        self.deltas: dict[int, int] = {}

    def read_prefill_positions(self, request: int, length: int) -> torch.Tensor:
        return self.table[3 * request : 3 * request + 3, :length]

    def update_prefill_positions(self, request: int, positions: torch.Tensor, delta: int) -> None:
        self.table[3 * request : 3 * request + 3, : positions.shape[1]].copy_(positions)
        self.deltas[request] = delta


@pytest.mark.parametrize("window", [10_000, 37, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m_rope", [False, True])
def test_three_requests_in_steps(m_rope: bool, dtype: torch.dtype, window: int) -> None:
    from vllm.multimodal.inputs import PlaceholderRange
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    from foveate.layout import ImageLayout, Tile
    from foveate.vllm.plan import Plan
    from foveate.vllm.positions import columns_of
    from foveate.vllm.processor import PLAN

    rng, model, rope = torch.Generator().manual_seed(0), pruned_model(m_rope), Rope(3, 4096)
    prompts, features, truths, embeddings = [], [], [], {}
    for request, grids in enumerate([[(20, 30)], [(5, 7), (24, 24)], [(3, 3), (3, 3), (40, 2)]]):
        tokens, full, columns, own, whole = [TEXT] * 3, [TEXT] * 3, [0, 1, 2], [], []
        for number, grid in enumerate(grids):
            n = grid[0] * grid[1]
            kept = max(1, n // 4)
            index = torch.randperm(n, generator=rng)[:kept].sort().values
            ids = torch.full((n,), PICTURE)
            layout = ImageLayout(n, (Tile(torch.arange(n), grid, torch.arange(n)),))
            plan = Plan(layout, n, kept, ids, ids == PICTURE)
            data = {"grid": SimpleNamespace(data=grid), PLAN: SimpleNamespace(data=plan.tensor())}
            name = f"{request}-{number}"
            place = PlaceholderRange(offset=len(tokens), length=kept)
            own.append(SimpleNamespace(modality="image", data=data, mm_position=place, identifier=name))
            place = PlaceholderRange(offset=len(full), length=n)
            whole.append(SimpleNamespace(modality="image", data=data, mm_position=place))
            rows = torch.randn(kept, HIDDEN, generator=rng).to(dtype)
            embeddings[name] = torch.cat([rows, columns_of(plan.offsets(index, m_rope).T, dtype)], 1)
            columns += [*(len(full) + index).tolist(), len(full) + n]
            tokens, full = [*tokens, *[PICTURE] * kept, TEXT], [*full, *[PICTURE] * n, TEXT]
        truth = torch.arange(len(full)).expand(3, -1)
        if m_rope:
            truth = Grids().get_mrope_input_positions(full, whole)[0]
        truths.append(truth[:, columns])
        guess, delta = model.get_mrope_input_positions(tokens, own)
        rope.update_prefill_positions(request, guess.int(), delta)
        prompts.append(tokens)
        features.append(own)
    pruner = MultiModalPruner(
        model, rope, SimpleNamespace(mm_features={str(i): own for i, own in enumerate(features)}), HIDDEN
    )
    ids = torch.zeros(3, 4096, dtype=torch.int32)
    for request, tokens in enumerate(prompts):
        ids[request, : len(tokens)] = torch.tensor(tokens)
    lengths, done = np.array([len(tokens) for tokens in prompts]), np.zeros(3, dtype=int)
    while (done < lengths).any():
        step = np.minimum(window, lengths - done)
        parts = []
        for request, own in enumerate(features):
            for feature in own:
                offset, length = feature.mm_position.offset, feature.mm_position.length
                first, behind = max(done[request] - offset, 0), min(done[request] + step[request] - offset, length)
                parts += [embeddings[feature.identifier][first:behind]] if first < behind else []
        batch = SimpleNamespace(
            req_ids=list("012"),
            idx_mapping_np=np.arange(3),
            prefill_len_np=lengths,
            num_computed_prefill_tokens_np=done,
            num_scheduled_tokens=step,
        )
        if parts:
            state = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
            assert all(rows.shape[1] == HIDDEN for rows in pruner.recompute(parts, batch, state))
        done = done + step
    for request, truth in enumerate(truths):
        used = slice(0, 3) if m_rope else slice(0, 1)
        assert rope.read_prefill_positions(request, len(prompts[request])).long()[used].equal(truth[used])
        assert rope.deltas[request] == int(truth[0, -1]) + 1 - len(prompts[request])
