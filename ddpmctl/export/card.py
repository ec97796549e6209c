"""The model card: what the exported model is, in the form that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddpmctl import __version__
from ddpmctl.checkpoints.outline import CheckpointOutline
from ddpmctl.config_sources import in_words, nearest_preset
from ddpmctl.errors import visible
from ddpmctl.sampling.requests import describe_sampling

CARD = "README.md"
DATA = "Training data"
USE = {  # how an image is made, by form; FOLDER is that of the card
    "safetensors": ("$ ddpmctl sample FOLDER --labels LABELS", "$ ddpmctl sample FOLDER -n 4"),
    "diffusers": (
        '>>> DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)("LABELS").images[0]    # runs the code in FOLDER',
        '>>> DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)().images[0]    # runs the code in FOLDER',
    ),
    "onnx": ("$ python FOLDER/sample.py LABELS    # needs numpy, pillow, onnxruntime", "$ python FOLDER/sample.py    # needs numpy, pillow, onnxruntime"),
}


@dataclass(frozen=True)
class Card:
    """What a card says beside what stands in the checkpoint.

    Attributes:
        name: of the model.
        data: the training data in words.
        licence: of the weights, as hubs name it, such as "mit"; empty for none.
        results: an evaluation in the form of ``ddpmctl evaluate --json``, of this checkpoint alone; None for none.
        half: whether the weights were rounded to float16.
    """

    name: str
    data: str = ""
    licence: str = ""
    results: Mapping[str, Any] | None = field(default=None)
    half: bool = False

    def text(self, checkpoint: CheckpointOutline, form: str, levels: int) -> str:
        """Return the card: a YAML head, whose values are JSON, and Markdown in which names stand as code."""
        task = checkpoint.task
        known = f"{len(task.classes)} labels" if task.classes else "no labels"
        lines = [
            "---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self._head(form).items()), "---", "", f"# {_code(self.name)}", "",
            f"A diffusion model of {task.size}x{task.size} images with {known}, trained and exported by ddpmctl {__version__}.", "",
            *(f"- {name}: {_code(text) if name == DATA and self.data else text}" for name, text in self.facts(checkpoint)),
            f"- Proof: sampled beside the checkpoint on the same noise, the images differ by at most {levels} of 255 levels", "",
        ]  # fmt: skip
        if task.classes:
            lines += ["## Labels", "", "```json", json.dumps(list(task.classes), ensure_ascii=False), "```", ""]
        if self.results is not None:
            lines += ["## Results", "", *self._table(), ""]
        labelled, unlabelled = USE[form]
        lines += ["## Use", "", "```console", labelled if task.classes else unlabelled, "```"]
        return "\n".join(lines) + "\n"

    def facts(self, checkpoint: CheckpointOutline) -> list[tuple[str, str]]:
        """Return what is known about the model, as pairs of name and text."""
        config = checkpoint.config
        preset, other = nearest_preset(config)
        return [
            ("Network", f"{config.model.net}, {config.model.act}, width {config.model.width}"),
            ("Settings", f"preset {preset}{', except ' + in_words(other) if other else ''}"),
            ("Sampling", describe_sampling(config.sampling)),
            (DATA, visible(self.data) or "not said"),
            ("Checkpoint", f"sha256 {checkpoint.sha256}{', weights rounded to float16' if self.half else ''}"),
        ]

    def scores(self) -> list[dict[str, str]]:
        """Return a row for each condition file, by the names of the columns; none where there are no results."""
        return [
            {
                "conditions": name, "accuracy": f"{score['accuracy']:.4f}", "95 % interval": "{:.4f} to {:.4f}".format(*score["interval"]),
                "exact match": f"{score['exact_match']:.4f}", "images": str(score["images"]),
            }
            for name, score in self._scores().items()
        ]  # fmt: skip

    def judge(self) -> tuple[str, str, str]:
        """Return name and sha256 of the classifier, and the settings, of the scores."""
        assert self.results is not None
        evaluator = self.results["evaluator"]
        return evaluator["name"], evaluator["sha256"], f"seed {self.results['seed']}, {self.results['precision']}"

    def _head(self, form: str) -> dict[str, Any]:
        head: dict[str, Any] = {"library_name": "diffusers" if form == "diffusers" else "ddpmctl", "pipeline_tag": "unconditional-image-generation"}
        head |= {"tags": ["diffusion", "ddpm", "ddpmctl", form]}
        if self.licence:
            head["license"] = visible(self.licence)
        if self.results is not None:
            dataset = {"name": visible(self.data) or "unknown", "type": "image"}
            metrics = []
            for name, score in self._scores().items():
                low, high = score["interval"]
                metrics.append({"type": "accuracy", "value": score["accuracy"], "name": f"accuracy on {name}, 95 % interval {low:.4f} to {high:.4f}"})
            result = {"task": {"type": "image-generation"}, "dataset": dataset, "metrics": metrics}
            head["model-index"] = [{"name": visible(self.name), "results": [result]}]
        return head

    def _scores(self) -> Mapping[str, Any]:
        scores: Mapping[str, Any] = self.results["checkpoints"][0]["scores"] if self.results is not None else {}
        return scores

    def _table(self) -> list[str]:
        (name, sha256, settings), rows = self.judge(), self.scores()
        said = f"Scored by the classifier {_code(name)} (sha256 {sha256}), {settings}."
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        return [said, "", *(f"| {' | '.join(line)} |" for line in lines)]


def _code(text: str) -> str:
    """Return a text as code in Markdown, in which nothing is markup."""
    return f"`{visible(text).replace('`', chr(39)).replace('|', chr(0x2502))}`"
