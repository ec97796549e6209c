"""Untrusted and damaged checkpoints are refused in one line, or load exactly what was saved."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.checkpoints.untrusted import open_tensors
from ddpmctl.errors import DdpmctlError

from ..test_cli_errors import refused


@pytest.fixture(scope="module")
def sound(run: Path) -> bytes:
    """The bytes of a checkpoint written by training."""
    return next((run / "checkpoints").glob("epoch2_*.pth")).read_bytes()


def archive_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def packed(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out.getvalue()


def with_pickle(sound: bytes, content: bytes) -> bytes:
    parts = archive_of(sound)
    return packed({name: content if name.endswith("data.pkl") else data for name, data in parts.items()})


class Exploit:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch executed",)


def lists_of_lists(depth: int) -> bytes:
    """Ten references to ten references to ...: a few hundred bytes that would print as 10 ** depth."""
    value: list[object] = ["x"] * 10
    for _ in range(depth):
        value = [value] * 10
    return pickle.dumps({"format": "ddpmctl checkpoint 1", "config": {"model": {"width": value}}, "known": {}, "weights": {}}, protocol=2)


def declaring_more_values(sound: bytes) -> bytes:
    """A tensor that declares more values than the file has: torch would read beyond its memory."""
    pickled = archive_of(sound)["archive/data.pkl"]
    # The first storage's count and the tensor's shape are stored as integers; the bias of 8 values becomes one of 200.
    at = pickled.index(b"K\x08tq")
    return with_pickle(sound, pickled[:at] + b"K\xc8tq" + pickled[at + 4 :])


def with_directory_beyond_the_end(sound: bytes) -> bytes:
    end = bytearray(sound[-22:])
    struct.pack_into("<2H2L", end, 8, 65535, 65535, 0xFFFFFFF0, 0xFFFFFFF0)
    return sound[:-22] + bytes(end)


def of_another_width(sound: bytes) -> bytes:
    content = torch.load(io.BytesIO(sound), weights_only=True)
    content["config"]["model"]["width"] = 1024
    return saved(content)


def saved(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def changed(sound: bytes, **changes: object) -> bytes:
    return saved({**torch.load(io.BytesIO(sound), weights_only=True), **changes})


def weights_of(sound: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(sound), weights_only=True)["weights"]  # type: ignore[no-any-return]


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda sound: b"",
    "text": lambda sound: b"epoch,loss\n" * 100,
    "cut in the middle": lambda sound: sound[: len(sound) // 2],
    "cut by one byte": lambda sound: sound[:-1],
    "an additional byte": lambda sound: sound + b"x",
    "code in a bare pickle": lambda sound: pickle.dumps(Exploit()),
    "code in an archive": lambda sound: with_pickle(sound, pickle.dumps(Exploit(), protocol=2)),
    "code in torch's old format": lambda sound: b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {}, Exploit(), [])),
    "lists of lists of lists": lambda sound: with_pickle(sound, lists_of_lists(40)),
    "a list of itself": lambda sound: with_pickle(sound, b"\x80\x02]q\x00h\x00a."),
    "a memo index of 4 billion": lambda sound: with_pickle(sound, b"\x80\x02}r\xff\xff\xff\xff."),
    "a terabyte in one opcode": lambda sound: with_pickle(sound, b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
    "an integer of a million digits": lambda sound: with_pickle(sound, b"\x80\x02\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b"."),
    "nothing on the stack": lambda sound: with_pickle(sound, b"\x80\x02."),
    "another protocol, of which torch would warn": lambda sound: with_pickle(sound, b"\x80\x00" + archive_of(sound)["archive/data.pkl"][2:]),
    "an empty pickle": lambda sound: with_pickle(sound, b""),
    "a huge table of contents": lambda sound: with_pickle(sound, b"\x80\x02" + b"N0" * 5_000_000 + b"N."),
    "a zip bomb": lambda sound: packed({**archive_of(sound), "archive/data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
    "more values declared than stored": declaring_more_values,
    "a directory beyond the end": with_directory_beyond_the_end,
    "a hundred thousand parts": lambda sound: packed({**archive_of(sound), **{f"archive/x{i}": b"" for i in range(100_001)}}),
    "two pickles": lambda sound: packed({**archive_of(sound), "other/data.pkl": b"N."}),
    "a TorchScript archive": lambda sound: packed({**archive_of(sound), "archive/constants.pkl": b"\x80\x02)."}),
    "another width in its settings": of_another_width,
    "settings of text": lambda sound: changed(sound, config="large"),
    "settings out of range": lambda sound: changed(sound, config={"model": {"width": 10**12}}),
    "settings that are lists": lambda sound: changed(sound, config={"model": {"width": [8]}}),
    "an unknown setting": lambda sound: changed(sound, config={"model": {"[bold]": 8}}),
    "weights that are text": lambda sound: changed(sound, weights={"a": "b"}),
    "weights that are a list": lambda sound: changed(sound, weights=[1]),
    "missing weights": lambda sound: changed(sound, weights={}),
    "metadata of a wrong type": lambda sound: changed(sound, known=[]),
    "an epoch that is text": lambda sound: changed(sound, known={"epoch": "[red]9"}),
    "weights that are NaN": lambda sound: changed(sound, weights={name: value * float("nan") for name, value in weights_of(sound).items()}),
    "a tensor alone": lambda sound: saved(torch.zeros(3)),
    "a number alone": lambda sound: saved(3),
    "a view of one number as many": lambda sound: saved({"init_conv.conv1.0.weight": torch.zeros(1).expand(8, 3, 3, 3)}),
    "a sparse tensor": lambda sound: saved({"init_conv.conv1.0.weight": torch.zeros(8, 8).to_sparse()}),
    "a complex tensor": lambda sound: saved({"init_conv.conv1.0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.complex64)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line(kind: str, sound: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.pth"
    file.write_bytes(HOSTILE[kind](sound))
    assert "hostile.pth" in refused(3, "sample", file, "--labels", "red cube", "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["hostile.pth"], ["hostile.pth", "out"])


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nothing"])
def test_special_files_do_not_block(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.pth"
    links = {"device": "/dev/zero", "link to nothing": "nothing"}
    if kind in links:
        file.symlink_to(links[kind])
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](file)
    result = subprocess.run([sys.executable, "-m", "ddpmctl", "evaluate", file], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (2, 3)
    assert "hostile.pth" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_hostile_file_needs_little_memory(sound: bytes, tmp_path: Path) -> None:
    """Files that declare much memory, with an address space of 6 GB and a time limit."""
    for name, kind in enumerate(("a terabyte in one opcode", "a memo index of 4 billion", "lists of lists of lists", "a zip bomb")):
        (tmp_path / f"{name}.pth").write_bytes(HOSTILE[kind](sound))
    code = (
        "import resource, sys, time\nfrom pathlib import Path\nfrom ddpmctl.checkpoints.format import load_checkpoint\n"
        "from ddpmctl.errors import DataError\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = time.perf_counter()\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pth')):\n    try:\n        load_checkpoint(path)\n    except DataError:\n        print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert out[:4] == ["refused"] * 4
    assert int(out[4]) < 200_000  # kilobytes
    assert float(out[5]) < 30


@pytest.mark.slow
def test_every_flipped_bit_is_detected_or_harmless(sound: bytes, tmp_path: Path) -> None:
    """A thousand random bits of the file, and every byte of its directory."""
    file = tmp_path / "flipped.pth"
    file.write_bytes(sound)
    whole = load_checkpoint(file)
    rng, detected, harmless = random.Random(0), 0, 0
    directory = sound.rindex(b"PK\x01\x02", 0, len(sound) - 22)
    places = [rng.randrange(len(sound) * 8) for _ in range(1000)] + [8 * at + rng.randrange(8) for at in range(directory, len(sound))]
    for place in places:
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = load_checkpoint(file)
        except DdpmctlError:
            detected += 1
            continue
        assert (found.config, found.epoch, found.loss, found.recorded, found.foreign) == (whole.config, whole.epoch, whole.loss, whole.recorded, False), place
        assert all(torch.equal(found.weights[name], value) for name, value in whole.weights.items()), place
        harmless += 1
    assert detected > 900
    assert detected + harmless == len(places)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(3, 4)[:, 1], "b": torch.ones(2, 3).t(), "c": torch.zeros(0, 5), "d": torch.tensor(3)},
        {"shared": [torch.arange(6).view(2, 3)] * 2, "bf16": torch.ones(3, dtype=torch.bfloat16), "bool": torch.ones(2, dtype=torch.bool)},
        {"parameter": torch.nn.Parameter(torch.ones(2)), "state": torch.nn.Linear(2, 3).state_dict(), 3: (None, True, 1.5, -(2**40), "\u00e9\U0001f600")},
    ],
)
def test_the_outline_equals_what_torch_loads(content: dict[object, object], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")

    def compare(outline: object, loaded: object) -> None:
        if isinstance(loaded, torch.Tensor):
            assert outline.shape == tuple(loaded.shape)  # type: ignore[attr-defined]
        elif isinstance(loaded, dict):
            assert list(outline) == list(loaded)  # type: ignore[call-overload]
            for key in loaded:
                compare(outline[key], loaded[key])  # type: ignore[index]
        elif isinstance(loaded, (list, tuple)):
            assert len(outline) == len(loaded)  # type: ignore[arg-type]
            for one, other in zip(outline, loaded, strict=True):  # type: ignore[call-overload]
                compare(one, other)
        else:
            assert outline == loaded

    with open_tensors(tmp_path / "x.pt") as file:
        compare(file.outline, file.load())
