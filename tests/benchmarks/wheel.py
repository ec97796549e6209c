"""The package as it is installed from a wheel, not from the source tree: its size, and how long its first commands take.

    python -m tests.benchmarks.wheel [--out FOLDER]

Builds the wheel, installs it with the extra "export" into an empty virtual environment, and runs commands there, in an empty folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    ("--version",),
    ("sample", "--labels", "red cube", "-n", "4", "--out", "images"),
    ("export", "--repeats", "0", "--out", "model"),
    ("export", "--to", "page", "--repeats", "0", "--out", "model.html"),
    ("sample", "model", "--labels", "red cube", "--out", "again"),
)


def timed(command: list[object], **options: object) -> float:
    """Run a command and return its seconds; an error ends the benchmark with what it said."""
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"| {' '.join(map(str, command[-8:]))} | {seconds:.1f} s |", flush=True)
    return seconds


def main() -> None:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="where wheel, environment and results are kept (a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.out or Path(temporary)).resolve()
        bin_folder = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
        timed([sys.executable, "-m", "venv", place / "venv"])
        timed([bin_folder / "python", "-m", "pip", "install", "-q", "build"])
        timed([bin_folder / "python", "-m", "build", "-q", "--outdir", place / "dist", ROOT])
        (wheel,) = (place / "dist").glob("*.whl")
        print(f"wheel: {wheel.stat().st_size / 1e6:.1f} MB")
        timed([bin_folder / "python", "-m", "pip", "install", "-q", f"{wheel}[export]"])
        work, environment = place / "work", {**os.environ, "DDPMCTL_CACHE_DIR": str(place / "cache")}
        work.mkdir()
        environment.pop("PYTHONPATH", None)
        for command in COMMANDS:
            timed([bin_folder / "ddpmctl", *command], cwd=work, env=environment)
        print(f"page: {(work / 'model.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
