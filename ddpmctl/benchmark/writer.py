"""Write the embedded benchmark as a folder in the lab's layout, with PNG files."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ddpmctl.benchmark import embedded
from ddpmctl.benchmark.embedded import scene_count
from ddpmctl.errors import UsageError
from ddpmctl.files import cannot_write, write_text
from ddpmctl.iclevr import INDEX
from ddpmctl.progress import Progress

IMAGES = 256  # images between two progress events
SIDES = (16, 4096)  # allowed image sizes in pixels; in smaller images, objects cannot be recognised


def write_benchmark(folder: Path, *, scenes: int, width: int, height: int, seed: int = 0) -> Generator[Progress, None, None]:
    """Write ``scenes`` scenes, three PNG images each, to ``folder``.

    ``train.json`` is written last, so that an incomplete folder is not valid.

    Raises:
        UsageError: a setting is out of range, ``folder`` is not empty, or it cannot be written.
    """
    scenes = scene_count(scenes)
    for name, value in (("width", width), ("height", height)):
        if not SIDES[0] <= value <= SIDES[1]:
            raise UsageError(f"--{name} {value}: must be between {SIDES[0]} and {SIDES[1]} pixels")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder}: is not an empty folder; name a new one (nothing was written)")
        images = folder / "iclevr"
        images.mkdir(parents=True)
        labels = embedded.train_labels(scenes, seed=seed)
        yield from _write_images(images, list(labels), embedded.render_benchmark(scenes, seed=seed, width=width, height=height))
        for name, sets in embedded.conditions().items():
            write_text(folder / f"{name}.json", json.dumps(sets))
        write_text(folder / "objects.json", json.dumps(INDEX))
        write_text(folder / "train.json", json.dumps(labels))
    except OSError as error:
        raise cannot_write(folder, error) from error


def _write_images(folder: Path, names: list[str], chunks: Iterator[np.ndarray]) -> Generator[Progress, None, None]:
    done = 0
    yield Progress("writing", 0, len(names))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for chunk in chunks:
            for start in range(0, len(chunk), IMAGES):
                part = chunk[start : start + IMAGES]
                paths = [folder / name for name in names[done : done + len(part)]]
                # Level 3 takes a third of the default's time, and 5 % more space.
                list(pool.map(lambda path, pixels: Image.fromarray(pixels).save(path, format="PNG", compress_level=3), paths, part))
                done += len(part)
                yield Progress("writing", done, len(names))
