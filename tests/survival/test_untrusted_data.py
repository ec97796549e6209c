"""Untrusted data folders on the command line: images, names and JSON; and caches of killed processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpmctl.data.images import decode_image

from ..conftest import TINY, ddpmctl
from ..test_cli_errors import folder, refused, train_on

__all__ = ["folder"]
PYTHON = [sys.executable, "-m", "ddpmctl"]
posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL, pipes and links are POSIX")
STRANGE = "CLEVR_train_000000_1.png"


def make_image(mode: str = "RGB", size: tuple[int, int] = (32, 24), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that declares any size, with any compressed rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


REFUSED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"[bold]no image[/]" * 99,
    "a web page": lambda: b"<svg onload='alert(1)'></svg>",
    "a bomb of 60,000 x 60,000": lambda: png(60_000, 60_000),
    "a bomb of 2^31 - 1 rows": lambda: png(1, 2**31 - 1),
    "a bomb of compressed rows": lambda: png(13_400, 13_400, zlib.compress(bytes(10**7), 9)),
    "a text of 100 MB": lambda: png(8, 8)[:33] + _text_bomb() + png(8, 8)[33:],
    "zero wide": lambda: png(0, 8),
    "zero high": lambda: png(8, 0),
    "no rows": lambda: png(8, 8),
    "half a PNG": lambda: encoded(make_image())[:300],
    "half a JPEG": lambda: encoded(make_image(size=(320, 240)), "JPEG")[:3000],
    "a GIF": lambda: encoded(make_image("P"), "GIF"),
    "an animated GIF": lambda: encoded(make_image("P"), "GIF", save_all=True, append_images=[make_image("P", seed=1)]),
    "a TIFF": lambda: encoded(make_image(), "TIFF"),
    "a BMP": lambda: encoded(make_image(), "BMP"),
    "an EPS, for which Pillow would start another program": lambda: encoded(make_image(), "EPS"),
    "a WebP": lambda: encoded(make_image(), "WEBP"),
    "a palette of 81 million pixels": lambda: encoded(Image.new("P", (9000, 9000))),
    "61 MB": lambda: encoded(make_image()) + bytes(61 * 10**6),
}
REASONS = {
    "a WebP": "is neither a PNG nor a JPEG image; convert it to PNG",
    "a palette of 81 million pixels": "is 9000x9000 pixels and takes 648 MB to decode; at most 500 MB are used for that",
    "61 MB": "an image file may have at most 60 MB",
}


def _text_bomb() -> bytes:
    data = b"k\0\0" + zlib.compress(bytes(10**8), 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_an_image_is_refused_by_name(kind: str, folder: Path, tmp_path: Path) -> None:
    (folder / "iclevr" / STRANGE).write_bytes(REFUSED[kind]())
    for command in (train_on(folder, tmp_path), ("data", "verify", folder)):
        result = ddpmctl(*command)
        assert result.exit_code == 3, (kind, result.output)
        assert STRANGE in result.output
        assert REASONS.get(kind, "") in result.output
        assert "Traceback" not in result.output
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory that a process had from /proc")
@pytest.mark.parametrize("kind", ["sixteen bits", "RGBA"])
def test_large_images_take_little_memory_together(kind: str, folder: Path) -> None:
    image = Image.new("RGBA", (7000, 7000)) if kind == "RGBA" else Image.fromarray(np.zeros((7000, 7000), np.uint16))
    image.save(folder / "iclevr" / STRANGE, compress_level=1)
    del image
    for file in (folder / "iclevr").iterdir():
        file.write_bytes((folder / "iclevr" / STRANGE).read_bytes())
    assert (folder / "iclevr" / STRANGE).stat().st_size < 10**6
    code = f"""
import sys
from ddpmctl.cli.app import main
sys.argv = ["ddpmctl", "data", "verify", {str(folder)!r}]
try:
    main()
except SystemExit as end:
    print(end.code, *(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, most = done.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    assert int(most) * 1024 < 600 * 10**6


def rgb_of_sixteen_bits() -> bytes:
    rows = np.random.default_rng(0).integers(0, 65536, (24, 32 * 3)).astype(">u2")
    whole = png(32, 24, zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    header = whole[12:24] + b"\x10" + whole[25:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown turned by 90 degrees
    return exif


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


TAKEN: dict[str, Callable[[], bytes]] = {
    "palette": lambda: encoded(make_image("P")),
    "palette with transparency": lambda: encoded(make_image("P"), transparency=bytes(range(256))),
    "gray": lambda: encoded(make_image("L")),
    "one bit": lambda: encoded(make_image("1")),
    "sixteen bits": lambda: encoded(Image.fromarray(np.random.default_rng(0).integers(0, 65535, (24, 32), dtype=np.uint16))),
    "with alpha": lambda: encoded(make_image("RGBA")),
    "a CMYK JPEG": lambda: encoded(make_image("CMYK"), "JPEG"),
    "a JPEG": lambda: encoded(make_image(), "JPEG"),
    "an animated PNG, its first frame": lambda: encoded(make_image(), save_all=True, append_images=[make_image(seed=1)]),
    "sixteen bits a colour": rgb_of_sixteen_bits,
    "a PNG with a colour profile": lambda: encoded(make_image(), icc_profile=profile()),
    "a JPEG with a colour profile": lambda: encoded(make_image(), "JPEG", icc_profile=profile()),
    "a PNG that EXIF turns": lambda: encoded(make_image(), exif=turned()),
    "a JPEG that EXIF turns": lambda: encoded(make_image(), "JPEG", exif=turned()),
    "a progressive JPEG": lambda: encoded(make_image(), "JPEG", progressive=True),
    "one pixel": lambda: encoded(make_image(size=(1, 1))),
    "a line": lambda: encoded(make_image(size=(3000, 1))),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_unusual_image_modes_are_read(kind: str, folder: Path, tmp_path: Path) -> None:
    file = folder / "iclevr" / STRANGE
    file.write_bytes(TAKEN[kind]())
    result = ddpmctl(*train_on(folder, tmp_path))
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    with Image.open(file) as image:
        image.load()
        image.info.pop("transparency", None)  # Pillow would warn of dropping it
        if image.mode.startswith("I"):
            return  # Pillow's own conversion clips it; the scaling has a test of its own
        expected = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(file), expected)


ELSEWHERE = (
    "../outside.png", "iclevr/../../outside.png", "/etc/passwd", "C:\\x.png", "a\\..\\x.png", "x\0.png", "a\n.png", "", ".", "..", "\u202egnp.png",
    "nul\x7f.png",
)  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_outside_of_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    make_image().save(tmp_path / "outside.png")
    make_image().save(folder / "outside.png")
    (folder / "train.json").write_text(json.dumps({STRANGE: ["red cube"], name: ["red cube"]}))
    assert "train.json" in refused(3, *train_on(folder, tmp_path))


@posix
@pytest.mark.parametrize("kind", ["a link out of the folder", "a pipe", "a device", "a folder", "a link to itself"])
def test_special_files_are_not_opened(kind: str, folder: Path, tmp_path: Path) -> None:
    make_image().save(tmp_path / "outside.png")
    file = folder / "iclevr" / STRANGE
    file.unlink()
    links = {"a link out of the folder": tmp_path / "outside.png", "a device": Path("/dev/zero"), "a link to itself": file}
    if kind in links:
        file.symlink_to(links[kind])
    else:
        {"a pipe": os.mkfifo, "a folder": os.mkdir}[kind](file)
    assert STRANGE in refused(3, *train_on(folder, tmp_path))


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"CLEVR_train_000000_0.png": ["red cube"',
    "not UTF-8": b'{"\xff": []}',
    "UTF-16": json.dumps([["red cube"]]).encode("utf-16"),
    "a key twice": b'{"a.png": ["red cube"], "a.png": ["blue cube"]}',
    "NaN": b"[[NaN]]",
    "an infinite number": b"[[1e999]]",
    "a number of 5,000 digits": b"[" + b"1" * 5000 + b"]",
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "two values": b"[] []",
    "a comment": b"[] // nothing",
    "a trailing comma": b'[["red cube"],]',
    "null": b"null",
    "true": b"true",
    "text": b'"red cube"',
    "numbers": b"[[1, 2]]",
    "a surrogate": b'[["\\ud800"]]',
    "a million labels": json.dumps({"CLEVR_train_000000_0.png": ["red cube"] * 10**6}).encode(),
    "a million labels, as a condition": json.dumps([[f"red cube {i}" for i in range(10**6)]]).encode(),
    "a hundred thousand wrong names": json.dumps({f"x{i}.png": [f"read cube {i}"] for i in range(10**5)}).encode(),
    "a hundred thousand wrong conditions": json.dumps([[f"read cube {i}"] for i in range(10**5)]).encode(),
    "markup": b'[["[link=https://example.org]red cube[/link]"]]',
    "an escape": b'[["\\u001b[2Jred cube"]]',
}


@pytest.mark.parametrize("name", ["train.json", "test.json", "objects.json"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_json_is_refused_by_name(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_bytes(MALFORMED[kind])
    line = refused(3, *train_on(folder, tmp_path))
    assert str(folder / name) in line
    assert len(line) < 1000
    assert "\x1b" not in line
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_conditions_are_refused_by_name(kind: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(MALFORMED[kind])
    assert "mine.json" in refused(3, "evaluate", run, "--conditions", tmp_path / "mine.json")


# The cache


def files_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@posix
def test_a_cache_of_a_killed_process_is_rebuilt(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed while rendering, or (simulated) between writing the two files of an entry."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(cache))
    command = [*PYTHON, "train", *TINY, "--epochs", "1", "--scenes", "200", "--runs-dir", str(tmp_path / "runs")]
    for delay in (0.0, 0.3):
        with subprocess.Popen([*command, "--name", f"killed{delay}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and _processor_seconds(process.pid) < 4 + delay:  # past its imports: it renders
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    arguments = ("train", *TINY, "--epochs", 1, "--scenes", 4, "--runs-dir", tmp_path / "runs")
    assert ddpmctl(*arguments).exit_code == 0
    (entry,) = (path for path in cache.glob("*.npy") if path.stat().st_size < 10**6)
    whole = entry.read_bytes()
    before = (run / "metrics.jsonl").read_bytes()
    for damage in (lambda: entry.with_suffix(".json").unlink(), lambda: entry.write_bytes(whole[: len(whole) // 2])):
        damage()
        result = ddpmctl(*arguments, "--epochs", 2)
        assert result.exit_code == 0, result.output
        assert entry.read_bytes() == whole
        (made,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir() and "2ep" in path.name)
        assert (made / "metrics.jsonl").read_bytes() == before
        shutil.rmtree(made)


def _processor_seconds(process: int) -> float:
    try:
        return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return float("inf")


def test_two_commands_can_build_the_same_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "DDPMCTL_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, "train", *TINY, "--epochs", "1", "--scenes", "40", "--runs-dir", str(tmp_path / "runs")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) for _ in range(2)]
    messages = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    assert all("cache" not in text for text in messages)
    assert [name.rpartition(".")[2] for name in files_in(tmp_path / "cache") if name.endswith((".npy", ".tmp"))] == ["npy"]
    one, other = sorted((tmp_path / "runs").iterdir())
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
