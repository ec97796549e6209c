"""The data of the benchmark, and the end of a generator."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ddpmctl.data.dataset import Dataset, load_dataset


def finish(spec: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end and return its value."""
    while True:
        try:
            next(spec)
        except StopIteration as end:
            return end.value


def benchmark_data() -> Dataset:
    data: Dataset = finish(load_dataset(None))
    return data
