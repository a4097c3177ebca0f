"""What a user may say of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from .guarantees import Kind, Rule
from .losses import BINARY

POLICIES = ("fixed", "mass", "cascade")
GRIDS = {
    "fixed": (1.0, 0.75, 0.5, 0.25, 0.1),
    "mass": (1.0, 0.99, 0.97, 0.9),
    "cascade": (1.0, 0.25),
}


@dataclass(frozen=True)
class Options:
    """What decides the certificate, as `foveate calibrate` takes it."""

    model: str
    methods: str
    policy: str
    data: str | None
    agree: float
    confidence: float
    guarantee: str
    loss: str
    grid: tuple[float, ...] | None
    groups: bool
    count: int
    batch_size: int
    max_new_tokens: int
    seed: int
    device: str
    dtype: str
    attn: str | None
    guide: str | None

    @property
    def steps(self) -> tuple[float, ...]:
        """The grid without 1.0, the largest first."""
        return tuple(sorted(set(self.grid or GRIDS[self.policy]) - {1.0}, reverse=True))

    def rule(self, shares: int) -> Rule:
        """What a budget must pass. shares: how many promises share the error."""
        risk = round(1 - self.agree, 12)
        if self.guarantee == "average":
            return Rule("conformal", risk, None)
        kind: Kind = "binomial" if self.loss in BINARY else "hoeffding-bentkus"
        return Rule(kind, risk, round(1 - self.confidence, 12) / shares)
