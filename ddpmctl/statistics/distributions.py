"""The two distributions that the intervals and tests need."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

NORMAL = NormalDist()
_TINY = 1e-300


def t_cdf(x: float, df: float) -> float:
    """Return P(T <= x) of Student's t with ``df`` degrees of freedom."""
    tail = incomplete_beta(df / 2, 0.5, df / (df + x * x)) / 2
    return 1 - tail if x > 0 else tail


@functools.lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """Return x with P(T <= x) = p, 0 < p < 1, to about 1e-10; infinite ``df`` is the normal distribution."""
    if math.isinf(df):
        return NORMAL.inv_cdf(p)
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    x = (low + high) / 2
    density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    while high - low > 1e-12 * high:  # Newton's steps, halving where one leaves what is known to hold the answer
        beyond = t_cdf(x, df) - p
        low, high = (low, x) if beyond >= 0 else (x, high)
        step = beyond / (density * (1 + x * x / df) ** (-(df + 1) / 2))
        if abs(step) < 1e-13 * x:
            break
        x = x - step if low < x - step < high else (low + high) / 2
    return x


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    value, c, d = 1.0, 1.0, 0.0  # modified Lentz: value = the product of c d, ratios of successive numerators and denominators
    for index in range(1, 500):
        m = index // 2
        term = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) if index % 2 == 0 else -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _away_from_zero(1 + term * x * d)
        c = _away_from_zero(1 + term * x / c)
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front / (a * value)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
