"""Bayesian optimisation on the unit square: a Gaussian process, and the point it expects the most improvement of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Unit = tuple[float, ...]
Array = NDArray[np.float64]
LENGTHS = (0.1, 0.2, 0.4, 0.8)  # of the kernel; the one under which the scores are likeliest
NOISE = 0.05  # variance of a score beside that of all: neighbouring schedules differ by chance, too
CANDIDATES = 512


def matern(one: Array, other: Array, length: float) -> Array:
    """Matern kernel of smoothness 5/2. one: (n, d); other: (m, d); returns (n, m)."""
    distance = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1)) * math.sqrt(5) / length
    result: Array = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return result


def posterior(points: Array, scores: Array, at: Array, length: float) -> tuple[Array, Array, float]:
    """Mean and standard deviation of a Gaussian process, and the log-likelihood of what it knows.

    points: (n, d). scores: (n,), of mean 0 and variance 1. at: (m, d). Returns (m,), (m,) and a number.
    """
    lower = np.linalg.cholesky(matern(points, points, length) + NOISE * np.eye(len(points)))
    weights = np.linalg.solve(lower.T, np.linalg.solve(lower, scores))
    cross = matern(at, points, length)
    spread = 1 - (np.linalg.solve(lower, cross.T) ** 2).sum(0)
    likelihood = -0.5 * float(scores @ weights) - float(np.log(np.diag(lower)).sum())
    return cross @ weights, np.sqrt(np.maximum(spread, 1e-12)), likelihood


def improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Expected improvement on `best` of normal values: (m,) of means and standard deviations (m,)."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in z]))
    result: Array = (mean - best) * below + deviation * density
    return result


def suggest(points: Sequence[Unit], scores: Sequence[float], blindly: bool, *, seed: int, dimensions: int = 2) -> Unit:
    """Where in the unit square to ask next, to find the highest score.

    points, scores: what is known. blindly: at random, whatever is known. seed: of the candidates.
    """
    candidates = np.random.default_rng(seed).random((CANDIDATES, dimensions))
    if blindly or not points:
        return tuple(candidates[0].tolist())
    known, values = np.array(points), np.array(scores)
    values = (values - values.mean()) / (values.std() or 1.0)
    fits = [posterior(known, values, candidates, length) for length in LENGTHS]
    mean, deviation, _ = max(fits, key=lambda fit: fit[2])
    best = int(np.argmax(improvement(mean, deviation, values.max())))
    return tuple(candidates[best].tolist())
