"""How often differences of recorded curves are called: where there is none, and where there is one of one standard deviation of an arm's scores.

    python -m tests.benchmarks.curves [--pairs 2000] [--epochs 20 30 60 120 300]

The curves of the two arms are independent, each with neighbouring epochs alike: AR(1) of a given correlation, or hits among 72 labels around an
accuracy whose logit wanders in this way (standard deviation 0.3, about 7 points).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.statistics.blocks import BlockEstimate, block_change, block_mean
from tests.simulated_curves import accuracies, called, curves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.simulated_curves import Curves

WORLDS: dict[str, tuple[Curves, float]] = {
    "independent": (curves, 0.0),
    "AR(1) 0.5": (curves, 0.5),
    "AR(1) 0.8": (curves, 0.8),
    "hits, 0.5": (accuracies, 0.5),
    "hits, 0.8": (accuracies, 0.8),
}


def rates(make: Curves, correlation: float, count: int, epochs: int) -> dict[str, float]:
    """Return the share of pairs that are called."""
    rng = np.random.default_rng(epochs)
    first, second = make(rng, count, epochs, correlation), make(rng, count, epochs, correlation)
    gaps, deviation = first - second, float(first.std())
    late = np.arange(epochs) >= epochs // 2
    asked: dict[str, tuple[Callable[[NDArray[np.float64]], BlockEstimate], NDArray[np.float64]]] = {
        "no difference, called different": (block_mean, gaps),
        "no difference, called changing": (block_change, gaps),
        "a difference of 1 sd, called different": (block_mean, gaps + deviation),
        "a difference of 1 sd from the middle on, called changing": (block_change, gaps + deviation * late),
    }
    return {name: called(estimate, series) for name, (estimate, series) in asked.items()}


def main() -> None:
    """Print a table for each question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 30, 60, 120, 300])
    given = parser.parse_args()
    found = {name: [rates(*world, given.pairs, epochs) for epochs in given.epochs] for name, world in WORLDS.items()}
    for question in next(iter(found.values()))[0]:
        print(f"\n| {question} | {' | '.join(f'{epochs} epochs' for epochs in given.epochs)} |\n| --- |{' --- |' * len(given.epochs)}")
        for name, row in found.items():
            print(f"| {name} | {' | '.join(f'{100 * shares[question]:.1f} %' for shares in row)} |")


if __name__ == "__main__":
    main()
