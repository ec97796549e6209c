"""Networks: invariants of every registered one, and the layers of ours."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.iclevr import ICLEVR
from ddpmctl.nets.fine_unet import Look, from_patches, to_patches
from ddpmctl.nets.recognition import seen_anywhere
from ddpmctl.nets.unet import Detail, attend_both_ways
from ddpmctl.nets.wiener import BANDS, cosine_levels
from ddpmctl.registry import ACTIVATIONS, NETWORKS
from ddpmctl.task import SIZES
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
    time[0] = 0.02  # some layers work at low noise only
    out = net(x_t, labels, time)
    assert out.shape == x_t.shape
    assert out.dtype == torch.float32
    rng = torch.Generator().manual_seed(2)
    # In training mode, some networks also return what they recognise.
    trained = net.train()(x_t, labels, time) if hasattr(net, "find_objects") else (out,)
    sum((part * torch.randn(part.shape, generator=rng)).mean() for part in trained).backward()
    idle = [n for n, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert not idle
    assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())


@pytest.mark.parametrize("name", [name for name in NETWORKS.names() if hasattr(NETWORKS.get(name), "find_objects")])
def test_objects_are_found_from_the_image_and_the_time_alone(name: str) -> None:
    net, (x_t, labels, time) = network(name, "gelu"), batch()
    found, trained = net.find_objects(x_t, time), net.train()(x_t, labels.flip(1), time)
    others = net.find_objects(x_t.flip(3), time), net.find_objects(x_t, time / 2)
    assert torch.equal(seen_anywhere(found.logits), trained[1])
    assert torch.equal(found.number, trained[-1])
    for values in zip(found, *others, strict=True):
        assert not any(torch.allclose(values[0], other) for other in values[1:])


def test_the_count_of_objects_trains_nothing_else() -> None:
    net, (x_t, labels, time) = network("fine-unet", "gelu"), batch()
    net.train()(x_t, labels, time)[-1].sum().backward()
    assert {name.split(".")[0] for name, weight in net.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0} == {"count"}


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


our_networks = pytest.mark.parametrize("name", ["unet", "fine-unet"])


@our_networks
def test_our_networks_attend_only_to_tokens_of_requested_objects(name: str) -> None:
    net, (x_t, labels, time) = network(name, "gelu"), batch(1)
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
    net = make_network(Config().replace(net="unet", width=8)).eval()
    given = batch(2)
    with torch.no_grad():
        assert net(*given).abs().max() == 0
        bias = net.out[-1].bias
        bias[len(bias) // 2 :] = 1
        torch.testing.assert_close(net(*given), given[0], rtol=1e-5, atol=1e-6)


def test_the_layers_of_fine_unet_give_estimate_error_and_direction() -> None:
    net, (x_t, labels, time) = make_network(Config().replace(net="fine-unet", width=8)).eval(), batch()
    bias = net.out[-1].bias
    with torch.no_grad():
        outputs = [net(x_t, labels, time)]
        for part in (slice(0, 3), slice(3, 3 + 3 * BANDS), slice(3 + 3 * BANDS, 3 + 6 * BANDS)):
            bias.zero_()
            bias.view(4, -1)[:, part] = 0.5
            outputs.append(net(x_t, labels, time))
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(outputs) for other in outputs[:i])


def test_patches_of_2_by_2_pixels() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    cut = to_patches(x)
    assert cut.shape == (2, 12, 2, 3)
    assert torch.equal(cut[1, :, 1, 2], x[1, :, 2:, 4:].permute(1, 2, 0).flatten())
    assert torch.equal(from_patches(cut), x)
    assert from_patches(to_patches(x[:0])).shape == (0, 3, 4, 6), "a rank's share of a batch may be empty"


def test_look_by_hand() -> None:
    """Two heads: in the first, positions choose among the visible tokens; in the second, tokens choose positions. Both attend to all positions."""
    look, rng = Look(64).eval(), torch.Generator().manual_seed(0)
    x, tokens = torch.randn((1, 64, 2, 3), generator=rng), torch.randn((4, 64), generator=rng)
    visible = torch.tensor([True, False, True, True])
    with torch.no_grad():
        look.project.weight.copy_(torch.eye(64))
        look.project.bias.zero_()
        here = look.norm(x)[0].flatten(1).T  # (6, 64)
        (query, key, value), (token_key, token_value) = look.query_key_value(here).chunk(3, 1), look.token_key_value(tokens).chunk(2, 1)
        expected = []
        for part, axis, scale in ((slice(0, 32), 1, 1.0), (slice(32, 64), 0, math.sqrt(6))):
            places = (query[:, part] @ key[:, part].T / math.sqrt(32)).softmax(1) @ value[:, part]
            weight = (query[:, part] @ token_key[:, part].T / math.sqrt(32)).exp() * visible
            expected.append(places + scale * weight / weight.sum(axis, keepdim=True).clamp(min=1e-9) @ token_value[:, part])
        torch.testing.assert_close(look(x, tokens, visible[None]) - x, torch.cat(expected, 1).T.view(1, 64, 2, 3), rtol=1e-4, atol=1e-5)


def test_fine_unet_starts_at_the_mean_image_corrected_by_what_x_t_shows() -> None:
    """Almost without noise it returns x_t; in sampling, to one of 256 levels, since it leaves room for the rounding of the image."""
    net, mean = make_network(Config().replace(net="fine-unet", width=8)).eval(), torch.rand(3, 64, 64)
    net.centre(mean)
    x_t, labels, _ = batch(2)
    with torch.no_grad():
        torch.testing.assert_close(net(x_t, labels, torch.ones(2)), mean.expand(2, -1, -1, -1), rtol=0, atol=1e-3)
        torch.testing.assert_close(net(x_t.clamp(-1, 1), labels, torch.full((2,), 1e-5)), x_t.clamp(-1, 1), rtol=0, atol=2 / 255)
        torch.testing.assert_close(net.train()(x_t, labels, torch.full((2,), 1e-5))[0], x_t, rtol=0, atol=1e-3)


def test_fine_unet_names_objects_without_seeing_the_labels() -> None:
    net, (x_t, labels, time) = network("fine-unet", "gelu").train(), batch(3)
    with torch.no_grad():
        out, seen, *_ = net(x_t, labels, time)
        other_out, other_seen, *_ = net(x_t, 1 - labels, time)
        assert seen.shape == labels.shape
        assert torch.equal(seen, other_seen)
        assert (out - other_out).abs().max() > 1e-4
        assert (net(x_t.flip(3), labels, time)[1] - seen).abs().amax(1).min() > 1e-4
        late = torch.full((3,), 0.9)  # here, the filter is the same in both modes; see tests/test_wiener.py
        torch.testing.assert_close(net.eval()(x_t, labels, late), net.train()(x_t, labels, late)[0])


@pytest.mark.parametrize("size", SIZES)
def test_fine_unet_also_gives_its_estimate_before_x_t_corrects_it_and_the_errors_it_expects(size: int) -> None:
    net = make_network(Config().replace(net="fine-unet", width=8), replace(ICLEVR, size=size)).train()
    given: list[tuple[Tensor, ...]] = []
    net.filter.register_forward_hook(lambda _, inputs, out: given.append(inputs))
    with torch.no_grad():
        out, _, *expected, by_expert, _ = net(torch.randn(2, 3, size, size), torch.ones(2, 24), torch.full((2,), 0.1))
    assert [tuple(value.shape) for value in expected] == [(2, channels, size, size) for channels in (3, 3 * BANDS, 3 * BANDS)]
    assert all(torch.equal(value, input_) for value, input_ in zip(expected, given[0], strict=False))
    assert (out - expected[0]).abs().max() > 1e-3
    assert torch.equal(by_expert, out), "at low noise only, the expert changes it; see tests/test_expert.py"


@pytest.mark.parametrize("size", SIZES)
def test_the_last_block_of_fine_unet_changes_the_corrected_estimate_by_about_the_noise_at_most(size: int) -> None:
    net, rng = make_network(Config().replace(net="fine-unet", width=8), replace(ICLEVR, size=size)).eval(), torch.Generator().manual_seed(0)
    corrected: list[Tensor] = []
    net.filter.register_forward_hook(lambda _, inputs, out: corrected.append(out))
    x_t, labels = torch.rand((1, 3, size, size), generator=rng), torch.zeros(1, 24)
    with torch.no_grad():
        assert torch.equal(net(x_t, labels, torch.tensor([0.3])), corrected[-1]), "it starts as the identity"
        nn.init.normal_(net.change_out[-1].weight)
        changes = [(net(x_t, labels, torch.tensor([time])) - corrected[-1]).abs().max().item() for time in (1e-5, 0.3)]
        sigma = cosine_levels(torch.tensor([1e-5]))[1].exp().item()
    assert changes[0] < 100 * sigma
    assert changes[1] > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_no_level_of_fine_unet_has_less_than_a_quarter_of_the_channels_of_the_coarsest(size: int) -> None:
    net = make_network(Config().replace(net="fine-unet", width=32), replace(ICLEVR, size=size))
    assert [block.conv2.out_channels for block in net.down] == {2: [32, 64], 3: [16, 32, 64], 4: [16, 16, 32, 64]}[len(net.sides)]
    assert net.stem.out_channels == net.down[0].conv2.out_channels


def test_fine_unet_learns_to_name_what_its_input_shows() -> None:
    """Two kinds of image, each with its own label, and the labels of the input exchanged: only x_t can tell."""
    net, time = make_network(Config().replace(net="fine-unet", width=8)), torch.full((2,), 0.1)
    shown = F.one_hot(torch.tensor([2, 9]), 24).float()
    x_t = torch.zeros(2, 3, 64, 64)
    x_t[0, 0, 20:30, 20:30], x_t[1, 2, 40:50, 10:20] = 1, 1
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(net(x_t, shown.flip(0), time)[1], shown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net(x_t, shown.flip(0), time)[1].argmax(1).tolist() == [2, 9]


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
        out = net(*given)
        loss = F.mse_loss(out[0] if isinstance(out, tuple) else out, target)
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
