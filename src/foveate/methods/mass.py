"""Budgets of each image's own: as many tokens as hold a share of what the method's own scores sum to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import method_class, method_names
from .base import CacheMethod, EncoderMethod
from .budgets import check_range
from .method import Method
from .tokens import EncoderTokens, ImageGroups
from .zipvl import tokens_for_mass


def by_mass(method: Method, mass: float) -> Method:
    """The method with the least budget for each image that holds `mass` of its scores; its `keep` says nothing then.

    mass: in (0, 1]; at 1.0 everything stays, whatever scores nothing included.

    Raises:
        ValueError: for another mass. UnsupportedError: for a method whose scores do not add up to one.
    """
    check_range("mass", mass, 0, 1)
    if mass == 0:
        raise ValueError("mass must be a number in (0, 1], got 0")
    plain = getattr(method, "plain", type(method))  # one that has a mass gets another
    acts = _acting(plain)
    if acts is None:
        some = ", ".join(name for name in method_names() if adds_up(method_class(name)))
        raise UnsupportedError(
            f"{method.name} has no scores of tokens that add up to a mass: give it one keep for all pictures, or use a "
            f"method that has some ({some})"
        )
    cls: Any = type(plain.__name__, (acts, plain), {"held": float(mass), "plain": plain})
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return cls(**{**options, "keep": 1.0})


def adds_up(plain: type[Method]) -> bool:
    """Whether the scores of a class of methods add up to a mass."""
    return _acting(plain) is not None


def _acting(plain: type[Method]) -> type[Method] | None:
    """What gives methods of a class a mass; None where their scores add up to none."""
    for base, acts in ((EncoderMethod, _EncoderByMass), (CacheMethod, _CacheByMass)):
        if issubclass(plain, base) and plain.mass is not base.mass:
            return acts
    return None


class _ByMass(Method):
    """What both kinds share. held: the share of the scores. plain: the class without it."""

    held: ClassVar[float]
    plain: ClassVar[type[Method]]

    @property
    def keeps_all(self) -> bool:
        return self.held == 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "mass": self.held}


class _EncoderByMass(_ByMass, EncoderMethod):
    @property
    def fills_budget(self) -> bool:
        return False

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return super().select(tokens, torch.minimum(budget, tokens_for_mass(self.mass(tokens), self.held)))  # type: ignore[safe-super]


class _CacheByMass(_ByMass, CacheMethod):
    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        return tokens_for_mass(self.mass(scores), self.held).unsqueeze(0)

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        return torch.minimum(statistics[:, 0], groups.count)
