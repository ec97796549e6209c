"""Nothing outside of the folders that a command is for is opened for writing, made, renamed or removed.

Permitted are, for every command, the cache (decoded images, results, tracebacks) and ``/dev/null``; for training the run's folder and, while it is
made, the folder of runs; and the outputs that a command line names. Three libraries need more: matplotlib keeps its list of fonts and its lock in
its own folder, torch makes an empty folder for ``--compile`` when an optimizer is created (/tmp/torchinductor_USER), and Python looks for a folder of
temporary files by writing to it. Pages draw their figures in such a folder and remove it. Two programs that only read are started: ldconfig
by torch, and fc-list by matplotlib. The data, other runs, checkpoints and the home folder are never written to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="folders of descriptors are read from /proc")]
ROOT = Path(__file__).parents[2]
READING = ("/dev/null", "ldconfig", "fc-list")


def files_of(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_commands_write_only_to_the_run_the_cache_and_their_outputs(run: Path, tmp_path: Path) -> None:
    runs, other, data, out, cache = (tmp_path / name for name in ("runs", "other", "data", "out", "cache"))
    work = tmp_path / "work"
    work.mkdir()
    out.mkdir()
    shutil.copytree(run, other)  # a run of somebody else
    new, copied, checkpoint = runs / "new", runs / "copied", next((other / "checkpoints").glob("epoch2_*"))
    images = out / "images"
    written = [f"--{kind}={out}/table.{kind}" for kind in ("json", "csv", "latex", "html")] + [f"--figures={out}/figures", f"--grid={out}/grids"]
    commands: list[tuple[list[object], list[Path]]] = [
        (["data", "render", data, "--scenes", 4], [data]),
        (["data", "verify", data], []),
        (["train", *TINY, "--epochs", 1, "--data", data, "--runs-dir", runs, "--name", "new"], [runs]),
        (["train", "--resume", new, "--epochs", 2, "--override", "epochs"], [new]),
        (["train", *TINY, "--epochs", 1, "--data", data, "--runs-dir", runs, "--name", "copied", "--seed", 1], [runs]),
        (["train", *TINY, "--epochs", 1, "--data", data, "--runs-dir", runs, "--name", "never", "--dry-run"], []),
        (["sample", checkpoint, "--data", data, "--conditions", "test", "--layout", "lab", "-o", images], [images]),
        (["evaluate", other, new, "--data", data, "--conditions", "test", *written, "--no-confirm", "--breakdown"], [out]),
        (["evaluate", checkpoint, "--data", data, "--conditions", "test", "--repeats", 2], []),
        (["evaluate", "--images", images, "--conditions", "test", "--data", data, "--json", out / "images.json"], [out]),
        (["compare", new, copied, "--data", data, "--conditions", "test", "-o", out / "compare.png", "--html", out / "compare.html"], [out]),
        (["denoise-grid", other, "-l", "red cube", "-o", out / "denoise.png", "--gif", out / "denoise.gif"], [out]),
        (["show", other], [work]),  # draws show-other.png where it is called
        (["show", new, "-o", out / "show.png", "--html", out / "show.html"], [out]),
        (["runs", "--runs-dir", runs], []),
        (["runs", "rm", copied, "--yes", "--runs-dir", runs], [runs]),
        (["evaluator", "check", "--scenes", 2], []),
        (["sample", data / "test.json", "-l", "red cube", "-o", out / "never"], [out]),
    ]
    home, fonts, compiled, temporary = (tmp_path / name for name in ("home", "fonts", "compiled", "temporary"))
    home.mkdir()
    temporary.mkdir()
    folders = {"DDPMCTL_CACHE_DIR": cache, "HOME": home, "MPLCONFIGDIR": fonts, "TORCHINDUCTOR_CACHE_DIR": compiled, "TMPDIR": temporary}
    environment = {**os.environ, **{name: str(folder) for name, folder in folders.items()}, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    arguments = [tmp_path / "record.json", json.dumps([[str(part) for part in arguments] for arguments, _ in commands])]
    before = files_of(other)
    command = [sys.executable, "-m", "tests.survival.audited", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert [one["code"] for one in record] == [0] * (len(commands) - 1) + [3], done.stderr[-3000:]
    for (line, permitted), one in zip(commands, record, strict=True):
        inside = [os.path.realpath(folder) for folder in (*permitted, cache, fonts, compiled, temporary)]
        seen = [(event, path) for event, path in one["seen"] if path not in READING]
        outside = [(event, path) for event, path in seen if not any(f"{path}/".startswith(f"{folder}/") for folder in inside)]
        assert outside == [], f"{line[0]}: {outside}"
    assert files_of(other) == before
    assert files_of(home) == {}
    assert files_of(compiled) == files_of(temporary) == {}
    seen = {event for one in record for event, _ in one["seen"]}
    assert {"open", "os.rename", "os.remove", "os.mkdir"} <= seen  # the hook was there
