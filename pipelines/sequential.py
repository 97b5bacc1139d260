"""An always-valid test of a mean: it may be looked at after every block, and acted on at any time.

With a normal prior on the effect (mean / standard deviation) and the right Haar prior on the scale, the likelihood
ratio against "the mean is 0" has a closed form. If that is true, it exceeds 1/a with probability a at most, whenever
one stops (Wang and Ramdas 2023, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown
variance"; Ville's inequality). It is symmetric, so with each sign it exceeds 1/(2a) with probability a at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRIORS = ((0.8, 16.0), (0.2, 0.25))  # weight and precision: effects of a quarter of a standard deviation, and of two


@dataclass(frozen=True)
class Sequence:
    """Blocks seen so far: their number, the sum of their means and of the squares of these.

    >>> s = Sequence()
    >>> for mean in (-0.02, -0.01, -0.015, -0.02, -0.012) * 4: s = s.add(mean)
    >>> s.is_below(0.05), s.is_above(0.05)
    (True, False)
    """

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, mean: float) -> Sequence:
        return Sequence(self.n + 1, self.total + mean, self.squares + mean * mean)

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    @property
    def log_ratio(self) -> float:
        """Logarithm of the evidence against a mean of 0, an average over the priors."""
        return math.log(math.fsum(weight * math.exp(min(700.0, self._log_ratio(c))) for weight, c in PRIORS))

    def _log_ratio(self, precision: float) -> float:
        if not self.squares:
            return 0.0
        explained = self.total * self.total / ((self.n + precision) * self.squares)
        return 0.5 * math.log(precision / (self.n + precision)) - self.n / 2 * math.log1p(-explained)

    def is_below(self, error: float) -> bool:
        """The mean is negative; wrong with probability `error` at most over all looks."""
        return self.total < 0 and self.log_ratio >= -math.log(2 * error)

    def is_above(self, error: float) -> bool:
        """The mean is positive; wrong with probability `error` at most over all looks."""
        return self.total > 0 and self.log_ratio >= -math.log(2 * error)
