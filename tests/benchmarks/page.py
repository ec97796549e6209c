"""How long an exported page takes in Chromium to load and to make an image, beside the same work of the command's process.

    python -m tests.benchmarks.page [CHECKPOINT] [--rounds 5]

The page lies in a file, and there is no network. The sampler is guided at every step, so that 16 steps are 32 calls of the network.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.device import ComputeDevice
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.interface.choices import checkpoint_path
from ddpmctl.sampling.requests import requests_for

STEPS = 16
DONE = "#status:has-text('Done')"


def in_torch(checkpoint: Path, threads: int) -> float:
    """Return the seconds of an image of 16 guided steps."""
    torch.set_num_threads(threads)
    settings = {"particles": 1, "steps": STEPS, "guidance": 1.5, "guidance_from": 0.0, "guidance_to": 1.0}
    loaded = load_checkpoint(checkpoint)
    pipeline = pipeline_for(loaded, settings, ComputeDevice(torch.device("cpu"), "fp32"))
    requests = requests_for("sample", [loaded.task.classes[:1]], seed=0)
    list(pipeline.frames(requests))
    start = time.perf_counter()
    list(pipeline.frames(requests))
    return time.perf_counter() - start


def in_the_page(browser: Any, file: Path) -> tuple[float, float]:
    """Return the seconds from opening the page to its first step, and those of an image of 16 guided steps."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    start = time.perf_counter()
    page.goto(file.as_uri())
    page.wait_for_selector("#status:not(:has-text('Loading'))", state="attached")
    loaded = time.perf_counter() - start
    page.wait_for_selector(DONE, timeout=300_000)
    page.locator("#steps").select_option(str(STEPS))
    for name, value in (("guidance", "1.5"), ("guidance-from", "0"), ("guidance-to", "1")):
        page.locator(f"#{name}").evaluate("(field, value) => { field.value = value }", value)
    page.get_by_role("button", name="Denoise").click()
    page.wait_for_selector(DONE, timeout=300_000)
    seconds = float(page.locator("#status").inner_text().split()[2])
    context.close()
    return loaded, seconds


def main() -> None:
    """Export a page and print medians."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path("pretrained"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    checkpoint, _ = checkpoint_path(given.checkpoint, Path("runs"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "model.html"
        subprocess.run([sys.executable, "-m", "ddpmctl", "export", checkpoint, "--to", "page", "--out", file, "--repeats", "0"], check=True)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        found = [(*in_the_page(browser, file), in_torch(checkpoint, 1), in_torch(checkpoint, 2)) for _ in range(given.rounds)]
        loaded, page, one, two = map(statistics.median, zip(*found, strict=True))
        print(f"{file.stat().st_size / 1e6:.1f} MB, {browser.version}; medians of {given.rounds} rounds, largest in brackets")
        for name, value, worst in zip(("page loads", f"{STEPS} guided steps in the page"), (loaded, page), map(max, zip(*found, strict=True)), strict=False):
            print(f"| {name} | {value:.2f} s ({worst:.2f}) |")
        print(f"| the same with torch, one thread | {one:.2f} s | page / torch {page / one:.2f} |")
        print(f"| the same with torch, two threads | {two:.2f} s | page / torch {page / two:.2f} |")


if __name__ == "__main__":
    main()
