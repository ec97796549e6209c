"""Optimizers, learning rate schedules and EMA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddpmctl.config import Config, TrainingConfig
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import ComputeDevice
from ddpmctl.registry import OPTIMIZERS
from ddpmctl.training.optimizers import ADAMW_LR_RATIO, MatrixMuon, make_optimizers, orthogonalised, set_lr
from ddpmctl.training.trainer import Trainer, ema_average, make_network

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
LR = {"adam": 3e-3, "adamw": 3e-3, "muon": 0.02}


class Tiny(nn.Module):
    """Kernels between feature maps, a linear layer and vectors, as in the networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU())
        self.head = nn.Linear(64, 32)
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.head(self.body(self.stem(x)).mean((2, 3)))))


def tiny(layout: torch.memory_format = torch.contiguous_format) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().to(memory_format=layout)


def loss_of(net: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn((8, 3, 6, 6), generator=torch.Generator().manual_seed(seed))
    return F.mse_loss(net(x), x.mean((1, 2, 3))[:, None] * 4)


def step(net: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int = 0) -> float:
    loss = loss_of(net, seed)
    net.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def optimizers_of(net: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    return make_optimizers(net, Config().replace(optimizer=name, lr=LR.get(name, 3e-3)).training)


@LAYOUTS
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_lowers_the_loss_and_updates_every_weight(name: str, layout: torch.memory_format) -> None:
    net = tiny(layout)
    before, optimizers = copy.deepcopy(net.state_dict()), optimizers_of(net, name)
    losses = [step(net, optimizers) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_weight_has_exactly_one_optimizer(name: str) -> None:
    net = tiny()
    optimizers = optimizers_of(net, name)
    # Muon has matrix views of its kernels, which share memory with the network.
    locked = [p.data_ptr() for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(locked) == sorted(p.data_ptr() for p in net.parameters())


def test_the_reports_optimizer_is_torchs_adam() -> None:
    ours, theirs = tiny(), tiny()
    pairs = [(ours, make_optimizers(ours, Config().training)), (theirs, [torch.optim.Adam(theirs.parameters(), lr=1e-4)])]
    for seed in range(3):
        for net, optimizers in pairs:
            step(net, optimizers, seed)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# Muon


KERNELS = ("body.1.weight", "body.3.weight", "head.weight")


def by_hand(net: nn.Module, lr: float) -> tuple[dict[str, nn.Parameter], torch.optim.Muon]:
    """Return copies of the kernels between feature maps as matrices (out, in * height * width), and torch's Muon on them."""
    matrices = {name: nn.Parameter(p.detach().contiguous().flatten(1).clone()) for name, p in net.named_parameters() if name in KERNELS}
    return matrices, torch.optim.Muon(matrices.values(), lr=lr, momentum=0.95, weight_decay=0.0)


@LAYOUTS
def test_muon_updates_each_kernel_as_one_matrix(layout: torch.memory_format) -> None:
    net = tiny(layout)
    matrices, reference = by_hand(net, LR["muon"])
    optimizers = optimizers_of(net, "muon")
    start = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    for seed in range(2):
        loss_of(net, seed).backward()
        for name, p in net.named_parameters():
            if name in KERNELS:  # gradients of full rank, since rounding decides what becomes of singular values of zero
                p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
                matrices[name].grad = p.grad.contiguous().flatten(1).clone()
        for optimizer in (*optimizers, reference):
            optimizer.step()
    for name, p in net.named_parameters():
        if name in KERNELS:
            made, expected = p.detach().contiguous().flatten(1) - start[name], matrices[name].detach() - start[name]
            assert (made - expected).norm() < 0.1 * expected.norm()  # torch's Muon rounds to bf16
            assert (matrices[name] - start[name]).abs().max() > 0.1 * LR["muon"]
    assert net.body[1].weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(20, 20), (12, 40), (40, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_have_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    found = orthogonalised(matrices, dtype)
    assert found.dtype is torch.float32
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    rotated = u.mT @ found.double() @ vh.mT  # diagonal, if the singular vectors are the same
    values = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(values)).abs().max() < tolerance
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_adamw_updates_first_and_last_layer_and_vectors() -> None:
    net, theirs = tiny(), tiny()
    muon, beside = optimizers_of(net, "muon")
    assert isinstance(muon, MatrixMuon)
    assert isinstance(beside, torch.optim.AdamW)
    others = [p for name, p in theirs.named_parameters() if name not in KERNELS]
    step(theirs, [torch.optim.AdamW(others, lr=LR["muon"] * ADAMW_LR_RATIO, betas=(0.9, 0.99), weight_decay=0.0)])
    step(net, [muon, beside])
    for (name, a), b in zip(net.named_parameters(), theirs.parameters(), strict=True):
        if name not in KERNELS:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_without_matrices_is_adamw() -> None:
    assert [type(optimizer) for optimizer in optimizers_of(nn.Linear(3, 1), "muon")] == [torch.optim.AdamW]


def test_muon_refuses_layouts_that_are_not_a_matrix() -> None:
    strange = nn.Parameter(torch.zeros(3, 40, 40, 3).permute(1, 0, 3, 2))
    with pytest.raises(ValueError, match="channels_last"):
        MatrixMuon([strange], lr=0.1)


@LAYOUTS
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_restored_optimizer_continues_exactly(name: str, layout: torch.memory_format) -> None:
    straight = tiny(layout)
    optimizers = optimizers_of(straight, name)
    for seed in range(3):
        step(straight, optimizers, seed)
    saved = copy.deepcopy((straight.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))

    resumed = tiny(layout)
    restored = optimizers_of(resumed, name)
    resumed.load_state_dict(saved[0])
    for optimizer, state in zip(restored, saved[1], strict=True):
        optimizer.load_state_dict(state)
    for seed in range(3, 6):
        step(straight, optimizers, seed)
        step(resumed, restored, seed)
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def taken_by_muon(name: str) -> set[str]:
    """Return the names of the parameters that Muon updates in a network of width 32."""
    config = Config().replace(net=name, width=32, optimizer="muon", objective="x0")
    net = make_network(config).to(memory_format=torch.channels_last)
    muon, _ = make_optimizers(net, config.training)
    locked = {p.data_ptr() for group in muon.param_groups for p in group["params"]}
    return {n for n, p in net.named_parameters() if p.data_ptr() in locked}


@pytest.mark.parametrize("name", ["context-unet", "unet", "fine-unet"])
def test_muon_takes_kernels_of_our_networks(name: str) -> None:
    taken = taken_by_muon(name)
    assert len(taken) >= 5
    assert not [n for n in taken if n.startswith(("stem.", "out.", "init_conv."))]


def test_muon_takes_kernels_of_16_channels_but_not_what_reads_labels_or_pixels() -> None:
    taken = taken_by_muon("fine-unet")
    assert {"down.0.conv1.weight", "up.2.conv2.weight", "shrink.0.weight", "refine.conv1.weight", "expert.layers.1.weight"} <= taken
    assert not taken & {"tokens", "label_set.weight", "recognise.weight", "corrected_in.weight", "change_out.1.weight", "expert.layers.0.weight"}


# The learning rate


def rates(count: int, fraction: Callable[[int], float], **settings: object) -> list[float]:
    config: TrainingConfig = Config().replace(**settings).training
    optimizers = make_optimizers(tiny(), config)
    returned = [set_lr(optimizers, config, step, fraction(step)) for step in range(count)]
    assert returned[-1] == optimizers[0].param_groups[0]["lr"]
    return returned


def test_the_learning_rate_is_constant_without_decay() -> None:
    assert rates(5, lambda step: step / 5, lr=0.1) == [0.1] * 5


def test_linear_decay_is_lr_times_the_remaining_budget() -> None:
    assert rates(5, lambda step: step / 4, lr=0.1, lr_decay="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    assert rates(1, lambda step: 1.5, lr=0.1, lr_decay="linear") == [0.0], "never below zero when the clock overruns"


def test_warm_up_is_linear() -> None:
    assert rates(6, lambda step: 0.0, lr=0.1, warmup=4) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert rates(4, lambda step: step / 4, lr=0.1, warmup=2, lr_decay="linear") == pytest.approx([0.05, 0.075, 0.05, 0.025])


def test_every_parameter_group_keeps_its_own_learning_rate() -> None:
    config = Config().replace(optimizer="muon", lr=0.1, lr_decay="linear").training
    muon, beside = make_optimizers(tiny(), config)
    for _ in range(2):  # a second call starts from the peak and not from the first one's rate
        set_lr([muon, beside], config, 10, 0.5)
    assert [o.param_groups[0]["lr"] for o in (muon, beside)] == pytest.approx([0.05, 0.05 * ADAMW_LR_RATIO])


def trainer_of(**settings: object) -> Trainer:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    data = Dataset("four images", "", images, np.eye(4, 24, dtype=np.uint8), {}, None)
    return Trainer(Config().replace(**{"width": 8, "batch_size": 2, **settings}), ComputeDevice(torch.device("cpu"), "fp32"), data)


def test_a_run_decays_per_epoch_as_in_the_report() -> None:
    trainer = trainer_of(epochs=4, lr=1e-3, lr_decay="linear")
    used = []
    while not trainer.done:
        for _ in range(trainer.batches_per_epoch):
            trainer.step()
            used.append(trainer.counters.lr)
        trainer.end_epoch(trainer.mean_loss("epoch"))
    assert used == pytest.approx([1e-3 * (1 - epoch / 4) for epoch in range(4) for _ in range(2)])


# EMA


@pytest.mark.parametrize("count", [1, 2, 7, 80, 10_000])
def test_ema_decay_warms_up_to_its_value(count: int) -> None:
    averaged = [torch.zeros(3), torch.full((2, 2), 4.0)]
    ema_average(0.95)(averaged, [torch.ones(3), torch.zeros(2, 2)], count)
    decay = min(0.95, (1 + count) / (10 + count))
    torch.testing.assert_close(averaged, [torch.full((3,), 1 - decay), torch.full((2, 2), 4 * decay)])


def averaged_by_hand(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = states[0]  # the first step's weights, not the random start
    for n, state in enumerate(states[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        average = {key: d * average[key] + (1 - d) * value if value.is_floating_point() else value for key, value in state.items()}
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("net", ["unet", "context-unet"])
def test_ema_of_a_run_equals_a_manual_computation(net: str, decay: float) -> None:
    trainer, states = trainer_of(net=net, ema=decay, lr=1e-2, batch_size=4), []
    for _ in range(4):
        trainer.step()
        states.append(copy.deepcopy(trainer.net.state_dict()))
        trainer.end_epoch(trainer.mean_loss("epoch"))
    kept, expected = trainer.weights(), averaged_by_hand(states, decay)
    assert kept.keys() == expected.keys()
    for key, value in kept.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    differs = {key for key, value in kept.items() if not torch.equal(value, states[-1][key])}
    assert bool(differs) == (decay > 0)
    assert isinstance(trainer.average, AveragedModel)
    assert trainer.sampling_network() is trainer.average.module


def test_without_ema_the_weights_are_the_networks() -> None:
    trainer = trainer_of()
    trainer.step()
    assert trainer.average is None
    assert all(torch.equal(value, trainer.net.state_dict()[key]) for key, value in trainer.weights().items())
