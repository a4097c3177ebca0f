"""Density-peak clustering over nearest neighbours (DPC-kNN), batched and with ragged sets."""

from __future__ import annotations

import torch
from torch import Tensor


def peak_scores(distance: Tensor, valid: Tensor, neighbours: Tensor, most: int) -> Tensor:
    """How much each point is dense and far from any denser point: the logarithm of its density x its separation.

    A point's density is exp(-mean squared distance to its nearest points, itself included), its separation the distance
    to the nearest denser point (for the densest, the largest distance of the set); among equal densities the lower
    index is the denser.

    distance: float32 (sets, n, n), 0 on the diagonal. valid: bool (sets, n), False at padding.
    neighbours: (sets,) how many nearest points count, at most the number of valid ones. most: an upper bound of it, at
    most n. Returns (sets, n), -inf at padding.
    """
    distance = distance.masked_fill(~(valid.unsqueeze(1) & valid.unsqueeze(2)), torch.inf)
    real = torch.arange(most, device=distance.device) < neighbours.unsqueeze(-1)
    nearest = distance.topk(most, dim=-1, largest=False).values.masked_fill(~real.unsqueeze(1), 0)
    # Logarithms throughout: densities of hidden states underflow.
    density = -nearest.square().sum(-1) / neighbours.clamp(min=1).unsqueeze(-1)
    index = torch.arange(distance.shape[-1], device=distance.device)
    mine, other = density.unsqueeze(-1), density.unsqueeze(-2)
    denser = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
    largest = distance.masked_fill(distance.isinf(), 0).amax((1, 2)).unsqueeze(-1)
    separation = distance.masked_fill(~denser, torch.inf).amin(-1).minimum(largest)
    tiny = torch.finfo(distance.dtype).tiny
    return (density + separation.clamp(min=tiny).log()).masked_fill(~valid, -torch.inf)


def density_peaks(
    distance: Tensor, valid: Tensor, clusters: Tensor, most: int, neighbours: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split each set around the points that are dense and far from any denser point.

    The k points with the largest `peak_scores` are the centres, k the number of clusters, and every other point joins
    the nearest centre (a tie goes to the better centre).

    distance, valid: as `peak_scores` takes them. clusters: (sets,) at most the number of valid points.
    most: an upper bound of `clusters`, at most n. neighbours: how many nearest points a density counts, at most k; None
    for k.

    Returns centers (sets, most), best first; real, bool (sets, most), False beyond `clusters`; and member (sets, n),
    the place of each point's centre among `centers`, without meaning at padding.
    """
    nearest = most if neighbours is None else min(most, neighbours)
    score = peak_scores(distance, valid, clusters.clamp(max=nearest), nearest)
    real = torch.arange(most, device=distance.device) < clusters.unsqueeze(-1)
    centers = score.argsort(dim=-1, descending=True, stable=True)[:, :most]
    reach = distance.gather(2, centers.unsqueeze(1).expand(-1, distance.shape[1], -1))
    # A centre joins itself, even where it coincides with another.
    reach = reach.scatter(1, centers.unsqueeze(1), -1).masked_fill(~real.unsqueeze(1), torch.inf)
    return centers, real, reach.argmin(-1)


def cluster_means(points: Tensor, member: Tensor, valid: Tensor, most: int) -> Tensor:
    """Mean of each cluster's points: float32 (sets, most, d), 0 where a cluster is empty.

    points: (sets, n, d). member: (sets, n). valid: bool (sets, n).
    """
    joins = (member.unsqueeze(1) == torch.arange(most, device=member.device).unsqueeze(-1)) & valid.unsqueeze(1)
    weights = joins / joins.sum(-1, keepdim=True).clamp(min=1)
    return weights @ points.float()
