"""Own data through the five commands: how good the judges and the samples are, and what becomes of data that are unusual.

    python -m tests.benchmarks.tasks [--only NAME ...] [--out FOLDER] [--quick]

Each row runs whole processes, as a user would type them, writes JSON to FOLDER, and is not run again if its file is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.tasks import data

Figures = dict[str, Any]
RENDER = """
import sys
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.source import DataSource
for _ in load_dataset(DataSource(scenes=int(sys.argv[1]) if sys.argv[1] else None, size=128)):
    pass
"""


def ddpmctl(*arguments: object, cwd: Path) -> str:
    """Run a command to its end and return what it printed; an error ends the benchmark with what it said."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ddpmctl", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    print(f"  {time.perf_counter() - start:5.0f} s  ddpmctl {' '.join(map(str, arguments))}", flush=True)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    return done.stdout


def everything(
    place: Path, name: str, minutes: float, source: Sequence[object], repeats: int, judge: Sequence[object] = (), settings: Sequence[object] = (),
    copies: int = 1, fidelity: bool = False,
) -> Figures:  # fmt: skip
    """Train a judge and a model, and use all five commands but ``compare``; returns the figures of judge and samples.

    With ``fidelity``, also those of the samples against real images of the same labels, each with that of other real images (the floor).
    """
    judged: Figures = {}
    if judge:
        ddpmctl("evaluator", "train", *source, *judge, "--json", "judge.json", cwd=place)
        judged = json.loads((place / "judge.json").read_text(encoding="utf-8"))
    ddpmctl("train", "--preset", "quick", "--minutes", minutes, *settings, *source, "--name", name, cwd=place)
    more = ["--breakdown", "--fidelity"] if fidelity else ["--breakdown"]
    ddpmctl("evaluate", f"runs/{name}", "--repeats", repeats, "--no-confirm", "--json", "scores.json", "--html", "scores.html", *more, cwd=place)
    ddpmctl("denoise-grid", f"runs/{name}", cwd=place)
    ddpmctl("sample", f"runs/{name}", "--conditions", "test", "--layout", "lab", "--count", copies, "--out", "images", cwd=place)
    evaluated = json.loads((place / "scores.json").read_text(encoding="utf-8"))["checkpoints"][-1]
    scores = evaluated["scores"]
    last = json.loads((place / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shown = {kind: {key: one[key] for key in ("accuracy", "exact_match", "images", "interval")} for kind, one in scores.items()}
    measures = {
        key: {which: interval["estimate"] for which, interval in measure.items()} for key, measure in evaluated.get("fidelity", {}).items() if key != "images"
    }
    return {"judge": judged, "scores": shown, "fidelity": measures, "trained": last["images_seen"], "settings": [*settings]}


def row_digits(place: Path, quick: bool) -> Figures:
    """Handwritten digits, 32x32."""
    data.digits(place / "digits")
    copies = 2 if quick else 32
    source, judge = ("--data", "digits", "--size", 32), ("--minutes", 0.1 if quick else 1.5)
    found = everything(place, "digits", 0.1 if quick else 3, source, copies, judge, ("--width", 32, "--guidance", 2, "--guidance-to", 1), copies)
    return {**found, "svc": _svc(place / "digits", place / "images")}


def _svc(real: Path, samples: Path) -> float:
    """Return how many samples a support vector machine, trained on 8x8 averages of the real digits, takes for what was requested."""
    from sklearn.svm import SVC

    def averages(file: Path) -> np.ndarray:
        image = Image.open(file).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.float32).reshape(8, 4, 8, 4).mean((1, 3)).ravel() / 16

    files = sorted(real.glob("*/*.png"))
    machine = SVC(gamma=0.001).fit(np.stack([averages(file) for file in files]), [file.parent.name for file in files])
    made = sorted((file for file in samples.glob("*-*.png")), key=lambda file: tuple(map(int, file.stem.split("-"))))
    conditions = json.loads(next((samples.parent / "runs").glob("*/conditions/test.json")).read_text(encoding="utf-8"))
    asked = [conditions[int(file.stem.split("-")[0])][0] for file in made]
    return float(np.mean(machine.predict(np.stack([averages(file) for file in made])) == np.array(asked)))


def row_houses(place: Path, quick: bool) -> Figures:
    """Drawings with six labels, names with commas and of other scripts."""
    data.houses(place / "houses", 256 if quick else 4000)
    return everything(place, "houses", 0.1 if quick else 5, ("--data", "houses"), 1 if quick else 4, ("--minutes", 0.1 if quick else 2))


def row_benchmark_32(place: Path, quick: bool) -> Figures:
    """The embedded benchmark at 32x32."""
    source = ("--size", 32, *(("--scenes", 40) if quick else ()))
    return everything(place, "small", 0.1 if quick else 5, source, 1 if quick else 4, ("--minutes", 0.1 if quick else 4), ("--width", 32))


def row_benchmark_128(place: Path, quick: bool) -> Figures:
    """The embedded benchmark at 128x128."""
    source = ("--size", 128, *(("--scenes", 40) if quick else ()))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RENDER, "40" if quick else ""], cwd=place, check=True)
    rendered = time.perf_counter() - start
    found = everything(place, "large", 0.1 if quick else 30, source, 1 if quick else 4, ("--minutes", 0.1 if quick else 6), fidelity=True)
    return {"rendering, s": rendered, **found}


def row_clevr(place: Path, quick: bool) -> Figures:
    """Scenes in CLEVR's form, some objects twice."""
    count, repeated = data.clevr(place / "clevr", 60 if quick else 300)
    said = ddpmctl("data", "verify", "clevr", cwd=place)
    ddpmctl("train", "--preset", "quick", "--minutes", 0.1, "--data", "clevr", "--fit", "crop", "--name", "clevr", cwd=place)
    return {"images": count, "repeated": repeated, "said": said}


def row_unlabelled(place: Path, quick: bool) -> Figures:
    """Images without labels."""
    count = data.unlabelled(place / "plain", 40 if quick else 300)
    ddpmctl("train", "--preset", "quick", "--minutes", 0.1 if quick else 2, "--data", "plain", "--name", "plain", cwd=place)
    ddpmctl("sample", "runs/plain", "-n", 16, "--out", "images", cwd=place)
    refused = subprocess.run(
        [sys.executable, "-m", "ddpmctl", "sample", "runs/plain", "--labels", "red cube"], cwd=place, capture_output=True, text=True, check=False
    )
    return {"images": count, "refused": refused.returncode, "reason": refused.stderr.strip().splitlines()[-1]}


ROWS: dict[str, Callable[[Path, bool], Figures]] = {
    name.removeprefix("row_").replace("_", "-"): row for name, row in list(globals().items()) if name.startswith("row_")
}


def picture(out: Path) -> Image.Image:
    """Return samples (upper rows) above real images (lower rows): digits and houses, twice as large as they are, and the benchmark at 128x128.

    Nothing is chosen by eye: conditions at even distances, the first image of each, and real images of the same labels.
    """
    from ddpmctl.benchmark.embedded import conditions as known
    from ddpmctl.benchmark.embedded import render_label_sets
    from tests.benchmarks.data import finish

    asked = [list(labels) for labels in known()["test"]]

    def samples(row: str, count: int, pattern: str) -> tuple[list[np.ndarray], list[list[str]]]:
        conditions = json.loads(next((out / row / "runs").glob("*/conditions/test.json")).read_text(encoding="utf-8")) if row != "benchmark-128" else asked
        chosen = [round(index * (len(conditions) - 1) / (count - 1)) for index in range(count)]
        return [_array(out / row / "images" / pattern.format(index)) for index in chosen], [conditions[index] for index in chosen]

    digits, names = samples("digits", 10, "{}-0.png")
    rows = [digits, [_array(sorted((out / "digits" / "digits" / name[0]).glob("*.png"))[-1], 32) for name in names]]
    drawn, sets = samples("houses", 10, "{}.png")
    rows += [drawn, [np.asarray(data.draw_house(tuple(labels), np.random.default_rng([4, number]))) for number, labels in enumerate(sets)]]
    large, sets = samples("benchmark-128", 6, "{}.png")
    renders = finish(render_label_sets([tuple(labels) for labels in sets], seed=6 * 2**32, size=128))
    rows += [large, [image.transpose(1, 2, 0) for image in renders]]
    heights, width = [64, 64, 128, 128, 128, 128], 128 * 6
    sheet, top = Image.new("RGB", (width, sum(heights) + 16), "white"), 0
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, image in enumerate(row[: width // height]):
            sheet.paste(Image.fromarray(image).resize((height, height), Image.Resampling.NEAREST), (column * height, top))
        top += height + (8 if number in (1, 3) else 0)
    return sheet


def _array(file: Path, side: int | None = None) -> np.ndarray:
    with Image.open(file) as image:
        rgb = image.convert("RGB")
        return np.asarray(rgb if side is None else rgb.resize((side, side), Image.Resampling.BILINEAR))


def main() -> None:
    """Run what is missing and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, choices=ROWS)
    parser.add_argument("--out", type=Path, default=None, help="where data, runs and figures are kept (benchmark-tasks)")
    parser.add_argument("--quick", action="store_true", help="everything in some minutes, with figures that mean nothing")
    parser.add_argument("--picture", type=Path, default=None, help="also draw samples beside real images, of digits, houses and benchmark-128")
    given = parser.parse_args()
    out = (given.out or Path("benchmark-tasks-quick" if given.quick else "benchmark-tasks")).resolve()
    for name in given.only or ROWS:
        file = out / f"{name}.json"
        if not file.exists():
            (out / name).mkdir(parents=True)
            print(f"{name} ...", flush=True)
            found = ROWS[name](out / name, given.quick)
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        print(name, file.read_text(encoding="utf-8"))
    if given.picture:
        picture(out).save(given.picture)


if __name__ == "__main__":
    main()
