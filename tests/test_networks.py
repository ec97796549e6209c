"""Networks: invariants of every registered one, and the layers of ours."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpmctl.config import Config
from ddpmctl.nets.unet import Detail, attend_both_ways
from ddpmctl.registry import ACTIVATIONS, NETWORKS
from ddpmctl.training.trainer import make_network

from .conftest import batch

WIDTH = 16


def network(name: str, act: str, width: int = WIDTH) -> nn.Module:
    """Return a network in evaluation mode without zero-initialised layers."""
    net = make_network(Config().replace(net=name, act=act, width=width)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=rng))
    return net


every_network = pytest.mark.parametrize("name", NETWORKS.names())
every_act = pytest.mark.parametrize("act", ACTIVATIONS.names())


@every_network
@every_act
def test_output_shape_and_gradients_of_every_weight(name: str, act: str) -> None:
    net, (x_t, labels, time) = network(name, act), batch()
    out = net(x_t, labels, time)
    assert out.shape == x_t.shape
    assert out.dtype == torch.float32
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    idle = [n for n, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert not idle
    assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())


@every_network
@every_act
def test_image_labels_time_and_activation_matter(name: str, act: str) -> None:
    net, (x_t, labels, time) = network(name, act), batch()
    others = (x_t.flip(3), labels, time), (x_t, labels.roll(1, 1), time), (x_t, torch.zeros_like(labels), time), (x_t, labels, time / 2)
    with torch.no_grad():
        here = net(x_t, labels, time)
        for other in others:
            assert (net(*other) - here).abs().amax((1, 2, 3)).min() > 1e-4
        other_act = network(name, "gelu" if act == "tanh" else "tanh")(x_t, labels, time)
        assert (other_act - here).abs().max() > 1e-4


@every_network
def test_outputs_do_not_depend_on_the_other_images_of_a_batch(name: str) -> None:
    net, (x_t, labels, time) = network(name, "gelu"), batch(3)
    with torch.no_grad():
        together = net(x_t, labels, time)
        for i in range(3):
            torch.testing.assert_close(net(x_t[i : i + 1], labels[i : i + 1], time[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_unet_attends_only_to_tokens_of_requested_objects() -> None:
    net, (x_t, labels, time) = network("unet", "gelu"), batch(1)
    with torch.no_grad():
        before = net(x_t, labels, time)
        for shown, changes in ((0, False), (1, True)):
            which = 1 + (labels[0] == shown).nonzero().flatten()  # token 0 means "no object"
            tokens = net.tokens.clone()
            net.tokens[which] += 3 * torch.randn(net.tokens[which].shape, generator=torch.Generator().manual_seed(4))
            assert ((net(x_t, labels, time) - before).abs().max() > 1e-4).item() is changes
            net.tokens.copy_(tokens)


def test_frequency_bands_add_up_to_the_image() -> None:
    detail = Detail()
    x_t = batch(2)[0]
    torch.testing.assert_close(sum(detail(x_t)), x_t, rtol=1e-5, atol=1e-6)
    flat = torch.full((1, 3, 64, 64), 0.7)
    fine, middle, coarse = detail(flat)
    torch.testing.assert_close((fine, middle, coarse), (torch.zeros_like(flat), torch.zeros_like(flat), flat))
    point = torch.zeros(1, 3, 64, 64)
    point[:, 0, 32, 32] = 1
    once = point - detail(point)[0]
    torch.testing.assert_close(once[0, 0, 31:34, 31:34], torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16)
    assert once[0, 1:].abs().max() == 0, "colours do not mix"
    assert detail(point)[2][0, 0].count_nonzero() == 49, "the second blur reaches two pixels further"


def test_unet_with_all_gates_open_returns_its_input() -> None:
    """Details of the image reach the output without passing the layers."""
    net = make_network(Config().replace(net="unet", width=8))
    given = batch(2)
    with torch.no_grad():
        assert net(*given).abs().max() == 0
        net.out[-1].bias[3 * 16 :] = 1
        torch.testing.assert_close(net(*given), given[0], rtol=1e-5, atol=1e-6)


def test_attention_both_ways_by_hand() -> None:
    """One head has its softmax over the visible objects, the other over the positions."""
    rng = torch.Generator().manual_seed(0)
    query, key_value = torch.randn((1, 5, 4), generator=rng), torch.randn((1, 3, 8), generator=rng)
    visible = torch.tensor([[True, False, True]])
    out = attend_both_ways(query, key_value, 2, visible)
    key, value = key_value[0].chunk(2, 1)
    for head, axis in ((0, 1), (1, 0)):
        part = slice(2 * head, 2 * head + 2)
        weight = (query[0, :, part] @ key[:, part].T / math.sqrt(2)).exp() * visible
        share = weight / weight.sum(axis, keepdim=True).clamp(min=1e-9) * (math.sqrt(5) if axis == 0 else 1)
        torch.testing.assert_close(out[0, :, part], share @ value[:, part])


@every_network
def test_one_training_step_lowers_the_error(name: str) -> None:
    net, given = make_network(Config().replace(net=name, width=8)), batch(4)
    target = given[1].mean(1).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = F.mse_loss(net(*given), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_network
@pytest.mark.parametrize("width", [8, 24])
def test_networks_accept_every_multiple_of_8_as_width(name: str, width: int) -> None:
    x_t, labels, time = batch(1)
    with torch.no_grad():
        assert network(name, "relu", width)(x_t, labels, time).shape == x_t.shape
