"""Untrusted and damaged checkpoints are refused in one line, or load exactly what was saved."""

from __future__ import annotations

import json
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

from ..conftest import ddpmctl
from ..test_cli_errors import refused
from .hostile_files import (
    Exploit,
    WithAttributes,
    archive_of,
    changed,
    colliding_keys,
    declaring_more_values,
    lists_of_lists,
    of_another_width,
    of_negative_variance,
    packed,
    saved,
    scaled,
    shape_of_large_numbers,
    weights_of,
    with_directory_beyond_the_end,
    with_pickle,
    with_score,
    zip_directory,
)


@pytest.fixture(scope="module")
def sound(run: Path) -> bytes:
    """The bytes of a checkpoint written by training."""
    return next((run / "checkpoints").glob("epoch2_*.pth")).read_bytes()


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
    "nested a hundred deep": lambda sound: with_pickle(sound, b"\x80\x02)" + b"\x85" * 100 + b"."),
    "a key nested so deep that its hash overflows the stack": lambda sound: with_pickle(sound, b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."),
    "keys of one hash": lambda sound: with_pickle(sound, colliding_keys(20_000)),
    "millions of lists": lambda sound: with_pickle(sound, b"\x80\x02" + b"]" * 8_000_000 + b"."),
    "millions of sets": lambda sound: with_pickle(sound, b"\x80\x02" + b"\x8f" * 8_000_000 + b"."),
    "a list of itself many times": lambda sound: with_pickle(sound, b"\x80\x02]q\x00(" + b"h\x00" * 50_000 + b"e."),
    "copies of a long list": lambda sound: with_pickle(
        sound, b"\x80\x02ctorch\nSize\nq\x01]q\x00(" + b"K\x01" * 100_000 + b"e" + b"h\x01h\x00\x85R" * 2_000 + b"."
    ),
    "a shape of large numbers": lambda sound: with_pickle(sound, shape_of_large_numbers(20_000)),
    "a million parts in the directory": lambda sound: zip_directory(1_000_000),
    "the same part twice": lambda sound: zip_directory(2),
    "a loss that is infinite": lambda sound: changed(sound, known={"epoch": 2, "loss": float("inf"), "scores": {}}),
    "an epoch of 400 digits": lambda sound: changed(sound, known={"epoch": 10**400, "loss": 0.5, "scores": {}}),
    "a score that is NaN": with_score(float("nan")),
    "a score that is infinite": with_score(float("inf")),
    "a score of 400 digits": with_score(10**400),
    "a score that is text": with_score("0.5"),
    "weights that are infinite in the network's float32": lambda sound: scaled(sound, 1e300, torch.float64),
    "variances below zero": of_negative_variance,
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
    kinds = [
        "a terabyte in one opcode", "a memo index of 4 billion", "lists of lists of lists", "a zip bomb", "millions of lists", "millions of sets",
        "a list of itself many times", "copies of a long list", "a million parts in the directory", "keys of one hash", "a shape of large numbers",
    ]  # fmt: skip
    for name, kind in enumerate(kinds):
        (tmp_path / f"{name}.pth").write_bytes(HOSTILE[kind](sound))
    code = (
        "import resource, sys, time\nfrom pathlib import Path\nfrom ddpmctl.checkpoints.format import load_checkpoint\n"
        "from ddpmctl.errors import DataError\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = time.perf_counter()\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pth')):\n    try:\n        load_checkpoint(path)\n    except DataError:\n        print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert out[:-2] == ["refused"] * len(kinds)
    assert int(out[-2]) < 200_000  # kilobytes
    assert float(out[-1]) < 30


ATTRIBUTES: dict[str, dict[str, object]] = {
    "items": {"items": ["not a method"]},
    "keys, values and copy": {"keys": 3, "values": None, "copy": [0]},
    "metadata by which parameters are replaced": {"_metadata": {"": {"assign_to_params_buffers": True}}},
    "metadata that are a number": {"_metadata": 7},
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_of_a_state_dict_have_no_effect(kind: str, sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "sound.pth").write_bytes(sound)
    (tmp_path / "with.pth").write_bytes(changed(sound, weights=WithAttributes(weights_of(sound), ATTRIBUTES[kind])))
    for name in ("sound", "with"):
        result = ddpmctl("sample", tmp_path / f"{name}.pth", "--labels", "red cube", "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    images = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("sound", "with")]
    assert images[0] == images[1]


def test_weights_of_another_precision_are_converted_to_that_of_the_network(sound: bytes, tmp_path: Path) -> None:
    double = {name: value.double() if value.is_floating_point() else value for name, value in weights_of(sound).items()}
    weights = WithAttributes(double, ATTRIBUTES["metadata by which parameters are replaced"])
    (tmp_path / "double.pth").write_bytes(changed(sound, weights=weights))
    loaded = load_checkpoint(tmp_path / "double.pth")
    assert all(value.dtype == loaded.weights[name].dtype for name, value in weights_of(sound).items())
    assert all(value.dtype == torch.float32 for value in loaded.network().parameters())


UNUSABLE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "infinite in float32": (lambda sound: scaled(sound, 1e300, torch.float64), "are not finite"),
    "variances below zero": (of_negative_variance, "are negative"),
    "images that are not finite": (lambda sound: scaled(sound, 3e37, torch.float32), "its images are not finite"),
    "a score that is NaN": (with_score(float("nan")), "a part of the checkpoint is missing or invalid"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_network_that_cannot_be_scored_is_skipped_and_the_others_are_scored(kind: str, sound: bytes, tmp_path: Path) -> None:
    change, reason = UNUSABLE[kind]
    (tmp_path / "epoch1_0.5_0.5.pth").write_bytes(change(sound))
    (tmp_path / "epoch2_0.5_0.5.pth").write_bytes(sound)
    result = ddpmctl("evaluate", tmp_path, "--json", tmp_path / "out.json")
    assert result.exit_code == 3, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("skipped")]
    assert "epoch1_0.5_0.5.pth" in line
    assert reason in line
    assert "1 of 2 checkpoints could not be scored" in result.stderr
    (scored,) = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert scored["path"].endswith("epoch2_0.5_0.5.pth")


@pytest.mark.parametrize(("command", "out"), [("sample", "out"), ("denoise-grid", "out.png")])
def test_images_that_are_not_finite_are_not_written(command: str, out: str, sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "hostile.pth").write_bytes(scaled(sound, 3e37, torch.float32))
    assert "hostile.pth: its images are not finite" in refused(3, command, tmp_path / "hostile.pth", "-l", "red cube", "-o", tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pth"]


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
