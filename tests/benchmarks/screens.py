"""What a user sees: typical command lines and mistakes, in terminals of two sizes and in a pipe, as text files.

    python -m tests.benchmarks.screens [--out FOLDER] [--only NAME ...] [--sizes SIZE ...]

Every command runs with ``tmux`` at 80x24 and at 120x40, and with its output in a pipe. FOLDER (tests/benchmarks/screens) gets one text file a
command and size, with the whole screen and the exit code. The files are under version control: after a change of output, run this again and
read the differences. Numbers that depend on the machine, such as seconds, differ from run to run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"80x24": (80, 24), "120x40": (120, 40), "pipe": (0, 0)}
SOCKET = "ddpmctl-screens"
TINY = "--net context-unet --width 16 --timesteps 10 --scenes 20 --save-every 1 --precision fp32 --threads 1"
RED_BLUE = '--labels "red cube,blue sphere"'

# In order: a command may use what an earlier one made. Each name says what is looked at.
COMMANDS = {
    "help": "ddpmctl",
    "help-train": "ddpmctl train --help",
    "help-sample": "ddpmctl sample --help",
    "help-evaluate": "ddpmctl evaluate --help",
    "help-denoise-grid": "ddpmctl denoise-grid --help",
    "help-compare": "ddpmctl compare --help",
    "help-show": "ddpmctl show --help",
    "help-runs": "ddpmctl runs --help",
    "help-export": "ddpmctl export --help",
    "version": "ddpmctl --version",
    "train": f"ddpmctl train {TINY} --epochs 2 --name q30",
    "train-other": f"ddpmctl train {TINY} --epochs 2 --act RELU --name q31",
    "train-dry-run": "ddpmctl train --act gelu --epochs 600 --dry-run",
    "train-print-config": "ddpmctl train --preset quick --print-config",
    "train-again": f"ddpmctl train {TINY} --epochs 2 --name q30",
    "resume-finished": "ddpmctl train --resume q30",
    "resume-longer": "ddpmctl train --resume q30 --override epochs --epochs 3",
    "runs": "ddpmctl runs",
    "runs-json": "ddpmctl runs --json -",
    "show": "ddpmctl show q30",
    "show-newest": "ddpmctl show",
    "evaluate": "ddpmctl evaluate q30",
    "evaluate-cached": "ddpmctl evaluate q30",
    "evaluate-newest": "ddpmctl evaluate --repeats 2",
    "evaluate-recorded": "ddpmctl evaluate q30 --recorded",
    "evaluate-wide": "ddpmctl evaluate q30 --wide",
    "evaluate-breakdown": "ddpmctl evaluate runs/q30/checkpoints/epoch3*.pth --breakdown",
    "evaluate-glob": "ddpmctl evaluate 'runs/*/checkpoints/*.pth'",
    "evaluate-files": "ddpmctl evaluate q30 --json a.json --csv a.csv --latex a.tex --html a.html --figures figures",
    "evaluate-head": "ddpmctl evaluate q30 | head -1",
    "evaluate-sweep": "ddpmctl evaluate q31 --sweep steps=2,4",
    "evaluate-broken": "ddpmctl evaluate runs/q31 broken.pth",
    "sample": f"ddpmctl sample q30 {RED_BLUE} -n 2",
    "sample-spellings": "ddpmctl sample q30 --labels 'Red Cubes; grey-sphere, cylinder cyan,'",
    "sample-lab": "ddpmctl sample q30 --conditions test --layout lab -o images/test",
    "evaluate-images": "ddpmctl evaluate --images images/test --conditions test",
    "denoise-grid": f"ddpmctl denoise-grid q30 {RED_BLUE}",
    "denoise-grid-course": "ddpmctl denoise-grid q30 --gif d.gif",
    "compare": "ddpmctl compare q30 q31",
    "compare-recorded": "ddpmctl compare --recorded report-gelu report-relu",
    "data-verify": "ddpmctl data verify lab",
    "export": "ddpmctl export pretrained --repeats 0 --half -o model",
    "mistake-label": "ddpmctl sample q30 --labels 'red cub'",
    "mistake-two-readings": "ddpmctl sample q30 --labels 'red blue cube'",
    "mistake-no-comma": "ddpmctl sample q30 --labels 'red cube blue sphere'",
    "mistake-unquoted": "ddpmctl sample q30 -l red cube",
    "mistake-no-labels": "ddpmctl sample runs/q30",
    "mistake-count": f"ddpmctl sample q30 {RED_BLUE} -n 0",
    "mistake-option": "ddpmctl train --epoch 5",
    "mistake-command": "ddpmctl trian",
    "mistake-choice": "ddpmctl train --act gellu",
    "mistake-number": "ddpmctl train --epochs many",
    "mistake-preset": "ddpmctl train --preset fast",
    "mistake-run": "ddpmctl sample q3 -l 'red cube'",
    "mistake-no-run": "ddpmctl evaluate --runs-dir nowhere",
    "mistake-checkpoint": "ddpmctl sample broken.pth -l 'red cube'",
    "mistake-data": "ddpmctl train --data nowhere",
    "mistake-out": f"ddpmctl denoise-grid q30 {RED_BLUE} -o a.xyz",
    "mistake-out-folder": f"ddpmctl sample q30 {RED_BLUE} -o a.png",
    "mistake-html": "ddpmctl evaluate q30 --html nosuch/dir/x.html",
    "mistake-steps": f"ddpmctl sample q30 {RED_BLUE} --steps 99",
    "mistake-one-run": "ddpmctl compare q30",
    "mistake-exists": f"ddpmctl train {TINY} --epochs 9 --name q31 --exist-ok resume",
    "mistake-sweep": "ddpmctl evaluate q30 --sweep sampler=ddim",
    "runs-rm": "ddpmctl runs rm q31 --yes",
}


def prepare(folder: Path) -> None:
    """Create what the commands read: a broken checkpoint, two report-style folders, and a lab folder with a problem."""
    (folder / "broken.pth").write_bytes(b"not a checkpoint")
    for name, shift in {"report-gelu": 0.0, "report-relu": 0.02}.items():
        (folder / name).mkdir()
        for epoch in range(5, 305, 5):
            test, new = (min(1.0, 0.3 + epoch / 500 + shift + 0.03 * ((epoch * k) % 7 - 3) / 7) for k in (3, 5))
            (folder / name / f"epoch{epoch}_{test}_{new}.pth").write_bytes(b"")
    subprocess.run([sys.executable, "-m", "ddpmctl", "data", "render", "lab", "--scenes", "2"], cwd=folder, check=False, capture_output=True)


def tmux(*arguments: str, check: bool = True) -> str:
    """Run a command of tmux in a server of its own."""
    return subprocess.run(["tmux", "-L", SOCKET, "-f", "/dev/null", *arguments], check=check, capture_output=True, text=True).stdout


def in_terminal(command: str, folder: Path, width: int, height: int) -> str:
    """Return the whole screen after a command in a terminal of this size, with the exit code in the last line."""
    script = f'{command}\necho "[exit code $?]"; tmux -L {SOCKET} wait-for -S done; sleep 600'
    variables = [part for name in ("PATH", "PYTHONPATH", "DDPMCTL_CACHE_DIR") if name in os.environ for part in ("-e", f"{name}={os.environ[name]}")]
    tmux("new-session", "-d", "-s", "s", "-x", str(width), "-y", str(height), "-c", str(folder), *variables, f"exec bash -c {shlex.quote(script)}")
    try:
        tmux("wait-for", "done")
        return tmux("capture-pane", "-p", "-S", "-", "-t", "s")
    finally:
        tmux("kill-session", "-t", "s")


def in_pipe(command: str, folder: Path) -> str:
    """Return stdout and stderr of a command whose output is no terminal, one after the other."""
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    return f"{done.stdout}--- stderr ---\n{done.stderr}[exit code {done.returncode}]\n"


def main() -> None:
    """Run all commands in all sizes, each size in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "screens")
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), help="names of commands; those that they need must be among them")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=tuple(SIZES))
    given = parser.parse_args()
    if shutil.which("tmux") is None:
        parser.error("tmux is not installed")
    for size in given.sizes:
        width, height = SIZES[size]
        (given.out / size).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="screens-") as name:
            folder = Path(name)
            prepare(folder)
            for title in given.only:
                command = COMMANDS[title]
                screen = in_terminal(command, folder, width, height) if width else in_pipe(command, folder)
                text = f"$ {command}\n{screen.rstrip()}\n".replace(str(folder), "/tmp/work")
                (given.out / size / f"{title}.txt").write_text(re.sub(r"[ \t]+\n", "\n", text) if width else text, encoding="utf-8")
                print(size, title, flush=True)


if __name__ == "__main__":
    main()
