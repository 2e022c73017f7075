"""Where a step's time goes, what layers and messages cost: against FLOPs and bytes that can be counted by hand."""

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from utils import costs, probes
from utils.costs import Roof, Talk
from utils.model import CNN, CNNConfig, parts


class Event:
    """What by_group reads of torch.profiler's events."""

    def __init__(self, name, microseconds=0.0, parent=None):
        self.name, self.self_cpu_time_total, self.cpu_parent = name, microseconds, parent


def test_time_belongs_to_the_outermost_event_that_has_a_group():
    step = Event("ProfilerStep")
    loading = Event("data", 5.0, step)
    copied = Event("aten::copy_", 7.0, loading)
    pooled_data = Event("aten::max_pool2d", 2.0, copied)
    forward = Event("aten::conv2d", 1.0, step)
    inner = Event("aten::mkldnn_convolution", 20.0, Event("aten::convolution", 0.0, forward))
    backward = Event("autograd::engine::evaluate_function: ConvolutionBackward0", 3.0)
    other = Event("aten::add", 4.0, step)
    times = costs.by_group([loading, copied, pooled_data, forward, inner, backward, other])
    assert times == {"data": 14.0, "convolution, forward": 21.0, "convolution, backward": 3.0, costs.REST: 4.0}


def test_profile_sees_what_a_step_does_and_adds_up():
    """One large convolution, and a batch that takes its time: the two shares are far above all others."""
    conv = nn.Conv2d(32, 32, 3, padding=1)

    def batches():
        for _ in range(3):
            x = torch.randn(8, 32, 48, 48)
            for _ in range(10):
                x = x.sort(dim=3).values
            yield x, torch.zeros(8)

    steps = []
    times = costs.where_time_goes(batches(), lambda x, _: steps.append(conv(x).sum().backward()))
    assert len(steps) == 3
    assert list(times.index) == [*costs.GROUPS, costs.REST]
    assert (times >= 0).all()
    assert times["convolution, forward"] > 0
    assert times["convolution, backward"] > times["optimizer"] == 0
    assert times["data"] > 10 * times["pooling"]


def test_profile_leaves_standard_error_alone(capfd):
    with costs.silent_stderr():
        torch.zeros(1)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_roof_has_a_ridge():
    roof = Roof(peak=800.0, bandwidth=40.0)
    assert roof.ridge == 20
    assert [roof.limit(x) for x in (1, 20, 100)] == [40, 800, 800]


def test_bandwidth_is_that_of_a_memory():
    assert 1e8 < costs.bandwidth(2**20, 3) < 1e14


def test_convolution_costs_what_a_pencil_says():
    """3×3, 32 to 32 channels, on 4 images of 14×14: FLOPs twice the multiply-adds, backward twice the forward."""
    model = CNN(CNNConfig())
    table = costs.layer_costs(model, torch.randn(4, 1, 28, 28), "fp32").set_index(["layer", "direction"])
    convolutions = {
        name: layer
        for name, layer in probes.layers(model).items()
        if isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.out_channels, layer.stride) == (32, 32, (1, 1))
    }
    name = next(iter(convolutions))
    values, weights = 4 * 32 * 14 * 14, 32 * 32 * 9
    forward, backward = (table.loc[(name, direction)] for direction in ("forward", "backward"))
    assert forward["flops"] == 2 * 9 * 32 * values
    assert backward["flops"] == 2 * forward["flops"]
    assert forward["bytes"] == 4 * (2 * values + weights)
    assert backward["bytes"] == 4 * (3 * values + 2 * weights)


def test_flops_of_layers_add_up_to_those_of_the_network():
    model = CNN(CNNConfig())
    table = costs.layer_costs(model, torch.randn(2, 1, 28, 28), "fp32")
    counted = table[table["kind"].isin(["convolution", "head"]) & (table["direction"] == "forward")]["flops"].sum()
    assert counted == 2 * sum(flops for *_, flops, _ in parts(model, 28))


def test_first_layer_needs_no_gradient_of_the_image():
    table = costs.layer_costs(CNN(CNNConfig()), torch.randn(2, 1, 28, 28), "fp32").set_index(["layer", "direction"])
    assert table.loc[("stem.conv", "backward"), "flops"] == table.loc[("stem.conv", "forward"), "flops"]


def test_norms_and_activations_are_counted_by_hand():
    table = costs.layer_costs(CNN(CNNConfig()), torch.randn(2, 1, 28, 28), "fp32")
    assert set(table["kind"]) == {"convolution", "batch norm", "activation", "pooling", "head"}
    assert (table["flops"] > 0).all()
    norm = table[table["kind"] == "batch norm"].iloc[0]
    assert norm["flops"] == 7 * 2 * 32 * 14 * 14  # behind the pooling


@pytest.mark.parametrize("change", [{"pool": "average"}, {"norm": "group"}, {"activation": "gelu"}])
def test_layers_of_other_kinds_are_counted_by_their_bytes(change):
    table = costs.layer_costs(CNN(CNNConfig(width=8, **change)), torch.randn(2, 1, 28, 28), "fp32")
    assert (table["bytes"] > 0).all()
    assert (table.loc[table["kind"] == "other", "flops"] == 0).all()


def test_numbers_in_bf16_are_half_as_many_bytes():
    wide, narrow = (
        costs.layer_costs(CNN(CNNConfig()), torch.randn(2, 1, 28, 28), precision).set_index(["layer", "direction"])
        for precision in ("fp32", "bf16")
    )
    inner = [name for name in wide.index if name[0].endswith("conv2")]
    assert inner
    assert (wide.loc[inner, "bytes"] > narrow.loc[inner, "bytes"]).all()


def test_every_layer_is_timed_in_both_directions():
    model, images, precision = costs.course_step(8)
    table = costs.layer_seconds(model, images, precision, repeats=1)
    assert set(table["layer"]) == set(probes.layers(model))
    assert table.groupby("layer")["direction"].agg(list).map(lambda both: both == ["forward", "backward"]).all()
    assert table["seconds"].between(0, 10, inclusive="neither").all()


def test_layers_leave_no_hooks_behind_even_after_an_error():
    model = CNN(CNNConfig())
    with pytest.raises(ValueError, match="3"):
        costs.inputs_of(model, torch.randn(2, 3, 28, 28), "fp32")  # in colour
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_line_through_times_is_found_again():
    sizes = [2.0**power for power in range(8, 25, 2)]
    talk = Talk(latency=50e-6, per_byte=1e-9)
    found = Talk.fitted(sizes, [talk.seconds(size) for size in sizes])
    assert (found.latency, found.per_byte) == pytest.approx((talk.latency, talk.per_byte))


def test_line_weighs_short_messages_as_much_as_long_ones():
    """Each time is off by a tenth, up or down: the latency is found within that, though one message takes 99 %."""
    sizes = np.array([2.0**power for power in range(8, 25, 2)])
    off = 1 + 0.1 * (-1) ** np.arange(len(sizes))
    talk = Talk(latency=50e-6, per_byte=1e-9)
    found = Talk.fitted(sizes, off * [talk.seconds(size) for size in sizes])
    assert found.latency == pytest.approx(talk.latency, rel=0.15)
    assert found.per_byte == pytest.approx(talk.per_byte, rel=0.15)


def test_line_through_two_points_is_refused():
    with pytest.raises(ValueError, match="2 message sizes: expected three or more"):
        Talk.fitted([1, 2], [1, 2])


def test_ring_costs_what_its_source_says():
    """p = 8: seven rounds there and seven back of an eighth of the bytes each."""
    talk = Talk(latency=1e-3, per_byte=1e-9)
    assert talk.seconds(8e6, 2) == pytest.approx(1e-3 + 8e-3)
    assert talk.seconds(8e6, 8) == pytest.approx(7e-3 + 14 * 1e-3)


def test_messages_of_a_step_are_those_of_its_norms_and_weights():
    model = CNN(CNNConfig())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    sent = costs.messages(model)
    assert len(sent) == 2 * len(norms) + 2
    assert 4 * sum(weight.numel() for weight in model.parameters()) in sent
    assert sum(buffer.nbytes for buffer in model.buffers()) in sent
    assert math.isclose(costs.step_seconds(0.1, model, Talk(1e-3, 0.0)), 0.1 + 1e-3 * len(sent))
