"""Sample images with numpy and onnxruntime: python sample.py "red cube,blue sphere" [--count 4] [--seed 0] [--out images]

A label with a comma stands in double quotes; without labels for a model that knows none.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def load(folder):
    """Return the network and the plan of its sampler."""
    plan = json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    return onnxruntime.InferenceSession(str(Path(folder) / "network.onnx"), providers=["CPUExecutionProvider"]), plan


def sample(model, labels, noise):
    """Return images, uint8 (B, H, W, 3), for multi-hot labels (B, C); noise() returns the next standard normal values, (B, 3, H, W)."""
    session, plan = model
    x, before = noise().astype(np.float32), np.float32(0)
    for step in plan["steps"]:

        def network(wanted, x=x, step=step):
            time = np.full(len(x), step["time"], np.float32)
            return session.run(None, {"x_t": x, "labels": wanted, "time": time})[0]

        output, w = network(labels), step["guidance"]
        if w:
            output = (1 + w) * output - w * network(np.zeros_like(labels))
        (p, q, r), (a, b, c, d, e) = step["x0"], step["next"]
        x0 = p * x + q * output + r
        x = (a * x + b * x0 + c * before + e + (d * noise() if step["noise"] else 0)).astype(np.float32)
        before = x0
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def main():
    """Read the command line and write PNGs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", nargs="?", default="")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("images"))
    given = parser.parse_args()
    model = load(Path(__file__).parent)
    plan, names = model[1], [name.strip() for name in next(csv.reader([given.labels], skipinitialspace=True), []) if name.strip()]
    unknown = [name for name in names if name not in plan["labels"]]
    if unknown or bool(names) != bool(plan["labels"]):
        parser.error(f"the labels are {', '.join(plan['labels']) or 'none'}")
    labels = np.zeros((given.count, plan["columns"]), np.float32)
    labels[:, [plan["labels"].index(name) for name in names]] = 1
    rng = np.random.default_rng(given.seed)
    made = sample(model, labels, lambda: rng.standard_normal((given.count, 3, plan["size"], plan["size"])))
    given.out.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(made):
        Image.fromarray(image).save(given.out / f"{index}.png")


if __name__ == "__main__":
    main()
