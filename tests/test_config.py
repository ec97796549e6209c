"""Settings: sources, ranges and declarations."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ddpmctl.cli.app import app
from ddpmctl.config import SECTIONS, Config, Setting, settings
from ddpmctl.config_sources import assumed, nearest_preset, overrides, resolve
from ddpmctl.config_toml import dump_toml, load_toml
from ddpmctl.errors import UsageError
from ddpmctl.presets import PRESET_HELP, PRESETS
from ddpmctl.registry import ACTIVATIONS, NETWORKS, OBJECTIVES, OPTIMIZERS, SAMPLERS, SCHEDULES, TIME_SAMPLINGS, Registry

SETTINGS = {s.name: s for s in settings()}


def printed(*arguments: str, **env: str) -> str:
    """Return what ``train --print-config`` writes."""
    result = CliRunner().invoke(app, ["train", "--print-config", *arguments], env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def written(folder: Path, text: str, name: str = "settings.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def config_of(toml: str) -> Config:
    return Config.from_flat({name: value for section in tomllib.loads(toml).values() for name, value in section.items()})


def test_steps_can_be_auto() -> None:
    assert Config().replace(steps="auto").sampling.steps is None
    assert Config().replace(steps="none").sampling.steps is None


# The recipe


def test_the_defaults_are_the_reports_recipe() -> None:
    report = {
        "net": "context-unet", "act": "gelu", "width": 128,
        "schedule": "linear", "timesteps": 400, "beta_1": 1e-4, "beta_2": 0.02, "period": 50.0, "objective": "eps",
        "epochs": 600, "minutes": None, "optimizer": "adam", "lr": 1e-4, "lr_decay": "none", "warmup": 0,
        "time_sampling": "uniform", "loss_weight": "flat", "label_dropout": 0.0, "ema": None, "save_every": 5,
        "sampler": "ddpm", "steps": None, "spacing": "even", "guidance": 0.0, "guidance_from": 0.0, "guidance_to": 1.0,
    }  # fmt: skip
    assert {name: value for name, value in Config().flat().items() if name in report} == report
    assert resolve({}, None, "report", {}).config == Config()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_explained(preset: str) -> None:
    config = resolve({}, None, preset, {}).config
    assert {name: config.flat()[name] for name in PRESETS[preset]} == PRESETS[preset]
    assert PRESET_HELP[preset]
    assert PRESETS.keys() == PRESET_HELP.keys()


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "width"),
    [
        ({}, {}, "", 32),
        ({"minutes": "9.9"}, {}, "", 32),
        ({"minutes": "10"}, {}, "", 64),
        ({}, {"DDPMCTL_MINUTES": "30"}, "", 64),
        ({}, {}, "minutes = 30", 64),
        ({"minutes": "5"}, {"DDPMCTL_MINUTES": "30"}, "", 32),
        ({"epochs": "3"}, {}, "", 64),
        ({"minutes": "30", "width": "16"}, {}, "", 16),
    ],
)
def test_quick_has_a_larger_network_for_more_minutes(tmp_path: Path, flags: dict[str, str], environ: dict[str, str], toml: str, width: int) -> None:
    resolved = resolve(flags, written(tmp_path, toml) if toml else None, "quick", environ)
    assert resolved.config.model.width == width
    assert resolved.origins["width"] == ("flag" if "width" in flags else "preset quick")
    preset, changed = nearest_preset(resolved.config)
    assert preset == "quick"
    assert ("width" in changed) == ("width" in flags), "only what a person chose differs from the preset"


def test_names_are_unique_and_sections_complete() -> None:
    names = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
    assert len(set(names)) == len(names) == len(SETTINGS)
    assert {field.name: field.type for field in dataclasses.fields(Config)}.keys() == SECTIONS.keys()
    assert all(s.help.endswith(".") for s in SETTINGS.values())


def test_a_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.lr = 1.0  # type: ignore[misc]


# Any valid config


def values_of(setting: Setting) -> st.SearchStrategy:
    if setting.choices is not None:
        values = st.sampled_from(list(setting.choices.names() if isinstance(setting.choices, Registry) else setting.choices))
    elif setting.kind is str:
        values = st.text("abc:0\"\\'# \n", min_size=1)
    elif setting.kind is int:
        values = st.integers(int(setting.low), int(setting.high) if setting.high is not None else 10**12)
    else:
        lowest = setting.low if setting.low is not None else math.nextafter(setting.above, math.inf)
        values = st.floats(lowest, setting.high if setting.high is not None else 1e12)
    return values | st.none() if setting.optional else values


@st.composite
def configs(draw: st.DrawFn) -> Config:
    flat = {name: draw(values_of(setting)) for name, setting in SETTINGS.items()}
    flat["width"] = draw(st.integers(1, 128)) * 8
    flat["beta_1"], flat["beta_2"] = sorted((flat["beta_1"], flat["beta_2"]))
    flat["guidance_from"], flat["guidance_to"] = sorted((flat["guidance_from"], flat["guidance_to"]))
    flat["steps"] = draw(st.none() | st.integers(1, flat["timesteps"]))
    flat["epochs"], flat["minutes"] = draw(st.sampled_from([(flat["epochs"] or 1, None), (None, flat["minutes"] or 1.0)]))
    return Config.from_flat(flat)


@given(config=configs())
def test_every_config_survives_each_round_trip(config: Config) -> None:
    assert Config.from_flat(config.flat()) == config
    assert Config.from_flat(json.loads(json.dumps(config.flat()))) == config
    assert config_of(dump_toml(config)) == config
    assert config_of(dump_toml(config, dict.fromkeys(SETTINGS, "flag"))) == config
    texts = {name: str(value) for name, value in config.flat().items()}  # as a command line gives them
    assert resolve(texts, None, "quick", {}).config == config


# Where a value comes from


SOURCES = ["default", "preset", "config", "environment", "flag"]


@pytest.mark.parametrize("strongest", range(1, 5))
def test_flag_beats_environment_beats_file_beats_preset_beats_default(tmp_path: Path, strongest: int) -> None:
    file = written(tmp_path, "[training]\nlr = 0.3\n") if strongest >= 2 else None
    environ = {"DDPMCTL_LR": "0.4"} if strongest >= 3 else {}
    flags = {"lr": "0.5"} if strongest >= 4 else {}
    resolved = resolve(flags, file, "quick", environ)
    assert resolved.config.training.lr == [1e-4, PRESETS["quick"]["lr"], 0.3, 0.4, 0.5][strongest]
    assert resolved.origins["lr"].startswith(SOURCES[strongest])
    assert resolved.origins["beta_1"] == "default"
    assert resolved.origins["batch_size"] == "preset quick"
    assert resolved.origins.keys() == SETTINGS.keys()


@pytest.mark.parametrize("strongest", range(5))
def test_the_command_line_follows_the_same_order(tmp_path: Path, strongest: int) -> None:
    arguments = ["--preset", "quick"] if strongest >= 1 else []
    arguments += ["--config", str(written(tmp_path, "lr = 0.3\n"))] if strongest >= 2 else []
    environ = {"DDPMCTL_LR": "0.4"} if strongest >= 3 else {}
    arguments += ["--lr", "0.5"] if strongest >= 4 else []
    text = printed(*arguments, **environ)
    assert config_of(text).training.lr == [1e-4, PRESETS["quick"]["lr"], 0.3, 0.4, 0.5][strongest]
    (line,) = (line for line in text.splitlines() if line.startswith("lr ="))
    assert f"# {SOURCES[strongest]}" in line


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read_from_its_environment_variable(name: str) -> None:
    setting = SETTINGS[name]
    values = {
        "epochs": "7", "minutes": "7.5", "width": "64", "steps": "3", "beta_2": "0.5", "guidance_to": "0.5",
        "accept": "0.5", "retry_from": "0.5", "device": "cpu", "seed": "5", "threads": "2", "ema": "0.9",
    }  # fmt: skip
    if isinstance(setting.choices, Registry):
        value = setting.choices.names()[-1]
    elif setting.choices is not None:
        value = setting.choices[-1]
    else:
        limits = [limit for limit in (setting.high, setting.low) if limit is not None and limit != setting.default]
        value = values.get(name, str(setting.kind(limits[0] if limits else 9)))
    if name == "beta_1":
        value = "0.015"
    resolved = resolve({}, None, "report", {f"DDPMCTL_{name.upper()}": value})
    assert resolved.config.flat()[name] == setting.check(value) != setting.default
    assert resolved.origins[name] == "environment"


def test_other_environment_variables_reach_train(tmp_path: Path) -> None:
    file = written(tmp_path, "width = 8\n")
    config = config_of(printed(DDPMCTL_PRESET="quick", DDPMCTL_CONFIG=str(file)))
    assert (config.model.net, config.model.width) == ("fine-unet", 8)


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "preset", "budget"),
    [
        ({"minutes": "3"}, {}, "", "report", (None, 3.0)),
        ({"epochs": "3"}, {}, "", "quick", (3, None)),
        ({"epochs": "3"}, {"DDPMCTL_MINUTES": "9"}, "", "quick", (3, None)),
        ({}, {"DDPMCTL_MINUTES": "9"}, "epochs = 4", "report", (None, 9.0)),
        ({}, {}, "epochs = 4", "quick", (4, None)),
        ({}, {}, 'epochs = "none"\nminutes = 4', "report", (None, 4.0)),
        ({"epochs": "3", "minutes": "none"}, {}, "", "quick", (3, None)),
    ],
)
def test_a_budget_of_higher_priority_removes_a_lower_one(
    tmp_path: Path, flags: dict[str, str], environ: dict[str, str], toml: str, preset: str, budget: tuple[int | None, float | None]
) -> None:
    resolved = resolve(flags, written(tmp_path, toml) if toml else None, preset, environ)
    assert (resolved.config.training.epochs, resolved.config.training.minutes) == budget
    assert resolved.origins["epochs"] == resolved.origins["minutes"], "both come from where the budget was chosen"


@pytest.mark.parametrize(("flags", "message"), [({"epochs": "3", "minutes": "3"}, "both"), ({"epochs": "none"}, "none")])
def test_two_budgets_and_no_budget_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"--epochs and --minutes.*{message}"):
        resolve(flags, None, "report", {})


def test_a_command_reads_only_its_own_sections() -> None:
    environ = {"DDPMCTL_LR": "9", "DDPMCTL_STEPS": "4", "DDPMCTL_DEVICE": "cpu"}
    assert overrides({"guidance": "1.5"}, "sampling", environ=environ) == {"guidance": 1.5, "steps": 4}
    assert overrides({}, "sampling", environ={}) == {}


def test_assumptions_are_settings() -> None:
    assert assumed(["act=relu", "beta-2 = 0.03", "timesteps=1000"]) == {"act": "relu", "beta_2": 0.03, "timesteps": 1000}
    assert assumed(None) == {}
    for wrong in ("act", "act=", "lr=1", "act=gellu", "timesteps=1.5"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            assumed([wrong])


# Print and read back


@pytest.mark.parametrize(
    "arguments",
    [[], ["--preset", "quick"], ["--lr", "1e-5", "--ema", "0.9999", "--device", 'a "b" \\ # c'], ["--minutes", "0.25", "--steps", "7", "--threads", "3"]],
)
def test_print_config_can_be_read_back(tmp_path: Path, arguments: list[str]) -> None:
    text = printed(*arguments)
    folder = tmp_path / ("long folder [x] " * 12)  # the origin is in a comment and must not break the line
    folder.mkdir()
    file = written(folder, text)
    assert set(tomllib.loads(text)) == set(SECTIONS)
    assert config_of(text) == config_of(printed("--config", str(file)))
    assert load_toml(file).keys() == SETTINGS.keys()


def test_printed_settings_have_no_colour() -> None:
    assert config_of(printed("--device", ":cat:")).device.device == ":cat:"


def test_print_config_creates_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed("--preset", "quick")
    assert list(tmp_path.iterdir()) == []


# Flags


def parameters() -> dict[str, object]:
    command = typer.main.get_command(app).commands["train"]
    found: dict[str, object] = {}
    for parameter in command.params:
        for flag in parameter.opts:
            assert flag not in found, f"{flag} is declared twice"
            found[flag] = parameter
    return found


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_has_one_flag_with_its_default_and_range(setting: Setting) -> None:
    parameter = parameters()[setting.flag]
    assert setting.flag == "--" + setting.name.replace("_", "-")
    assert parameter.opts == [setting.flag]
    assert parameter.show_default == (setting.unset if setting.default is None else str(setting.default))
    assert setting.help in parameter.help
    assert setting.range_text() in parameter.help


def test_help_names_every_flag_and_every_choice() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "240", "TERMINAL_WIDTH": "240", "NO_COLOR": "1"})
    assert result.exit_code == 0
    words = set(result.stdout.replace(",", " ").replace(")", " ").replace("(", " ").split())
    registries = (NETWORKS, ACTIVATIONS, SCHEDULES, OBJECTIVES, OPTIMIZERS, SAMPLERS, TIME_SAMPLINGS)
    missing = {s.flag for s in SETTINGS.values()} | {name for registry in registries for name in registry.names()} | {*PRESETS}
    assert {word for word in missing if word not in words and f"{word}:" not in words} == set()


# Registries


@pytest.mark.parametrize("registry", [NETWORKS, ACTIVATIONS, SCHEDULES, OBJECTIVES, OPTIMIZERS, SAMPLERS, TIME_SAMPLINGS], ids=lambda r: r.variable)
def test_every_registered_name_has_an_entry_and_a_description(registry: Registry) -> None:
    assert len(registry.names()) >= 2
    for name in registry.names():
        assert callable(registry.get(name))
        assert registry.get(name).__doc__, name
    with pytest.raises(UsageError, match=registry.kind):
        registry.get("unknown name")


def test_duplicate_names_are_refused() -> None:
    registry: Registry = Registry("PLANTED", "planted thing", "ddpmctl.nets")
    registry.register("one")(object())
    assert registry.names() == ("one",)
    with pytest.raises(ValueError, match="one"):
        registry.register("one")(object())


def test_a_file_of_version_0_2_with_its_machine_section_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text('[machine]\ndevice = "cpu"\nthreads = 1\n')
    assert load_toml(file) == {"device": "cpu", "threads": 1}


@pytest.mark.parametrize("content", [None, 3, [], "model", {"model": None}, {"model": ["width"]}, {"width": 8}])
def test_settings_that_are_not_nested_by_section_are_a_value_error(content: object) -> None:
    with pytest.raises(ValueError, match="not nested by section"):
        Config.from_dict(content)


def test_a_config_is_restored_from_its_dict_under_any_section_names() -> None:
    config = Config().replace(width=64, epochs=3)
    assert Config.from_dict({f"old {name}": section for name, section in config.to_dict().items()}) == config


def test_names_are_known_in_any_case() -> None:
    config = resolve({"act": "GELU", "precision": "FP32", "lr_decay": "Linear"}, None, "Quick", environ={}).config
    assert (config.model.act, config.device.precision, config.training.lr_decay, config.model.net) == ("gelu", "fp32", "linear", "fine-unet")
