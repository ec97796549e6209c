"""Entries of the cache: each must give what was cached, or be made anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from ddpmctl.data.cache import cached_images
from ddpmctl.evaluation.result_cache import load_results, save_results
from ddpmctl.evaluation.results import FileResults
from ddpmctl.progress import Notice, Progress
from tests.data.conftest import finish

from .mutations import MUTATIONS, Fuzz, mutated


def cache_fuzz(folder: Path) -> Fuzz:
    """Return the test of both caches, and what to draw for it: mutations anywhere, or in the headers and the directory, where most of them matter."""
    os.environ["DDPMCTL_CACHE_DIR"] = str(folder)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    conditions = (("red cube",), ("blue sphere", "red cube"))
    results = FileResults(conditions, rng.random((2, 3, 24), dtype=np.float32), images[:, None])

    def build(start: int) -> Iterator[Progress | np.ndarray]:
        yield Progress("decoding", 0, 1)
        yield images[start:]

    for _ in cached_images("k", 2, build):
        pass
    save_results("k", results)
    sound = {name: (folder / name).read_bytes() for name in ("k.npy", "k.json", "results/k.npz")}

    def test(name: str, mutations: list[tuple[float, str, bytes]], part: str) -> None:
        for each, content in sound.items():
            (folder / each).write_bytes(content)
        whole = sound[name]
        first, last = {"all": (0, len(whole)), "start": (0, 400), "second array": (len(whole) // 70, len(whole) // 70 + 400), "end": (-300, len(whole))}[part]
        first, last = first % len(whole), min(last, len(whole))
        (folder / name).write_bytes(whole[:first] + mutated(whole[first:last], mutations) + whole[last:])
        kept = load_results("k", conditions)
        assert kept is None or (np.array_equal(kept.images, results.images) and np.array_equal(kept.probabilities, results.probabilities))
        events, found = finish(cached_images("k", 2, build))
        assert np.array_equal(found.images, images)
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert all("is rebuilt" in text and text.isprintable() for text in notices)
        assert bool(notices) == any(isinstance(event, Progress) for event in events)

    return test, (st.sampled_from(sorted(sound)), MUTATIONS, st.sampled_from(("all", "start", "second array", "end")))
