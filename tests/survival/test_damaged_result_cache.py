"""Damaged cached results are not used."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from ddpmctl.evaluation.result_cache import load_results, save_results
from ddpmctl.evaluation.results import FileResults


@pytest.mark.filterwarnings("default")  # a parser may also warn of what it reads
def test_every_flipped_bit_in_cached_results_is_detected_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    conditions = (("red cube",), ("blue sphere", "red cube"))
    rng = np.random.default_rng(0)
    results = FileResults(conditions, rng.random((2, 3, 24), dtype=np.float32), rng.integers(0, 255, (2, 1, 3, 64, 64), dtype=np.uint8))
    save_results("k", results)
    (file,) = (tmp_path / "results").iterdir()
    sound, draw, detected = file.read_bytes(), random.Random(1), 0
    headers = [8 * match.start() + bit for match in re.finditer(b"\x93NUMPY", sound) for bit in range(8 * 90)]  # the rest of it is spaces
    edges = [8 * at + draw.randrange(8) for at in (*range(60), *range(len(sound) - 300, len(sound)))]  # of the archive: a header, and the directory
    for place in headers + edges + [draw.randrange(8 * len(sound)) for _ in range(200)]:
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        found = load_results("k", conditions)
        if found is None:
            detected += 1
        else:
            np.testing.assert_array_equal(found.probabilities, results.probabilities, str(place))
            np.testing.assert_array_equal(found.images, results.images, str(place))
    assert detected > 1500
    assert capfd.readouterr().err == ""
