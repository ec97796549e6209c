"""Tables and a figure of the benchmark's measurements, with the targets."""

from __future__ import annotations

import datetime
import functools
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Tell = Callable[..., tuple[str, str, bool | None]]
PEERS = ("report", "diffusers", "lucidrains")


@dataclass(frozen=True)
class Row:
    """A target, the measured figure and its ratio to the target; if the target is missed, other measurements that explain it."""

    what: str
    target: str
    figure: str
    ratio: str
    met: bool | None
    why: str = ""


def pooled(figures: Figures, kinds: tuple[str, ...] = ("test", "new_test"), hits: str = "hits", of: str = "labels") -> float:
    """Return the pooled score over condition files."""
    return sum(figures["scores"][kind][hits] for kind in kinds) / sum(figures["scores"][kind][of] for kind in kinds)


def both(figures: Figures) -> tuple[float, float]:
    """Return the accuracies on test and new_test."""
    return figures["scores"]["test"]["accuracy"], figures["scores"]["new_test"]["accuracy"]


def distances(run: Figures, of: str = "samples") -> dict[str, float]:
    """Return how far a run's samples are from renders, or, ``of`` "floor_high", how far other renders may be."""
    patches = {f"patches at {side}, times floor": run[f"patch_distance_{side}"][of] / run[f"patch_distance_{side}"]["floor"] for side in (64, 32, 16)}
    kernel = run["kernel_distance"][of] - run["kernel_distance"]["floor"]
    ends = ("floor_low", "floor_high") if of == "floor_high" else (of,)  # the energy of other renders may be lower or higher
    return {"energy off by": max(abs(run["laplacian_energy"][end] - 1) for end in ends), **patches, "kernel distance over floor": kernel}


def rows(found: dict[str, Figures], names: list[str]) -> Iterator[Row]:
    """Yield the table of targets; a row whose measurement is missing says so."""

    def row(what: str, target: str, needs: list[str], tell: Tell, why: Callable[..., str] | None = None) -> Row:
        missing = [name for name in needs if name not in found]
        if missing:
            return Row(what, target, f"not measured: {', '.join(missing)}" + " (needs a GPU)" * missing[0].startswith("gpu"), "", None)
        measured = [found[name] for name in needs]
        figure, ratio, met = tell(*measured)
        return Row(what, target, figure, ratio, met, why(*measured) if why and met is False else "")

    def report_speed(f: Figures) -> tuple[str, str, bool]:
        ours, plain = (f["contenders"][name]["images_per_second"] for name in ("ours: report", "report, plain loop"))
        return f"{ours:.1f} against {plain:.1f} images/s", f"{ours / plain:.2f} x", ours / plain >= 2.5

    def share(f: Figures) -> tuple[str, str, bool]:
        speed, peak = f["contenders"]["ours: quick"]["gflops"], f["peak_gflops"]["bfloat16"]
        return f"{speed:.0f} of {peak:.0f} GFLOP/s", f"{speed / peak:.0%}", speed / peak >= 0.4

    def reach(*runs: Figures, least: tuple[float, float]) -> tuple[str, str, bool]:
        scores = [both(f) for f in runs]
        lowest = min(value / wanted for pair in scores for value, wanted in zip(pair, least, strict=True))
        return "; ".join(f"{a:.3f} / {b:.3f}" for a, b in scores), f"{lowest:.2f}", lowest >= 1

    def by_colours(f: Figures) -> str:
        parts = (f"{name}: accuracy {part['accuracy']:.3f}, exact {part['exact_match']:.3f}" for name, part in f["by_colours"].items())
        return f"by the colours asked for in an image: {'; '.join(parts)}"

    def by_seed(*runs: Figures) -> str:
        return "; ".join(f"seed {f['seed']}: {f['images_seen']:,} images, exact {pooled(f, hits='exact', of='images'):.3f}; {by_colours(f)}" for f in runs)

    def report_minutes(f: Figures) -> tuple[str, str, bool]:
        share = f["gflops"] / f["peak_gflops"]
        return f"{f['minutes']:.0f} min, {share:.0%} of the bf16 peak", f"{40 / f['minutes']:.2f} x", f["minutes"] <= 40

    def best(f: Figures) -> tuple[str, str, bool]:
        a, b = both(f)
        return f"{a:.3f} / {b:.3f}", f"{min(a, b) / 0.99:.2f}", min(a, b) >= 0.99

    def exact(*runs: Figures, least: float) -> tuple[str, str, bool]:
        values = [pooled(f, hits="exact", of="images") for f in runs]
        return "; ".join(f"{value:.3f}" for value in values), f"{min(values) / least:.2f}", min(values) >= least

    def shared_colour(*runs: Figures) -> tuple[str, str, bool]:
        values = [f["by_colours"]["one shared"]["exact_match"] for f in runs]
        return "; ".join(f"{value:.3f}" for value in values), f"{min(values) / 0.85:.2f}", min(values) >= 0.85

    def held_out(*runs: Figures) -> tuple[str, str, bool]:
        pairs = [(f["heldout"]["heldout_triples"], f["heldout"]["seen_triples"]) for f in runs]
        worst = min(unseen - seen for unseen, seen in pairs)
        message = "; ".join(f"{unseen:.3f} against {seen:.3f}" for unseen, seen in pairs) + f" ({runs[0]['heldout']['seen_conditions']} seen triples)"
        return message, f"{100 * worst:+.1f} points", worst >= -0.03

    def sampling(f: Figures) -> tuple[str, str, bool]:
        ratio = f["baseline_seconds"] / f["ours_seconds"]
        ours, theirs = (pooled({"scores": f[name]}) for name in ("ours_scores", "ancestral_scores"))
        labels = min(sum(s["labels"] for s in f[name].values()) for name in ("ours_scores", "ancestral_scores"))
        noise = 1.96 * math.sqrt(2 * theirs * (1 - theirs) / labels)
        times = f"{f['ours_seconds']:.1f} s against {f['baseline_seconds']:.0f} s at width {f['width']}"
        message = f"{times}; accuracy {ours:.3f} against {theirs:.3f} (noise {noise:.3f})"
        return message, f"{ratio:.0f} x", ratio >= 40 and ours >= theirs - noise

    def folder(f: Figures, s: Figures) -> tuple[str, str, bool]:
        return f"{f['minutes_for_all']:.1f} min (measured on {f['checkpoints']})", f"{12 / f['minutes_for_all']:.2f} x", f["minutes_for_all"] <= 12

    def at_peak(f: Figures, s: Figures) -> str:
        gflop, peak = f["calls"] * s["contenders"]["ours: report"]["gflop_per_image"] / 3, s["peak_gflops"]["bfloat16"]
        return (
            f"{f['calls']} network calls of {s['contenders']['ours: report']['gflop_per_image'] / 3:.1f} GFLOP a checkpoint take "
            f"{gflop / peak * f['of'] / 60:.1f} min at this machine's bf16 peak of {peak:.0f} GFLOP/s"
        )

    def ahead(*runs: Figures) -> tuple[str, str, bool | None]:
        ours = {f["seed"]: pooled(f) for f in runs if f["contender"].startswith("ours")}
        theirs = [(f["contender"], f["seed"], pooled(f)) for f in runs if not f["contender"].startswith("ours") and f["seed"] in ours]
        if not theirs:
            return f"not measured: {', '.join(name for name in fives + peers if name not in found)}", "", None
        margin = min(ours[seed] - value for _, seed, value in theirs)
        best = max(theirs, key=lambda item: item[2])
        message = f"ours {', '.join(f'{v:.3f}' for v in ours.values())}; best peer {best[2]:.3f} ({best[0]})"
        if missing := [name for name in fives + peers if name not in found]:
            return f"{message}; not measured: {', '.join(missing)}", f"{100 * margin:+.0f} points at least", None if margin > 0 else False
        return message, f"{100 * margin:+.0f} points at least", margin > 0

    def second(f: Figures) -> tuple[str, str, bool]:
        scores = [{name: f[kind][name][0]["accuracy"] for name in ("built-in", "second")} for kind in ("test", "new_test")]
        gap = max(abs(s["built-in"] - s["second"]) for s in scores)
        return "; ".join(f"{s['built-in']:.3f} / {s['second']:.3f}" for s in scores), f"{100 * gap:.1f} points", gap <= 0.02

    def sharp(f: Figures, runs: list[str], around: float) -> tuple[str, str, bool]:
        energies = [f[run]["laplacian_energy"]["samples"] for run in runs]
        worst = max(abs(energy - 1) for energy in energies)
        return ", ".join(f"{energy:.2f}" for energy in energies), f"off by {worst:.2f}", worst <= around

    def patches(f: Figures, runs: list[str], times: float) -> tuple[str, str, bool]:
        ratios = [[f[run][f"patch_distance_{side}"]["samples"] / f[run][f"patch_distance_{side}"]["floor"] for side in (64, 32, 16)] for run in runs]
        worst = max(max(of_run) for of_run in ratios)
        return "; ".join(", ".join(f"{ratio:.1f}" for ratio in of_run) for of_run in ratios) + " x floor", f"{times / worst:.2f}", worst < times

    def kernel(f: Figures, runs: list[str]) -> tuple[str, str, bool]:
        found = [f[run]["kernel_distance"] for run in runs]
        message = ", ".join(f"{one['samples']:.0f}" for one in found) + f"; floor {found[0]['floor']:.0f}, up to {found[0]['floor_high']:.0f}"
        return message, "", all(one["samples"] <= one["floor_high"] for one in found)

    def nearer(f: Figures, ours: Figures) -> tuple[str, str, bool]:
        """Compare each run of a peer with ours of the same seed; their floors are those of as many images as each of them has."""
        pairs = [(distances(run), distances(ours[f"quick-5-{name[-1]}"])) for name, run in f.items() if isinstance(run, dict)]
        shown = (f"{what} {max(own[what] for _, own in pairs):.2f} at most against {min(peer[what] for peer, _ in pairs):.2f} at least" for what in pairs[0][0])
        return "; ".join(shown), "", all(peer[what] > own[what] for peer, own in pairs for what in peer)

    def as_near(f: Figures, runs: list[str]) -> tuple[str, str, bool]:
        """Compare how far held-out and seen triples are from renders; met if the former are no further than the latter or than renders may be."""
        triples = [(distances(f[run]["heldout"]), distances(f[run]["seen"]), distances(f[run]["heldout"], "floor_high")) for run in runs]
        shown = (", ".join(f"{what} {unseen[what]:.2f} against {seen[what]:.2f}" for what in unseen) for unseen, seen, _ in triples)
        return "; ".join(shown), "", all(unseen[what] <= max(seen[what], limit[what]) for unseen, seen, limit in triples for what in unseen)

    def told_apart(f: Figures) -> tuple[str, str, bool]:
        runs = {name: views for name, views in f.items() if name.startswith("quick-")}
        shown = (f"{name}: " + ", ".join(f"{view} {value:.1%}" for view, value in views.items()) for name, views in runs.items())
        return "; ".join(shown), "", max(views["whole images"] for views in runs.values()) <= 0.75

    def definite(f: Figures) -> tuple[str, str, bool]:
        runs = {name: value for name, value in f.items() if name.startswith("quick-")}
        message = ", ".join(f"{name} {value:.2f}" for name, value in runs.items()) + f"; renders {f['renders']:.2f}"
        return message, f"{min(runs.values()) / f['renders']:.2f}", min(runs.values()) >= 0.95 * f["renders"]

    def too_many(f: Figures) -> tuple[str, str, bool]:
        found = [run["too_many"] for run in f.values() if isinstance(run, dict)]
        floor = max(one["floor"] for one in found)
        return ", ".join(f"{one['samples']:.1%}" for one in found) + f"; renders {floor:.1%}", "", all(one["samples"] <= floor + 0.01 for one in found)

    def copies(f: Figures) -> tuple[str, str, bool]:
        nearest = [run["nearest"] for run in f.values() if isinstance(run, dict)]
        lowest = min(one["samples"] for one in nearest)
        return ", ".join(f"{one['samples']:.2f}" for one in nearest), f"floor {nearest[0]['floor']:.2f}", lowest >= nearest[0]["floor_low"]

    fives, thirties = ([name for name in names if name.startswith(first)] for first in ("quick-5-", "quick-30-"))
    yield row("report's network, images/s against the plain float32 loop", "2.5 x", ["speed"], report_speed)
    yield row("`quick` after 5 minutes, test / new_test, by seed", "0.92 / 0.92", fives, functools.partial(reach, least=(0.92, 0.92)), by_seed)
    yield row("exact match of `quick` after 5 minutes, by seed", "0.65", fives, functools.partial(exact, least=0.65))
    yield row("`quick` after 30 minutes, test / new_test, by seed", "0.985 / 0.975", thirties, functools.partial(reach, least=(0.985, 0.975)), by_seed)
    yield row("`quick`, FLOP/s as a share of the bf16 matrix product", "40 %", ["speed"], share)
    peers = [name for name in names if name.split("-")[0] in PEERS and "-5-" in name]
    yield row("accuracy at equal minutes against every peer, all seeds", "ahead", [name for name in fives + peers if name in found] or peers, ahead)
    yield row("fidelity at equal minutes against every peer, all seeds", "nearer", ["peers-fidelity", "fidelity"], nearer)
    yield row("64 conditions, report-style checkpoint, against 400 ancestral float32 steps", "40 x", ["sampling"], sampling)
    yield row("20 report-style checkpoints of width 128 on both files", "12 min", ["folder", "speed"], folder, at_peak)
    yield row("exact match of `quick` after 30 minutes, by seed", "0.92", thirties, functools.partial(exact, least=0.92), by_seed)
    yield row("the same, where two objects share a colour", "0.85", thirties, shared_colour)
    yield row("held-out triples against seen ones, after 30 minutes", "-3 points", thirties, held_out)
    yield row("the same, distance from renders", "no further, or as renders", ["fidelity"], functools.partial(as_near, runs=thirties))
    for kind, runs, around, times in (("5", fives, 0.15, 2.0), ("30", thirties, 0.05, 1.5)):
        energy, appearance = functools.partial(sharp, runs=runs, around=around), functools.partial(patches, runs=runs, times=times)
        yield row(f"`quick` after {kind} minutes, Laplacian energy over that of renders", f"1 within {around:g}", ["fidelity"], energy)
        yield row(f"`quick` after {kind} minutes, patch distances at 64, 32, 16", f"below {times:g} x floor", ["fidelity"], appearance)
    yield row("`quick`, kernel distance of all runs", "floor's interval", ["fidelity"], functools.partial(kernel, runs=[*thirties, *fives]))
    yield row("two-sample classifier, 2 minutes of training on 2,000 samples and renders", "75 % at most", ["two-samples"], told_apart)
    yield row("faces of cubes: how definite their rotation is", "0.95 of renders", ["faces"], definite)
    yield row("nearest training image, against held-out renders", "not nearer", ["fidelity"], copies)
    yield row("images with more coloured regions than requested objects", "as renders", ["fidelity"], too_many)
    yield row("second classifier against the built-in one, test; new_test", "2 points", ["second-opinion"], second)
    yield row("report's recipe, 600 epochs of 18,009 images on a GPU", "40 min", ["gpu-report"], report_minutes)
    yield row("`best` after 10 minutes on a GPU, test / new_test", "0.99 / 0.99", ["gpu-best"], best, by_colours)
    yield row("exact match of `best` after 10 minutes on a GPU", "0.97", ["gpu-best"], functools.partial(exact, least=0.97), by_colours)
    energy, appearance = functools.partial(sharp, runs=["best-10"], around=0.05), functools.partial(patches, runs=["best-10"], times=1.5)
    yield row("`best`, Laplacian energy over that of renders", "1 within 0.05", ["gpu-best-fidelity"], energy)
    yield row("`best`, patch distances at 64, 32, 16", "below 1.5 x floor", ["gpu-best-fidelity"], appearance)
    yield row("`best`, kernel distance", "floor's interval", ["gpu-best-fidelity"], functools.partial(kernel, runs=["best-10"]))


def table(found: dict[str, Figures], names: list[str]) -> str:
    """Return all tables in Markdown."""
    lines = [f"{processor()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}", ""]
    lines += ["| target | at least | measured | ratio | met |", f"|{' --- |' * 5}"]
    whole = list(rows(found, names))
    for r in whole:
        lines.append(f"| {r.what} | {r.target} | {r.figure} | {r.ratio} | {'-' if r.met is None else 'yes' if r.met else 'no'} |")
    lines += ["", *(f"Short of {r.target}: {r.what}; {r.why}" for r in whole if r.why)]
    if "speed" in found:
        f = found["speed"]
        lines += ["", "| training | parameters | GFLOP/image | images/s | GFLOP/s | of the bf16 peak |", "| --- | --- | --- | --- | --- | --- |"]
        for name, c in f["contenders"].items():
            rate, share = f"{c['images_per_second']:.1f} | {c['gflops']:.0f}", c["gflops"] / f["peak_gflops"]["bfloat16"]
            lines.append(f"| {name} | {c['parameters'] / 1e6:.1f} M | {c['gflop_per_image']:.1f} | {rate} | {share:.0%} |")
    runs = [found[name] for name in names if name in found and "contender" in found[name]]
    lines += ["", "| trained | minutes | seed | images | test / new_test | exact | ms to sample an image | GiB |", f"|{' --- |' * 8}"]
    for f in runs:
        a, b = both(f)
        exact = pooled(f, hits="exact", of="images")
        lines.append(
            f"| {f['contender']} | {f['minutes']:g} | {f['seed']} | {f['images_seen']:,} | {a:.3f} / {b:.3f} | {exact:.3f} "
            f"| {f['sampling_ms_per_image']:.0f} | {f['memory_gib']:.1f} |"
        )
    if "start-up" in found:
        lines += ["", "| start-up | |", "| --- | --- |", *(f"| {name} | {value:.2f} |" for name, value in found["start-up"].items() if name != "memory_gib")]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Return the machine in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{torch.get_num_threads()} cores of {models[0] if models else platform.processor()}, torch {torch.__version__}"


def plot(found: dict[str, Figures], path: Path) -> None:
    """Draw pooled accuracy over minutes of training, a point a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float]]] = {}
    for f in found.values():
        if "contender" in f and not f["contender"].startswith("ours: quick, "):  # a recipe of its own, for the row on samplers
            points.setdefault(f["contender"], []).append((f["minutes"], pooled(f)))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, runs), marker in zip(sorted(points.items()), "osD^v<>", strict=False):
        minutes = sorted({m for m, _ in runs})
        axes.scatter(*zip(*runs, strict=True), marker=marker, label=name)
        axes.plot(minutes, [statistics.mean(a for m, a in runs if m == minute) for minute in minutes], linewidth=1)
    axes.axhline(pooled({"scores": {"test": {"hits": 45, "labels": 72}, "new_test": {"hits": 58, "labels": 84}}}), color="grey", linestyle=":", linewidth=1)
    axes.text(0.99, 0.665, "the report, 600 epochs", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8, color="grey")
    axes.set(xlabel="minutes of training", ylabel="accuracy, test and new_test pooled", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
