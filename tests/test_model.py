"""The network against torchvision's residual block, torch's own initializers, and what can be measured on it."""

import math
import zlib
from itertools import product

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from utils.model import CNN, GROWTHS, NORMS, POOLS, Block, CNNConfig, parts, receptive_fields


def copy_block(theirs: BasicBlock, ours: Block) -> None:
    """Give torchvision's block the weights of ours."""
    pairs = [(theirs.conv1, ours.conv1), (theirs.bn1, ours.norm1), (theirs.conv2, ours.conv2), (theirs.bn2, ours.norm2)]
    if theirs.downsample is not None:
        pairs.append((theirs.downsample, ours.shortcut))
    for target, source in pairs:
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("halve", [False, True])
def test_block_is_torchvisions_basic_block(halve):
    torch.manual_seed(0)
    fan_out = 16 if halve else 8
    ours = Block(CNNConfig(), 8, fan_out, halve)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)) if halve else None
    theirs = BasicBlock(8, fan_out, stride=2 if halve else 1, downsample=downsample)
    copy_block(theirs, ours)
    images = torch.randn(4, 8, 13, 13)
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_the_default_network_is_torchvisions_resnet_with_a_smaller_stem():
    """Its 64 channels, doubled from layer to layer, and a block a layer: the same logits and the same gradients."""
    ours = CNN(CNNConfig(width=64)).eval()
    theirs = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.MaxPool2d(2)
    pairs = [(theirs.conv1, ours.stem.conv), (theirs.bn1, ours.stem.norm), (theirs.fc, ours.head)]
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    for number, layer in enumerate(ours.layers, start=1):
        copy_block(getattr(theirs, f"layer{number}")[0], layer[0])
    images = torch.randn(2, 1, 28, 28, requires_grad=True)
    logits = [network(images) for network in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(output.square().sum(), images)[0] for output in logits]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("growth", "channels", "sides"),
    [
        ("double", (3, 6, 12, 24), (14, 7, 4, 2)),
        ("quadruple", (3, 12, 48, 192), (14, 7, 4, 2)),
        ("constant", (3, 3, 3, 3), (14, 7, 4, 2)),
        ("flat", (3, 3, 3, 3), (14, 14, 14, 14)),
    ],
)
def test_growth_gives_each_layer_its_channels_and_its_size(growth, channels, sides, pooled):
    if pooled and growth == "flat":
        return
    model = CNN(CNNConfig(width=3, depth=5, growth=growth, pool_everywhere=pooled))
    x = model.stem(torch.randn(2, 1, 28, 28))
    assert x.shape == (2, 3, 14, 14)
    for layer, count, side in zip(model.layers, channels, sides, strict=True):
        x = layer(x)
        assert x.shape == (2, count, side, side)
    assert model.config.channels == channels
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_the_shortcut_is_the_identity_exactly_where_shapes_agree():
    kinds = {
        growth: [isinstance(layer[0].shortcut, nn.Identity) for layer in CNN(CNNConfig(width=4, growth=growth)).layers]
        for growth in GROWTHS
    }
    first_only = [True, False, False, False]
    assert kinds == {"double": first_only, "quadruple": first_only, "constant": first_only, "flat": [True] * 4}
    pooled = CNN(CNNConfig(width=4, growth="constant", pool_everywhere=True))
    assert all(isinstance(layer[0].shortcut, nn.Identity) for layer in pooled.layers)


@pytest.mark.parametrize(
    ("size", "sides"), [((28, 28), (14, 14, 7, 4, 2)), ((8, 8), (4, 4, 2, 1, 1)), ((33, 33), (17, 17, 9, 5, 3))]
)
@pytest.mark.parametrize(("pool", "everywhere"), [*product(POOLS, [False]), ("max", True), ("average", True)])
def test_each_layer_doubles_the_channels_and_halves_the_image(size, sides, pool, everywhere):
    model = CNN(CNNConfig(width=4, pool=pool, pool_everywhere=everywhere))
    x = model.stem(torch.randn(2, 1, *size))
    assert x.shape == (2, 4, sides[0], sides[0])
    for layer, (block, side) in enumerate(zip(model.layers, sides[1:], strict=True)):
        x = block(x)
        assert x.shape == (2, 4 * 2**layer, side, side)
    assert model(torch.randn(3, 1, *size)).shape == (3, 10)


def test_max_pooling_stands_once_in_the_default_network():
    assert sum(isinstance(module, nn.MaxPool2d) for module in CNN().modules()) == 1
    assert sum(isinstance(module, nn.MaxPool2d) for module in CNN(CNNConfig(pool_everywhere=True)).modules()) == 4


def test_pooling_before_norm_and_relu_changes_nothing_for_positive_gammas():
    stem = CNN().stem.eval()
    images = torch.randn(8, 1, 28, 28)
    usual = stem.pool(stem.activation(stem.norm(stem.conv(images))))
    torch.testing.assert_close(stem(images), usual)


def test_oblong_and_colour_images():
    assert CNN(CNNConfig(in_channels=3, num_classes=7, width=4))(torch.randn(2, 3, 20, 41)).shape == (2, 7)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_a_step(norm):
    model = CNN(CNNConfig(width=6, norm=norm))
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_layer_norm_is_torchs_layer_norm_over_each_image():
    norm = CNN(CNNConfig(width=6, norm="layer")).stem.norm
    x = torch.randn(5, 6, 9, 9)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, x.shape[1:]))


@pytest.mark.parametrize("depth", [4, 5, 10, 100])
def test_depth_counts_blocks_of_two_convolutions(depth):
    config = CNNConfig(width=1, depth=depth)
    model = CNN(config)
    main_path = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(main_path) + 1 == config.weighted_layers == 2 * depth + 2
    assert sum(config.blocks) == depth
    assert max(config.blocks) - min(config.blocks) <= 1


def test_without_residual_the_network_is_a_chain():
    model = CNN(CNNConfig(width=4, residual=False, norm="none"))
    block = model.layers[1][0]
    x = torch.randn(2, 4, 14, 14)
    torch.testing.assert_close(block(x), block.conv2(block.conv1(x).relu()).relu())
    assert not any("shortcut" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("where", "values", "channels"), [("none", 0, 0), ("head", 1, 0), ("everywhere", 5, 0), ("channels", 1, 4)]
)
def test_dropout_stands_where_it_is_asked_for(where, values, channels):
    model = CNN(CNNConfig(dropout=0.0 if where == "none" else 0.3, dropout_where=where))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == values
    assert sum(isinstance(module, nn.Dropout2d) for module in model.modules()) == channels
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_scaled_residual_branches_keep_the_variance_at_any_depth(norm):
    """Along a layer of 25 blocks the second moment grows 25 times (batch norm) or 2²⁵ times; scaled, by less than e."""
    growth = {}
    for scaled in (True, False):
        torch.manual_seed(0)
        layer = CNN(CNNConfig(width=16, depth=100, norm=norm, activation="leaky_relu", scale_residual=scaled)).layers[0]
        x = torch.randn(16, 16, 14, 14)
        growth[scaled] = (layer(x).var() / x.var()).item()
    assert growth[True] < 4
    assert growth[False] > 6


@pytest.mark.parametrize("init", ["he", "default"])
def test_scaled_residual_branches_without_a_norm_begin_at_their_share(init):
    """PyTorch's own initialization does not begin the biases at 0."""
    branches = {}
    for scaled in (True, False):
        config = CNNConfig(width=8, depth=10, norm="none", init=init, scale_residual=scaled)
        torch.manual_seed(0)
        block = CNN(config).layers[0][0]
        block.conv2.register_forward_hook(lambda *args, scaled=scaled: branches.update({scaled: args[2]}))
        block(torch.ones(1, 8, 14, 14))
    shares = len(CNN(config).layers[0])
    torch.testing.assert_close(shares * branches[True], branches[False])


def test_residual_scale_leaves_other_networks_alone():
    for config in (CNNConfig(), CNNConfig(depth=10, residual=False), CNNConfig(depth=10, scale_residual=False)):
        norms = [module for module in CNN(config).modules() if isinstance(module, nn.BatchNorm2d)]
        assert all((norm.weight == 1).all() for norm in norms)


def weights(init: str | float, activation: str = "relu") -> torch.Tensor:
    torch.manual_seed(0)
    return CNN(CNNConfig(width=32, init=init, activation=activation)).layers[3][0].conv2.weight


@pytest.mark.parametrize(
    ("init", "reference"),
    [
        ("he", lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        ("xavier", nn.init.xavier_normal_),
        ("default", lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5))),
        (0.7, lambda w: nn.init.normal_(w, std=0.7 / math.sqrt(w[0].numel()))),
    ],
)
def test_initial_weights_have_torchs_distribution(init, reference):
    ours = weights(init)
    theirs = reference(torch.empty_like(ours))
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.01)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)


def test_default_init_is_what_pytorch_draws():
    """The same bits, when PyTorch's layer is made with the seed of that layer."""
    torch.manual_seed(0)
    ours = CNN(CNNConfig(init="default")).stem.conv.weight
    torch.manual_seed(0)
    torch.manual_seed(int(torch.randint(2**62, ())) ^ zlib.crc32(b"stem.conv"))
    assert torch.equal(ours, nn.Conv2d(1, 32, 3, bias=False).weight)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "none"},
        {"norm": "group"},
        {"residual": False},
        {"depth": 8},
        {"num_classes": 3},
        {"dropout": 0.1, "dropout_where": "everywhere"},
        {"pool": "average"},
    ],
)
def test_networks_of_one_seed_start_alike_where_shapes_agree(change):
    """Whatever else changes: then runs of the same seed are pairs."""
    models = []
    for config in (CNNConfig(scale_residual=False), CNNConfig(scale_residual=False, **change)):
        torch.manual_seed(5)
        models.append(dict(CNN(config).named_parameters()))
    shared = [n for n, w in models[0].items() if n in models[1] and models[1][n].shape == w.shape]
    assert len([name for name in shared if "conv" in name]) == 9
    for name in shared:
        assert torch.equal(models[0][name], models[1][name]), name


@pytest.mark.parametrize("growth", ["quadruple", "constant", "flat"])
def test_networks_of_one_seed_start_alike_up_to_where_their_channels_part(growth):
    weights = []
    for config in (CNNConfig(width=4), CNNConfig(width=4, growth=growth)):
        torch.manual_seed(5)
        weights.append(dict(CNN(config).named_parameters()))
    shared = [name for name in weights[0] if name.startswith(("stem", "layers.0")) and "conv" in name]
    assert len(shared) == 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in shared)


def test_he_xavier_and_gains_scale_the_same_draw():
    draws = [weights(init) for init in ("he", "xavier", 0.3)]
    for other in draws[1:]:
        torch.testing.assert_close(draws[0] / draws[0].std(), other / other.std(), rtol=1e-4, atol=1e-5)


def test_layers_of_one_shape_and_networks_of_two_seeds_differ():
    torch.manual_seed(5)
    first = CNN(CNNConfig()).layers[0][0]
    assert not torch.equal(first.conv1.weight, first.conv2.weight)
    assert not torch.equal(first.conv1.weight, CNN(CNNConfig()).layers[0][0].conv1.weight)


def test_table_counts_what_the_formulas_give():
    rows = {name: (shape, parameters, flops) for name, shape, parameters, flops, _ in parts(CNN(), 28)}
    assert rows["layer 1"] == ((32, 14, 14), 2 * (9 * 32 * 32 + 2 * 32), 2 * 2 * 9 * 32 * 32 * 14 * 14)
    assert (
        rows["stem"][2] == 2 * 9 * 32 * 28 * 28
    )  # the convolution runs at full size, the pooling after it is not counted
    assert rows["layer 4"][2] == 2 * 2 * 2 * (9 * 128 * 256 + 9 * 256 * 256 + 128 * 256)
    assert sum(row[1] for row in rows.values()) == sum(weight.numel() for weight in CNN().parameters())
    printed = str(CNN())
    assert "1,228,394" in printed
    assert "27,981,824" in printed


def counted(growth: str, sides: tuple[int, ...]) -> tuple[int, int]:
    """FLOPs and parameters of `CNN(CNNConfig(width=6, growth=growth))` by the formulas, `sides` of the layers' maps."""
    convs = [(1, 6, 9, 2 * sides[0])]  # channels in and out, taps, side of the map; the stem's is not pooled yet
    c_in, before = 6, sides[0]
    for layer, side in enumerate(sides):
        c_out = 6 * {"double": 2, "quadruple": 4, "constant": 1, "flat": 1}[growth] ** layer
        convs += [(c_in, c_out, 9, side), (c_out, c_out, 9, side)]
        convs += [(c_in, c_out, 1, side)] if (c_in, before) != (c_out, side) else []
        c_in, before = c_out, side
    weights = sum(a * b * taps for a, b, taps, _ in convs)
    norms = sum(2 * b for _, b, _, _ in convs)  # γ and β of each convolution's channels
    flops = sum(2 * a * b * taps * side**2 for a, b, taps, side in convs)
    return flops + 2 * 10 * c_in, weights + norms + 10 * c_in + 10


@pytest.mark.parametrize(("size", "halved"), [(28, (14, 7, 4, 2)), (32, (16, 8, 4, 2))])
@pytest.mark.parametrize("growth", GROWTHS)
def test_table_counts_what_the_formulas_give_for_every_growth(growth, size, halved):
    rows = list(parts(CNN(CNNConfig(width=6, growth=growth)), size))
    sides = halved if growth != "flat" else halved[:1] * 4
    assert (sum(row[3] for row in rows), sum(row[2] for row in rows)) == counted(growth, sides)
    assert [row[1][1:] for row in rows[1:5]] == [(side, side) for side in sides]


def test_doubling_keeps_the_flops_of_a_convolution_where_the_image_halves_exactly():
    """The second convolution of every block, at 32×32; at 28×28 the step from 7 to 4 makes it 64 / 49 of that."""
    flops = {size: {row[0]: row[3] for row in parts(CNN(CNNConfig(width=8)), size)} for size in (32, 28)}
    assert flops[32]["layer 2"] == flops[32]["layer 3"] == flops[32]["layer 4"]
    assert flops[28]["layer 3"] / flops[28]["layer 2"] == 64 / 49
    assert flops[28]["layer 4"] == flops[28]["layer 3"]


@pytest.mark.parametrize(
    ("growth", "everywhere"), [*product(GROWTHS, [False]), ("double", True), ("quadruple", True), ("constant", True)]
)
def test_receptive_field_is_what_the_gradient_reaches(growth, everywhere):
    config = CNNConfig(width=1, growth=growth, norm="none", pool="average", pool_everywhere=everywhere)
    model = CNN(config).eval()
    for weight in model.parameters():
        nn.init.constant_(weight, 0.1)
    images = torch.ones(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    x = model.double().stem(images)
    fields = receptive_fields(model)
    for index, layer in enumerate(model.layers):
        x = layer(x)
        (gradient,) = torch.autograd.grad(x[0, 0, x.shape[2] // 2, x.shape[3] // 2], images, retain_graph=True)
        reached = (gradient[0, 0] != 0).any(dim=0).sum().item()
        assert reached == fields[f"layers.{index}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", 0),
        ("num_classes", 1),
        ("width", -3),
        ("width", 2.5),
        ("growth", "triple"),
        ("growth", ["double"]),
        ("growth", 2),
        ("depth", 3),
        ("depth", True),
        ("residual", "yes"),
        ("norm", "bathc"),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", 0.5),  # without a place
        ("dropout_where", "head"),  # without a rate
        ("init", "kaiming"),
        ("init", 0.0),
        ("init", float("nan")),
        ("pool", "min"),
        ("activation", "swish"),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*") as error:
        CNNConfig(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("pool", "stride"), ("growth", "flat")])
def test_config_refuses_pooling_everywhere_where_nothing_is_pooled(field, value):
    with pytest.raises(ValueError, match=rf"pool_everywhere=True with {field}='{value}'"):
        CNNConfig(pool_everywhere=True, **{field: value})


@pytest.mark.parametrize(
    ("shape", "words"), [((2, 1, 7, 28), "7×28"), ((2, 3, 28, 28), "in_channels=1"), ((1, 28, 28), "N×1×H×W")]
)
def test_forward_refuses_images_it_cannot_take(shape, words):
    with pytest.raises(ValueError, match=words):
        CNN()(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("config", "size"), [({"width": 8, "growth": "constant"}, 16), ({"width": 1}, 8)])
def test_group_norm_of_single_numbers_is_refused(config, size, training):
    """It would turn all into zero, and the network's answer into one and the same for all images."""
    model = CNN(CNNConfig(norm="group", **config)).train(training)
    with pytest.raises(ValueError, match=r"leave one value a channel in layer \d, .* too little for group norm"):
        model(torch.randn(4, 1, size, size))
    assert model(torch.randn(4, 1, 32, 32)).std(0).min() > 0
