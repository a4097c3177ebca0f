"""Which budgets may be promised, from how often each of them lost something on n questions. Numbers alone, no model.

risk: alpha, the mean loss that is allowed, such as 0.05. error: delta, the probability with which a promise may be
wrong, such as 0.1. Losses lie in [0, 1]. Sources: Learn then Test (arXiv 2110.01052), conformal risk control (arXiv
2208.02814), Hoeffding-Bentkus (Bates et al., arXiv 2101.02703).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from foveate.asking.mistake import Mistake

Kind = Literal["binomial", "hoeffding-bentkus", "conformal"]


def binomial_p(errors: Any, n: int, risk: float) -> Any:
    """P(Bin(n, risk) <= errors), exactly: how likely so few errors are where the risk is as large as that.

    errors: a number or an array.
    """
    return _special().bdtr(np.asarray(errors, np.float64), n, risk)


def hoeffding_bentkus_p(total: Any, n: int, risk: float) -> Any:
    """The same as an upper bound for losses anywhere in [0, 1]. total: their sum, a number or an array."""
    total = np.asarray(total, np.float64)
    mean = np.minimum(total / n, risk)
    kept = 1 - mean
    gap = _special().xlogy(mean, mean / risk) + _special().xlogy(kept, kept / (1 - risk))
    # Rounded, so that a sum of tenths that comes to 3.0000000000000004 is no 4.
    bentkus = math.e * binomial_p(np.minimum(np.ceil(np.round(total, 9)), n), n, risk)
    return np.minimum(1.0, np.minimum(np.exp(-n * gap), bentkus))


def least_sample(risk: float, error: float | None) -> int:
    """The fewest questions with which anything can be promised, if none of them loses. error: None for conformal."""
    if error is None:
        return math.ceil(1 / risk - 1 - 1e-9)
    return math.ceil(math.log(error) / math.log1p(-risk) - 1e-9)


@dataclass(frozen=True)
class Rule:
    """When a budget passes.

    kind: "binomial" for losses of 0 and 1, "hoeffding-bentkus" for others: then P(risk of what passes <= `risk`) >=
    1 - `error`. "conformal" promises a mean over calibrations, and knows no error.
    """

    kind: Kind
    risk: float
    error: float | None

    def p(self, total: Any, n: int) -> Any:
        """What is compared with `error`; for conformal the bound itself, compared with `risk`. total: sum of losses."""
        if self.kind == "conformal":
            return (np.asarray(total, np.float64) + 1) / (n + 1)
        return (binomial_p if self.kind == "binomial" else hoeffding_bentkus_p)(total, n, self.risk)

    def passes(self, total: Any, n: int) -> Any:
        """Whether n losses that sum to `total` are few enough. Once False, more losses leave it False."""
        return self.p(total, n) <= (self.risk if self.error is None else self.error) + 1e-12

    def most(self, n: int) -> int:
        """The most errors that pass, -1 where none do."""
        passing = self.passes(np.arange(n + 1), n)
        return int(passing.sum()) - 1

    @property
    def needs(self) -> int:
        """The fewest questions."""
        return least_sample(self.risk, self.error)


def evidence(losses: Any, risk: float) -> np.ndarray:
    """How much speaks against a mean loss of at most `risk`, after each loss of a stream: 1 says nothing.

    A bettor gains where losses are larger: for a stake s the wealth is multiplied by 1 + s (loss - risk), which is at
    most 1 in the mean while the promise holds. One begins in front of every loss, the t-th with the part 1 / (t (t +
    1)) of the money, so that a change late in the stream is seen, too; the rest waits. By Ville's inequality the
    wealth ever exceeds 1 / e with probability e at most, however long and often one looks, if each loss has a mean of
    at most `risk` given those before it.

    losses: (..., t) in [0, 1], in the order in which they came. Returns the wealth, of the same shape.
    """
    losses = np.asarray(losses, np.float64)
    stakes = np.array([0.05, 0.1, 0.25, 0.5]) / risk  # best where the risk is about 2, 3, 6 and 10 times 0.05
    wealth, found = np.zeros((*losses.shape[:-1], len(stakes))), np.empty(losses.shape)
    for t in range(losses.shape[-1]):
        wealth = (wealth + 1 / ((t + 1) * (t + 2))) * (1 + stakes * (losses[..., t, None] - risk))
        found[..., t] = wealth.mean(-1) + 1 / (t + 2)
    return found


def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise Mistake('foveate calibrate needs the package scipy: pip install "foveate[calibrate]"') from None
    return special
