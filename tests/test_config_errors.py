"""Invalid settings are refused in one line that names the flag and the permitted values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpmctl.cli.app import app
from ddpmctl.config import Config, Setting
from ddpmctl.config_sources import resolve
from ddpmctl.errors import DataError, UsageError

from .test_config import SETTINGS, written


def below(setting: Setting) -> float:
    return setting.above if setting.above is not None else setting.low - 1


def out_of_range() -> list[tuple[str, object]]:
    numbers = [s for s in SETTINGS.values() if s.kind is not str]
    low = [(s.name, below(s)) for s in numbers]
    return low + [(s.name, s.high * 2) for s in numbers if s.high is not None]


@pytest.mark.parametrize(("name", "value"), out_of_range())
def test_out_of_range(name: str, value: float) -> None:
    number = SETTINGS[name].kind(value)
    for form in (number, str(number)):
        with pytest.raises(UsageError, match=SETTINGS[name].flag) as message:
            SETTINGS[name].check(form)
        assert SETTINGS[name].range_text() in str(message.value)


@pytest.mark.parametrize("setting", [s for s in SETTINGS.values() if s.kind is not str], ids=lambda s: s.name)
def test_the_limits_of_a_range_are_permitted(setting: Setting) -> None:
    for end in (setting.low, setting.high):
        if end is not None:
            assert setting.check(setting.kind(end)) == end


WRONG_TYPES = [
    *((name, value) for name in ("epochs", "width", "steps", "seed", "threads") for value in ("2.5", 2.5, "many", "", True, [2], {"a": 1}, math.inf, "nan")),
    *((name, value) for name in ("lr", "guidance", "ema") for value in ("fast", "", "nan", "inf", True, [1.0], math.nan)),
    *((name, value) for name in ("net", "act", "device", "lr_decay") for value in (3, True, 1.5, [])),
    *((name, value) for name in ("width", "lr", "act") for value in (None, "none")),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=SETTINGS[name].flag):
        Config().replace(**{name: value})


@pytest.mark.parametrize("value", [10**400, "9" * 400], ids=["number", "text"])
def test_a_number_too_large_for_a_float(value: object) -> None:
    with pytest.raises(UsageError, match="--width"):
        Config().replace(width=value)


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        *(("net", "context_unet", "context-unet"), ("act", "gellu", "gelu"), ("act", "rleu", "relu"), ("schedule", "cosin", "cosine")),
        *(("optimizer", "admw", "adamw"), ("sampler", "dpm2m", "dpm++2m"), ("time_sampling", "lognormal", "logit-normal")),
    ],
)
def test_the_error_for_an_unknown_choice_names_the_nearest_and_all(name: str, value: str, near: str) -> None:
    with pytest.raises(UsageError, match=SETTINGS[name].flag) as message:
        resolve({name: value}, None, "report", {})
    assert f"did you mean {near!r}" in str(message.value)
    assert value in str(message.value)
    assert all(entry in str(message.value) for entry in SETTINGS[name].choices.names())


@pytest.mark.parametrize(("name", "value"), [("lr_decay", "cosine"), ("precision", "fp16"), ("objective", "flow-matching")])
def test_the_error_for_an_unknown_choice_names_all(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=value) as message:
        resolve({name: value}, None, "report", {})
    assert SETTINGS[name].range_text() in str(message.value)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"beta_1": 0.5, "beta_2": 0.1}, "--beta-2"),
        ({"steps": 401}, "--steps"),
        ({"guidance_from": 0.6, "guidance_to": 0.5}, "--guidance-to"),
        ({"timesteps": 10, "steps": 11}, "--steps"),
        ({"width": 12}, "--width"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, float], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        Config().replace(**values)


def test_unknown_settings_and_presets() -> None:
    with pytest.raises(UsageError, match=r"'learning_rate'.*batch_size"):
        Config.from_flat({"learning_rate": 1.0})
    with pytest.raises(UsageError, match=r"'fast'.*report.*quick"):
        resolve({}, None, "fast", {})


@pytest.mark.parametrize(
    ("toml", "kind", "message"),
    [
        ("learning_rate = 1.0", UsageError, "unknown setting 'learning_rate'"),
        ("[training]\nwidth = 8", UsageError, r"unknown setting 'width' in \[training\]"),
        ("[optimiser]\nlr = 1.0", UsageError, r"unknown setting 'lr' in \[optimiser\]"),
        ("[training", DataError, "is not valid TOML"),
        ("lr = ", DataError, "is not valid TOML"),
        ("\udcff", DataError, "is not valid TOML"),
    ],
)
def test_wrong_toml_is_refused_by_name(tmp_path: Path, toml: str, kind: type[Exception], message: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_bytes(toml.encode("utf-8", "surrogateescape"))
    with pytest.raises(kind, match=rf"wrong\.toml: .*{message}"):
        resolve({}, file, "report", {})


ABSURD = {
    "nested lists": ("lr = " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
    "nested tables": ("lr = " + "{a = " * 3000 + "1" + "}" * 3000, "is nested too deeply"),
    "lists within lists": ("lr = " + "[" * 300 + "]" * 300, "lr: a list is not a number"),
    "5,000 digits": ("epochs = " + "1" * 5000, "a number has thousands of digits"),
    "4,000 digits": ("epochs = " + "1" * 4000, "epochs: a number of about 3,999 digits is not a whole number"),
    "5,000 hexadecimal digits": ("act = 0x" + "f" * 5000, "act: a number of about 6,021 digits is not text"),
    "a date": ("lr = 2024-01-01", "lr: datetime.date(2024, 1, 1) is not a number"),
    "a long text": (f'act = "{"a" * 15_000}"', "act: unknown activation 'aaa"),
    "a long name": (f"{'a' * 15_000} = 1", "unknown setting 'aaa"),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_values_in_toml_are_refused_in_one_short_line(kind: str, tmp_path: Path) -> None:
    toml, words = ABSURD[kind]
    file = written(tmp_path, toml)
    result = CliRunner().invoke(app, ["train", "--print-config", "--config", str(file)])
    assert result.exit_code == 2, result.output
    assert f"error: {file}: {words}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 700


def test_toml_that_is_too_long_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "# " + "x" * 20_000)
    result = CliRunner().invoke(app, ["train", "--print-config", "--config", str(file)])
    assert result.exit_code == 3
    assert "settings.toml: has over 20,000 characters; this is not a file of settings" in result.stderr


def test_toml_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "notepad.toml"
    file.write_bytes(b"\xef\xbb\xbfwidth = 16\r\n")
    assert resolve({}, file, "report", {}).config.model.width == 16


@pytest.mark.parametrize("toml", ["lr = true", "lr = 2024-01-01", "width = 8.5", "act = 3", "[model]\nact = [1]", "epochs = -1"])
def test_wrong_values_in_toml(tmp_path: Path, toml: str) -> None:
    with pytest.raises(UsageError, match=r"settings\.toml: "):
        resolve({}, written(tmp_path, toml), "report", {})


def test_a_missing_config_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        resolve({}, tmp_path / "nowhere.toml", "report", {})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--lr", "fast"], 2, "--lr"),
        (["--act", "gellu"], 2, "'gelu'"),
        (["--epochs", "3", "--minutes", "3"], 2, "--minutes"),
        (["--preset", "fast"], 2, "--preset"),
        (["--config", "nowhere.toml"], 2, "nowhere.toml"),
    ],
)
def test_the_command_line_prints_one_line_and_sets_the_exit_code(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["train", "--print-config", *arguments])
    assert result.exit_code == code
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
