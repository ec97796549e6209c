"""The cache of decoded images, and atomic writes."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data.cache import cache_folder, cached_images
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.images import decode_image
from ddpmctl.errors import UsageError
from ddpmctl.files import atomic_write, sha256_file
from ddpmctl.progress import Notice, Progress

from ..conftest import ddpmctl
from .conftest import TRAIN, entry, finish, flip, load, make_image, posix

# The cache


def test_a_changed_folder_is_decoded_again(folder: Path, cache: Path) -> None:
    load(folder)
    kept = entry(cache)
    inode = kept.stat().st_ino
    load(folder)
    assert entry(cache).stat().st_ino == inode
    changed = make_image(9)
    changed.save(folder / "iclevr" / "CLEVR_train_000001_0.png")
    data = load(folder)
    np.testing.assert_array_equal(data.images[2].transpose(1, 2, 0), np.asarray(changed.resize((64, 64), Image.Resampling.BILINEAR)))
    assert len(list(cache.glob("*.npy"))) == 2


DAMAGE = {
    "a flipped byte": lambda path: flip(path, -100),
    "a flipped header": lambda path: flip(path, 20),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 7),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "no sum": lambda path: path.with_suffix(".json").unlink(),
    "a broken sum": lambda path: path.with_suffix(".json").write_text("{"),
    "another sum": lambda path: path.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(folder: Path, cache: Path, damage: str) -> None:
    before = load(folder)
    DAMAGE[damage](entry(cache))
    events, after = finish(load_dataset(folder))
    assert Progress("decoding", 3, 3) in events
    np.testing.assert_array_equal(after.images, before.images)
    assert finish(load_dataset(folder))[0] == []
    assert {path.suffix for path in cache.glob("[!.]*")} == {".npy", ".json"}


@pytest.mark.filterwarnings("default")  # a parser may also warn of what it reads
def test_every_flipped_bit_of_a_header_is_damage_and_nothing_else(folder: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = load(folder)
    kept = entry(cache)
    sound = kept.read_bytes()

    def decoded_again(start: int) -> Iterator[Progress | np.ndarray]:
        yield Progress("decoding", 0, 1)
        yield before.images[start:]

    for place in range(8 * 128):  # the header's bits
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        kept.write_bytes(damaged)
        notice, progress = itertools.islice(cached_images(kept.stem, 3, decoded_again), 2)
        assert isinstance(notice, Notice), place
        assert f"{kept}: damaged; it is rebuilt" in notice.text
        assert progress == Progress("decoding", 0, 1)
    assert capfd.readouterr().err == ""
    finish(load_dataset(folder))
    assert finish(load_dataset(folder))[0] == []


def test_without_a_cache_the_data_load_and_a_notice_says_so(folder: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    events, data = finish(load_dataset(folder))
    assert len(data.images) == 3
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert str(cache) in notice.text
    assert "DDPMCTL_CACHE_DIR" in notice.text


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DDPMCTL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ddpmctl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    default = tmp_path / "home" / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ddpmctl"
    assert cache_folder() == default or sys.platform == "win32"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == default or sys.platform == "win32"


@posix
def test_without_a_home_folder_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("DDPMCTL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UsageError, match="set DDPMCTL_CACHE_DIR"):
        cache_folder()


def test_two_processes_may_build_one_entry_at_once(folder: Path, cache: Path) -> None:
    code = """
import sys
from pathlib import Path
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.images import decode_image
sys.stdin.read()
events = load_dataset(Path(sys.argv[1]))
try:
    while True:
        print(next(events))
except StopIteration as stop:
    print("sum", int(stop.value.images.sum()))
"""
    starts = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for start in starts:  # both have imported the package, or soon will: release both at once
        assert start.stdin is not None
        start.stdin.close()
        start.stdin = None
    outputs = [start.communicate(timeout=60)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    events, data = finish(load_dataset(folder))
    assert events == []
    assert all(f"sum {int(data.images.sum())}" in output and "Notice" not in output for output in outputs)


KILLED = """
import os, signal, sys
from pathlib import Path
import ddpmctl.data.cache as cache
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.images import decode_image
cache.BLOCK_BYTES = cache.DECODED_TOGETHER = 1  # each image is a block
kept = cache.decode_image
def decode(path, **settings):
    if path.name == sys.argv[2]:
        while sum(1 for _ in open(next(cache.cache_folder().glob(".*.json.partial.tmp")))) < 2:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return kept(path, **settings)
cache.decode_image = decode
for _ in load_dataset(Path(sys.argv[1])):
    pass
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("damage", ["none", "journal", "images"])
def test_decoding_goes_on_after_a_kill(damage: str, folder: Path, cache: Path) -> None:
    last = list(TRAIN)[-1]
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), last], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (journal,), (partial,) = cache.glob(".*.json.partial.tmp"), cache.glob(".*.npy.partial.tmp")
    assert len(journal.read_text().splitlines()) == 2
    if damage == "journal":
        journal.write_bytes(b"{" + journal.read_bytes())
    if damage == "images":
        content = bytearray(partial.read_bytes())
        content[128 + 3 * 64 * 64 + 5] ^= 1  # in the second image
        partial.write_bytes(content)
    events, data = finish(load_dataset(folder))
    first = next(event for event in events if isinstance(event, Progress))
    assert (first.done, first.total) == ({"none": 2, "journal": 0, "images": 1}[damage], len(TRAIN))
    np.testing.assert_array_equal(data.images, np.stack([decode_image(folder / "iclevr" / name) for name in TRAIN]))
    assert finish(load_dataset(folder))[0] == [], "the entry is complete"
    assert not list(cache.glob(".*.partial.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_images_are_mapped_and_read_only(folder: Path, cache: Path) -> None:
    finish(load_dataset(folder))
    images = finish(load_dataset(folder))[1].images
    assert images.base is not None, "a view of the mapped file"
    with open("/proc/self/smaps", encoding="utf-8") as file:
        (flags,) = [part.rsplit("VmFlags:", 1)[1] for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.M) if str(cache) in part]
    assert "rr" in flags.split(), "read in random order"
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


# Files


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert list(tmp_path.glob("*.pth")) == []
    with pytest.raises(IsADirectoryError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half" + tmp_path.read_bytes())
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
    assert sha256_file(path) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_atomic_write_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=str(tmp_path / "none")), atomic_write(tmp_path / "none" / "x"):
        pass
    with pytest.raises(UsageError, match="cannot write here"), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("the folder was moved")
    with pytest.raises(UsageError, match="no space left"), atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_large_entry_is_read_quickly(cache: Path) -> None:
    from ddpmctl.data import cache as module

    images = np.random.default_rng(0).integers(0, 256, (6000, 3, 64, 64), dtype=np.uint8)

    def build(start: int) -> Iterator[Progress | np.ndarray]:
        yield Progress("rendering", 0, 1)
        yield images[start:]

    finish(module.cached_images("k", 6000, build))
    began = time.perf_counter()
    events, kept = finish(module.cached_images("k", 6000, build))
    assert time.perf_counter() - began < 2  # 0.1 s on an idle machine
    assert events == []
    np.testing.assert_array_equal(kept.images, images)


def test_the_cache_is_listed_and_cleared_and_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    (tmp_path / "results").mkdir()
    old, new, other = tmp_path / "results" / f"{'a' * 64}.npz", tmp_path / "results" / f"{'b' * 64}.npz", tmp_path / "train.json"
    for file in (old, new, other):
        file.write_bytes(b"0" * 1500)
    month_ago = time.time() - 31 * 86400
    os.utime(old, (month_ago, month_ago))
    os.utime(other, (month_ago, month_ago))  # a file of the user
    listed = ddpmctl("data", "cache", "list").stdout
    assert "2 files, 3 kB" in listed
    assert "31.0" in listed
    for _ in load_dataset(None, scenes=1):
        pass
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert "removed 0 files" in ddpmctl("data", "cache", "clear", "--older-than", 1).stdout
    assert "removed 3 files" in ddpmctl("data", "cache", "clear").stdout
    assert [file for file in tmp_path.rglob("[!.]*") if file.is_file()] == [other]


def test_the_cache_may_be_cleared_while_it_is_read_and_listed(folder: Path, cache: Path) -> None:
    before = load(folder)
    clearing = subprocess.Popen([sys.executable, "-c", "import ddpmctl.data.cache as c\nwhile True:\n    c.remove_unused(0)"])
    try:
        for _ in range(30):
            np.testing.assert_array_equal(load(folder).images, before.images)
            assert ddpmctl("data", "cache", "list").exit_code == 0
    finally:
        clearing.kill()
        clearing.wait()


def test_files_of_killed_builders_are_removed_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    (tmp_path / "results").mkdir()
    names = [f".{'a' * 64}.npy.7-12345678.tmp", f".{'b' * 64}.npy.8-12345678.tmp", f"results/.{'c' * 64}.npz.9-12345678.tmp"]
    written = [tmp_path / name for name in names]
    for file in (*written, tmp_path / ".user.tmp"):
        file.write_bytes(b"half")
        os.utime(file, (0, 0))
    os.utime(written[0])
    assert "removed 2 files" in ddpmctl("data", "cache", "clear").stdout
    assert [file for file in written if file.exists()] == written[:1]  # it may still be written
    assert (tmp_path / ".user.tmp").exists()


def test_old_files_are_removed_at_most_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    finish(load_dataset(None, scenes=1))
    old = tmp_path / "crashes" / "crash-20250101-000000-1.txt"
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    finish(load_dataset(None, scenes=1))
    assert old.exists()
    yesterday = time.time() - 86401
    os.utime(tmp_path / ".last-removal", (yesterday, yesterday))
    finish(load_dataset(None, scenes=1))
    assert not old.exists()


def test_an_entry_that_is_used_after_a_month_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    finish(load_dataset(None, scenes=1))
    for file in (*tmp_path.glob("*.*"), tmp_path / ".last-removal"):
        os.utime(file, (0, 0))
    assert finish(load_dataset(None, scenes=1))[0] == []  # it is not rendered again


def test_a_hit_counts_as_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path))
    for _ in load_dataset(None, scenes=1):
        pass
    (entry,) = tmp_path.glob("*.npy")
    week_ago = time.time() - 7 * 86400
    os.utime(entry, (week_ago, week_ago))
    for _ in load_dataset(None, scenes=1):
        pass
    assert time.time() - entry.stat().st_mtime < 3600
