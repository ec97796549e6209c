"""The measurements of the benchmark, each a function from plain arguments to plain figures, run in a process of its own."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset, load_conditions
from ddpmctl.device import make_compute_device
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.evaluation.classifier_training import ClassifierTrained, train_classifier
from ddpmctl.evaluation.classifiers import Classifier, load_classifier
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints, pipeline_for
from ddpmctl.evaluation.misses import breakdown
from ddpmctl.evaluation.scores import Score, pooled, score
from ddpmctl.evaluation.scoring import ScoredImages, score_conditions
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor, to_uint8
from ddpmctl.sampling.requests import requests_for
from ddpmctl.training.trainer import make_network
from tests.benchmarks import startup
from tests.benchmarks.appearance import fidelity, two_samples
from tests.benchmarks.contenders import Contender, diffusers_unet, lucidrains_unet, matmul_peak, now, ours, plain_report
from tests.benchmarks.data import benchmark_data, finish
from tests.benchmarks.faces import faces

SCORED = ("test", "new_test")
Figures = dict[str, Any]


def peak_memory() -> float:
    """Return the largest resident size of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def contender(name: str, data: Dataset, seed: int = 0, *, equal_flops: bool = False) -> Contender:
    """Return a peer; ``equal_flops``: at the size whose FLOPs per image are nearest to the report's network's (43 GFLOP)."""
    if name == "report":
        return plain_report(data, seed)
    if name == "diffusers":
        return diffusers_unet(data, seed, channels=(96, 96, 192, 192, 384, 384) if equal_flops else (128, 128, 256, 256, 512, 512))
    return lucidrains_unet(data, seed, dim=64)


# (a) Training speed


def speed(seconds: float, rounds: int, peers: Sequence[str]) -> Figures:
    """Time training steps in turn, contender after contender, round after round; each figure is the median over the rounds."""
    data = benchmark_data()
    runners = {"ours: report": ours("report", "report", data)[0], "ours: quick": ours("quick", "quick", data)[0]}
    runners |= {peer.name: peer for peer in (contender(name, data, equal_flops=True) for name in peers)}
    rates: dict[str, list[float]] = {name: [] for name in runners}
    peaks: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for runner in runners.values():
        runner.step()
    for _ in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            peaks[str(dtype).removeprefix("torch.")].append(matmul_peak(dtype))
        for name, runner in runners.items():
            start, images = time.perf_counter(), 0
            while images == 0 or time.perf_counter() - start < seconds:
                images += runner.step()
            rates[name].append(images / (time.perf_counter() - start))
    flops = {name: runner.flops_per_image() for name, runner in runners.items()}
    return {
        "peak_gflops": {name: statistics.median(values) / 1e9 for name, values in peaks.items()},
        "contenders": {
            name: {
                "images_per_second": (rate := statistics.median(rates[name])), "gflop_per_image": flops[name] / 1e9,
                "gflops": rate * flops[name] / 1e9, "parameters": sum(p.numel() for p in runner.net.parameters()),
            }
            for name, runner in runners.items()
        },
    }  # fmt: skip


def report_epochs(seconds: float, epochs: int) -> Figures:
    """Time the report's recipe as ``ddpmctl train`` runs it on this machine, and scale it to its epochs; meant for a GPU."""
    data = benchmark_data()
    runner, trainer = ours("report", "report", data)
    runner.step()
    device = trainer.compute.device
    start, images = now(device), 0
    while now(device) - start < seconds:
        images += sum(runner.step() for _ in range(20))
    rate = images / (now(device) - start)
    flops, peak = rate * runner.flops_per_image(), matmul_peak(torch.bfloat16, device=device)
    return {"images_per_second": rate, "minutes": epochs * len(data.images) / rate / 60, "gflops": flops / 1e9, "peak_gflops": peak / 1e9}


# (b) Accuracy against time


def accuracy(
    name: str,
    minutes: float,
    seed: int,
    out: str,
    repeats: int = 8,
    preset: str = "quick",
    settings: Mapping[str, Any] | None = None,
    peer_steps: int = 20,
    peer_precision: str = "fp32",
) -> Figures:
    """Train from scratch for some minutes and score the images, which are kept beside ``out`` for a second classifier and for ``fidelity``.

    ``settings`` make another recipe, which is named after them.
    """
    data, evaluator, path = benchmark_data(), load_classifier(), Path(out)
    if name != "ours":
        return _peer_accuracy(contender(name, data, seed), data, evaluator, path, minutes, seed, peer_steps, peer_precision)
    trained = _trained(path, data, preset, {"minutes": minutes, "epochs": None, "seed": seed, **(settings or {})})
    pipeline = pipeline_for(load_checkpoint(path), {}, make_compute_device(Config().device))
    start = time.perf_counter()
    scored = finish(score_conditions(pipeline, evaluator, data.conditions, seed=1000 + seed, repeats=repeats))
    _keep(path, {kind: scored_images.images for kind, scored_images in scored.items()})
    return {
        "contender": ", ".join([f"ours: {preset}", *map(str, (settings or {}).values())]), "minutes": minutes, "seed": seed, **trained, "repeats": repeats,
        "scores": {kind: scored_images.score.to_dict() for kind, scored_images in scored.items()}, "heldout": _held_out_against_seen(scored, repeats),
        "by_colours": _by_colours(scored),
        "sampling": pipeline.describe(), "sampling_ms_per_image": 1000 * (time.perf_counter() - start) / sum(len(j.requests) for j in scored.values()),
    }  # fmt: skip


def _trained(path: Path, data: Dataset, preset: str, settings: Mapping[str, Any]) -> Figures:
    """Train a preset and keep its checkpoint, unless an earlier call has; return what was measured of the training."""
    kept = path.with_suffix(".training.json")
    if not kept.exists():
        runner, trainer = ours(preset, preset, data, **settings)
        while not trainer.done:
            runner.step()
        save_checkpoint(path, trainer.config, trainer.weights(), epoch=trainer.counters.epoch)
        kept.write_text(json.dumps({"images_seen": trainer.counters.images_seen, "memory_gib": peak_memory()}), encoding="utf-8")
    figures: Figures = json.loads(kept.read_text(encoding="utf-8"))
    return figures


def _keep(path: Path, images: Mapping[str, Tensor]) -> None:
    """Write the images of each condition file, uint8 (N, 3, 64, 64), beside ``path``, as ``fidelity`` reads them."""
    np.savez(path.with_suffix(".npz"), **{kind: made.numpy() for kind, made in images.items()})


def _by_colours(scored: Mapping[str, ScoredImages]) -> Figures:
    """Score the lab's files apart by whether two requested objects share a colour."""
    outputs = torch.cat([scored[kind].probabilities for kind in SCORED])
    requested = [request.labels for kind in SCORED for request in scored[kind].requests]
    return {name: part.to_dict() for name, part in breakdown(outputs.numpy(), requested)["colours"].items()}


def _held_out_against_seen(scored: Mapping[str, ScoredImages], repeats: int) -> Figures:
    """Compare held-out label sets with the three-object ones of the lab's files that training showed."""
    trained = load_conditions(None).trained_sets
    seen = [(request, output) for kind in SCORED for request, output in zip(scored[kind].requests, scored[kind].probabilities, strict=True)
            if len(request.labels) == 3 and frozenset(request.labels) in trained]  # fmt: skip
    requests, outputs = [request for request, _ in seen], [output for _, output in seen]
    of_seen = score(torch.stack(outputs).numpy(), label_tensor(requests).numpy()).accuracy if seen else math.nan
    return {"seen_triples": of_seen, "heldout_triples": scored["heldout"].score.accuracy, "seen_conditions": len(seen) // repeats}


def _peer_accuracy(peer: Contender, data: Dataset, evaluator: Classifier, path: Path, minutes: float, seed: int, steps: int, precision: str) -> Figures:
    """Train a peer in a precision, float32 in its own code, and sample it in the precision of ours, since float32 would take hours for the same scores."""
    compute, trained, images = make_compute_device(Config().device), 0.0, 0
    training = make_compute_device(Config().replace(precision=precision).device)
    while trained < 60 * minutes:
        start = time.perf_counter()
        with training.autocast():
            images += peer.step()
        trained += time.perf_counter() - start
    memory, start, scores, images_of = peak_memory(), time.perf_counter(), {}, {}
    for kind in SCORED:
        labels = label_tensor(requests_for(kind, data.conditions[kind], seed=seed))
        with compute.autocast():
            made = torch.cat([peer.sample(part, 1000 + seed, steps) for part in labels.split(16)]).float()
        scores[kind], images_of[kind] = score(evaluator(made).numpy(), labels.numpy()).to_dict(), to_uint8(made)
    _keep(path, images_of)
    count = sum(len(data.conditions[kind]) for kind in SCORED)
    return {
        "contender": peer.name + (", bf16" if precision == "bf16" else ""), "minutes": minutes, "seed": seed, "images_seen": images,
        "memory_gib": memory, "repeats": 1, "scores": scores,
        "sampling": f"ddim, {steps} steps, {compute.precision}",
        "sampling_ms_per_image": 1000 * (time.perf_counter() - start) / count,
    }  # fmt: skip


# (c) Sampling


def sampling(checkpoint: str, ancestral_repeats: int, repeats: int, timed_steps: int, width: int) -> Figures:
    """Compare 400 ancestral float32 steps on a doubled batch with our sampler, on the report's schedule and 64 conditions.

    Timed on the report's network, whose weights do not matter for that; a step of the baseline costs the
    same at every t, so ``timed_steps`` of them are timed. The accuracies are those of ``checkpoint`` with the same schedule, by our sampler
    and by all the ancestral steps in float32, by our own ancestral sampler, whose results equal diffusers' (tests/test_samplers.py).
    """
    conditions = {kind: load_conditions(None).conditions[kind] for kind in SCORED}
    evaluator, compute = load_classifier(), make_compute_device(Config().device)
    loaded = load_checkpoint(Path(checkpoint))
    labels = label_tensor([request for kind in SCORED for request in requests_for(kind, conditions[kind], seed=0)])
    config = Config().replace(width=width, timesteps=loaded.config.diffusion.timesteps)
    net, x = make_network(config).eval(), torch.randn(len(labels), 3, 64, 64)
    diffusion = Diffusion.of(config.diffusion)
    times = list(range(diffusion.schedule.timesteps, -1, -1))
    with torch.inference_mode():
        _doubled_step(net, diffusion, x, labels, times[0])
        start = time.perf_counter()
        for t in times[:timed_steps]:
            x = _doubled_step(net, diffusion, x, labels, t)
    baseline = (time.perf_counter() - start) / timed_steps * (len(times) - 1)
    ours_config = config.replace(sampler="dpm++2m", steps=None, guidance=0.0)
    timed = SamplingPipeline(net.to(memory_format=torch.channels_last), diffusion, ours_config.sampling, compute)
    seconds = []
    for _ in range(4):  # the first call of each shape chooses its kernels
        start = time.perf_counter()
        finish(score_conditions(timed, evaluator, conditions, seed=1))
        seconds.append(time.perf_counter() - start)
    same = {"guidance": 0.0, "steps": None, "spacing": "even", "particles": 1}
    pipeline = pipeline_for(loaded, {**same, "sampler": "dpm++2m"}, compute)
    ancestral = pipeline_for(loaded, {**same, "sampler": "ddpm"}, make_compute_device(Config().replace(precision="fp32").device))
    return {
        "width": width, "baseline_seconds": baseline, "timed_steps": timed_steps, "ours_seconds": statistics.median(seconds[1:]),
        "ours": timed.describe(), "ours_scores": _scores(pipeline, evaluator, conditions, repeats),
        "ancestral_scores": _scores(ancestral, evaluator, conditions, ancestral_repeats),
    }  # fmt: skip


def _doubled_step(net: torch.nn.Module, diffusion: Diffusion, x: Tensor, labels: Tensor, t: int) -> Tensor:
    """Take an ancestral step as the report's code does: both guidance branches in one batch whatever w (here 0)."""
    schedule, count = diffusion.schedule, len(x)
    both = net(x.repeat(2, 1, 1, 1), torch.cat((labels, torch.zeros_like(labels))), torch.full((2 * count,), t / schedule.timesteps))
    w = 0.0
    eps = (1 + w) * both[:count] - w * both[count:]
    beta = float(schedule.beta[t])
    mean = (x - eps * beta / float(schedule.noise[t])) / math.sqrt(1 - beta)
    return mean + math.sqrt(beta) * torch.randn_like(x) if t > 1 else mean


def _scores(pipeline: SamplingPipeline, evaluator: Classifier, conditions: Mapping[str, Sequence[tuple[str, ...]]], repeats: int) -> Figures:
    scored = finish(score_conditions(pipeline, evaluator, conditions, seed=2, repeats=repeats))
    return {kind: scored_images.score.to_dict() for kind, scored_images in scored.items()}


# (d) A folder of checkpoints


def folder(count: int, of: int) -> Figures:
    """Evaluate ``count`` report-style checkpoints of width 128 on both files, as ``ddpmctl evaluate FOLDER --sampler dpm++2m`` does; scale to ``of``.

    The time does not depend on the weights, so they are random.
    """
    conditions = {kind: load_conditions(None).conditions[kind] for kind in SCORED}
    with tempfile.TemporaryDirectory() as place:
        paths = []
        for seed in range(count):
            net = make_network(Config().replace(seed=seed))
            paths.append(Path(place) / f"epoch{5 * seed + 5}_0.1_0.1.pth")
            torch.save(net.state_dict(), paths[-1])
        os.environ["DDPMCTL_CACHE_DIR"] = place  # results of an earlier run must not be reused
        spec = EvaluationSpec(conditions, load_classifier(), make_compute_device(Config().device),
            sampling={"sampler": "dpm++2m", "steps": None, "guidance": 0.0})  # fmt: skip
        start = time.perf_counter()
        scored, _ = finish(evaluate_checkpoints(paths, spec))
        seconds = time.perf_counter() - start
    assert len(scored) == count
    calls = sum(map(len, conditions.values())) * SamplingPipeline(net, Diffusion.of(Config().diffusion), scored[0].sampling, spec.compute).nfe
    return {"checkpoints": count, "calls": calls, "seconds": seconds, "minutes_for_all": seconds / count * of / 60, "of": of}


# A second classifier


def second_opinion(classifier: str, images: Sequence[str]) -> Figures:
    """Score images with another classifier and with the built-in one."""
    second, conditions = load_classifier(Path(classifier)), load_conditions(None).conditions
    both: dict[str, dict[str, list[Score]]] = {}
    for path in images:
        with np.load(path) as content:
            for kind in content.files:
                images = torch.from_numpy(content[kind]).float() / 127.5 - 1
                wanted = label_tensor(requests_for(kind, conditions[kind], seed=0, repeats=len(images) // len(conditions[kind])))
                for classifier_name, classifier_ in (("built-in", load_classifier()), ("second", second)):
                    both.setdefault(kind, {}).setdefault(classifier_name, []).append(score(classifier_(images).numpy(), wanted.numpy()))
    return {kind: {name: [s.to_dict() for s in scores] for name, scores in by_classifier.items()} for kind, by_classifier in both.items()}


def second_classifier(out: str, steps: int, scenes: int, check_scenes: int) -> Figures:
    """Train torchvision's ResNet18 as a second classifier: another network, another seed, other scenes."""
    *_, last = train_classifier(Path(out), network="resnet18", steps=steps, scenes=scenes, check_scenes=check_scenes, seed=1)
    assert isinstance(last, ClassifierTrained)
    return {"file": out, "accuracy_on_renders": pooled(list(last.scores.values())).accuracy, "seconds": last.seconds}


# (e) Start-up


def start_up() -> Figures:
    """Return the figures of ``startup.py``."""
    return startup.measure()


JOBS = {
    job.__name__: job for job in (speed, report_epochs, accuracy, sampling, folder, second_opinion, second_classifier, fidelity, two_samples, faces, start_up)
}
