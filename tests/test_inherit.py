"""Inheriting parameters between networks of one family: what is copied, in which share, and that it fits together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import floor

import pytest
import torch
from families import VGG, Depthwise, ResNet, Tokens, Untraceable, ViT, mlp, randomized, state, transformer
from torch import nn

from transferops.adapt import InheritanceReport, inherit
from transferops.adapt.masks import GRANULARITIES, SELECTIONS

Make = Callable[[], nn.Module]


# Target, upstream, and whether all shapes agree.
PAIRS: dict[str, tuple[Make, Make, bool]] = {
    "resnet": (lambda: ResNet([1, 2]), lambda: ResNet([1, 2]), True),
    "resnet narrower": (lambda: ResNet([1, 1], 8), lambda: ResNet([1, 1], 12), False),
    "resnet wider": (lambda: ResNet([1, 1], 12), lambda: ResNet([1, 1], 8), False),
    "resnet deeper": (lambda: ResNet([2, 3]), lambda: ResNet([1, 2]), False),
    "resnet shallower": (lambda: ResNet([1, 2]), lambda: ResNet([2, 4]), False),
    "resnet channels, classes": (lambda: ResNet([1, 1], channels=1, classes=3), lambda: ResNet([1, 1]), False),
    "bottleneck": (lambda: ResNet([1, 1], bottleneck=True), lambda: ResNet([1, 1], bottleneck=True), True),
    "bottleneck smaller": (
        lambda: ResNet([1, 1], 4, bottleneck=True),
        lambda: ResNet([2, 2], 8, bottleneck=True),
        False,
    ),
    "vgg": (lambda: VGG([1, 2]), lambda: VGG([1, 2]), True),
    "vgg narrower": (lambda: VGG([1, 1], 8), lambda: VGG([1, 1], 12, channels=1), False),
    "vgg deeper, wider": (lambda: VGG([2, 2], 12), lambda: VGG([1, 2], 8), False),
    "vgg without norm": (lambda: VGG([1, 1], norm=False), lambda: VGG([1, 2], norm=False), False),
    "vit": (lambda: ViT(), lambda: ViT(), True),
    "vit fewer heads": (lambda: ViT(heads=2), lambda: ViT(heads=4), False),
    "vit deeper, more heads": (lambda: ViT(depth=4, heads=4), lambda: ViT(depth=2, heads=2), False),
    "vit narrower heads": (lambda: ViT(head_width=4), lambda: ViT(head_width=8), False),
    "vit patches, channels": (lambda: ViT(patch=2, channels=1), lambda: ViT(patch=4), False),
    "transformer": (lambda: transformer(16, 2, 2), lambda: transformer(16, 2, 2), True),
    "transformer smaller": (lambda: transformer(16, 2, 1), lambda: transformer(32, 4, 3), False),
    "mlp": (lambda: mlp(6, 16, 16, 5, norm=True), lambda: mlp(6, 16, 16, 5, norm=True), True),
    "mlp shallower": (lambda: mlp(6, 16, 16, 5), lambda: mlp(6, 24, 24, 24, 5), False),
    "mlp deeper": (lambda: mlp(6, 16, 16, 16, 5, norm=True), lambda: mlp(6, 8, 8, 5, norm=True), False),
    "untraceable": (lambda: Untraceable(), lambda: Untraceable(12, depth=3), False),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, bool]:
    """Both networks with all tensors random, statistics included."""
    torch.manual_seed(0)
    target, upstream, same = PAIRS[name]
    return randomized(target()), randomized(upstream()), same


def scores_for(select: str, upstream: nn.Module) -> dict[str, torch.Tensor] | None:
    if select != "fisher":
        return None
    return {name: torch.rand(parameter.shape) for name, parameter in upstream.named_parameters()}


def check_accounted(report: InheritanceReport, model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every tensor is reported, finite, and unchanged where the mask says so."""
    after = state(model)
    assert [tensor.name for tensor in report.tensors] == list(after)
    for tensor in report.tensors:
        mask, value = report.masks[tensor.name], after[tensor.name]
        assert tuple(mask.shape) == tensor.shape == tuple(value.shape)
        assert value.isfinite().all()
        assert (tensor.copied, tensor.total) == (int(mask.sum()), value.numel())
        assert torch.equal(value[~mask], before[tensor.name][~mask])
        assert tensor.copied == 0 or tensor.source is not None
        assert tensor.copied == tensor.total or report.alpha < 1 or tensor.note or value.ndim == 0


@pytest.mark.parametrize("name", PAIRS)
class TestPairs:
    def test_nothing(self, name: str) -> None:
        target, upstream, _ = pair(name)
        before = state(target)
        for granularity in GRANULARITIES:
            report = inherit(target, upstream, 0, granularity)
            assert report.copied == 0
            check_accounted(report, target, before)
            assert all(torch.equal(value, before[key]) for key, value in state(target).items())

    def test_everything(self, name: str) -> None:
        target, upstream, same = pair(name)
        before = state(target)
        results = []
        for granularity in GRANULARITIES:
            model = copy.deepcopy(target)
            report = inherit(model, upstream.state_dict(), 1, granularity, "uniform")
            check_accounted(report, model, before)
            results.append(state(model))
            if same:
                assert report.copied == report.total
                assert all(torch.equal(results[-1][key], value) for key, value in upstream.state_dict().items())
        for other in results[1:]:  # at alpha = 1 the granularity makes no difference
            assert all(torch.equal(other[key], value) for key, value in results[0].items())
        assert report.copied > 0

    def test_a_part(self, name: str) -> None:
        target, upstream, _ = pair(name)
        first = list(PAIRS).index(name)  # every granularity meets every selection on some pair
        for number, granularity in enumerate(GRANULARITIES):
            select = SELECTIONS[(first + number) % len(SELECTIONS)]
            model, before = copy.deepcopy(target), state(target)
            report = inherit(model, upstream, 0.5, granularity, select, fisher=scores_for(select, upstream))
            check_accounted(report, model, before)
            assert 0 < report.copied < report.total


@pytest.mark.parametrize(
    ("name", "other"), [("resnet10t", "resnet18"), ("vit_tiny_patch16_224", "vit_small_patch16_224")]
)
def test_models_of_timm(name: str, other: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    target, upstream = timm.create_model(name, num_classes=3), timm.create_model(other, num_classes=5)
    for alpha in (0.0, 0.5, 1.0):
        before = state(target)
        check_accounted(inherit(target, upstream, alpha), target, before)
        assert alpha or all(torch.equal(value, before[key]) for key, value in state(target).items())
    report = inherit(timm.create_model(other, num_classes=5), upstream, 1.0)
    assert report.copied == report.total


class TestCoherence:
    @pytest.mark.parametrize(
        ("small", "wide", "shape"),
        [
            (lambda: ResNet([1, 2], 8), lambda: ResNet([1, 2], 12), (4, 3, 8, 8)),
            (lambda: ResNet([1, 1], 4, bottleneck=True), lambda: ResNet([1, 1], 6, bottleneck=True), (4, 3, 8, 8)),
            (lambda: VGG([1, 2], 8), lambda: VGG([1, 2], 12), (4, 3, 8, 8)),
            (lambda: mlp(6, 16, 16, 5, norm=True), lambda: mlp(6, 24, 24, 5, norm=True), (4, 6)),
            (lambda: Depthwise(8), lambda: Depthwise(12), (4, 3, 8, 8)),
            (lambda: Untraceable(8), lambda: Untraceable(12), (4, 6)),
        ],
    )
    def test_function_survives_widening_and_narrowing(self, small: Make, wide: Make, shape: tuple[int, ...]) -> None:
        """Beside dead channels, in any order, the inherited ones compute what they did upstream.

        This holds only if every layer reads the channels that the layers before it make: residual sums, flattened
        maps and norms included.
        """
        torch.manual_seed(1)
        upstream = randomized(small()).eval()
        images = torch.randn(shape)
        wider = wide().eval()
        with torch.no_grad():
            for parameter in wider.parameters():
                parameter.zero_()
        inherit(wider, upstream, 1.0)
        torch.testing.assert_close(wider(images), upstream(images))
        narrow = randomized(small()).eval()
        inherit(narrow, wider, 1.0, "filter", "magnitude")
        torch.testing.assert_close(narrow(images), upstream(images))

    def test_heads_stay_whole(self) -> None:
        """Four heads of which the first and last are dead: by magnitude the two others are taken, q, k and v alike."""
        torch.manual_seed(2)
        target, upstream = ViT(heads=2).blocks[0].attn, ViT(heads=4).blocks[0].attn
        with torch.no_grad():
            rows = upstream.qkv.weight.view(3, 4, 8, 32)
            rows[:, [0, 3]] = 0
            upstream.proj.weight.view(32, 4, 8)[:, [0, 3]] = 0
            upstream.qkv.bias.view(3, 4, 8)[:, [0, 3]] = 0
        inherit(target, upstream, 1.0, "filter", "magnitude")
        taken = target.qkv.bias.view(3, 2, 8)
        assert torch.equal(taken, upstream.qkv.bias.view(3, 4, 8)[:, 1:3])

    def test_equal_shapes_are_copied_whatever_the_heads(self) -> None:
        target, upstream = ViT(heads=2, head_width=16), ViT(heads=4, head_width=8)
        assert inherit(target, upstream, 1.0).copied == inherit(target, upstream.state_dict(), 1.0).total
        assert all(torch.equal(value, target.state_dict()[name]) for name, value in upstream.state_dict().items())

    def test_filter_masks(self) -> None:
        """A channel brings rows, norm and next slices; a residual stage has one set of channels."""
        torch.manual_seed(3)
        target = ResNet([2, 1])
        report = inherit(target, randomized(ResNet([2, 1])), 0.5, "filter", "random", 4)
        masks = report.masks
        stream, inner = masks["bn1.weight"], masks["layer1.0.bn1.weight"]
        assert int(stream.sum()) == int(inner.sum()) == 4
        for name in ("bn1.running_mean", "bn1.running_var", "bn1.bias", "layer1.0.bn2.weight", "layer1.1.bn2.bias"):
            assert torch.equal(masks[name], stream)
        assert torch.equal(masks["conv1.weight"], stream.view(8, 1, 1, 1).expand(8, 3, 3, 3))
        both = (inner.view(8, 1, 1, 1) | stream.view(1, 8, 1, 1)).expand(8, 8, 3, 3)
        assert torch.equal(masks["layer1.0.conv1.weight"], both)
        last = masks["layer2.0.downsample.1.weight"]
        assert torch.equal(masks["fc.weight"], masks["fc.bias"][:, None] | last[None])
        assert not torch.equal(stream, inner)

    def test_flattened_channels(self) -> None:
        report = inherit(VGG([1], 4), VGG([1], 4), 0.5)
        channels, hidden = report.masks["features.1.weight"], report.masks["classifier.0.bias"]
        expected = hidden[:, None] | channels.repeat_interleave(16)[None]
        assert torch.equal(report.masks["classifier.0.weight"], expected)

    def test_layers_and_blocks(self) -> None:
        report = inherit(ResNet([1, 2]), ResNet([1, 2]), 0.5, "layer")
        whole = {name for name, mask in report.masks.items() if mask.all()}
        assert {n for n, m in report.masks.items() if m.any()} == whole
        for name in whole:
            if "conv" in name:
                norm = name.replace("conv", "bn")
                assert {norm, norm.replace("weight", "running_var")} <= whole
        report = inherit(ResNet([1, 2]), ResNet([1, 2]), 0.5, "block", "uniform")
        blocks = {name.rsplit(".", 2)[0] if "layer" in name else "" for name, m in report.masks.items() if m.all()}
        assert sum(mask.any().item() for mask in report.masks.values()) > 0
        assert all(mask.all() or not mask.any() for mask in report.masks.values())
        assert blocks - {""}

    def test_statistics_of_a_norm_share_a_mask(self) -> None:
        report = inherit(ResNet([1]), ResNet([1]), 0.5, "element")
        assert torch.equal(report.masks["bn1.running_mean"], report.masks["bn1.running_var"])
        assert 0 < report.masks["bn1.running_var"].sum() < 8
        assert not report.masks["bn1.num_batches_tracked"]

    def test_kernels_are_centred(self) -> None:
        target, upstream = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5)
        inherit(target, upstream, 1.0)
        assert torch.equal(target.weight, upstream.weight[:, :, 1:4, 1:4])
        before = upstream.weight.clone()
        inherit(upstream, randomized(target), 1.0)
        assert torch.equal(upstream.weight[:, :, 1:4, 1:4], target.weight)
        assert torch.equal(upstream.weight[:, :, 0], before[:, :, 0])

    def test_a_channel_goes_with_all_that_makes_and_reads_it(self) -> None:
        masks = inherit(Tokens(), Tokens(), 0.5, "filter").masks
        stream = masks["norm.weight"]
        assert 0 < int(stream.sum()) < len(stream)
        for name in ("norm.bias", "query", *(f"encoder.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))):
            assert torch.equal(masks[name].flatten(), stream), name
        assert torch.equal(masks["embedding.weight"], stream.expand(10, 8))
        for makes in ("encoder.self_attn.out_proj", "encoder.linear2"):
            assert torch.equal(masks[f"{makes}.bias"], stream), makes
        for reads, own in (("key.weight", "key.bias"), ("encoder.linear1.weight", "encoder.linear1.bias")):
            assert torch.equal(masks[reads], masks[own].unsqueeze(1) | stream), reads


class TestSelection:
    def test_counts_and_nesting(self) -> None:
        for select in ("random", "magnitude"):
            smaller = None
            for alpha in (0.1, 0.25, 0.5, 0.75):
                torch.manual_seed(0)
                target, upstream = nn.Linear(7, 11), nn.Linear(7, 11)
                mask = inherit(target, upstream, alpha, "element", select, 3).masks["weight"]
                assert int(mask.sum()) == floor(alpha * 77 + 0.5)
                assert smaller is None or bool((mask | ~smaller).all())
                smaller = mask

    def test_seeds(self) -> None:
        def masks(seed: int) -> torch.Tensor:
            return inherit(nn.Linear(9, 9), nn.Linear(9, 9), 0.5, "element", "random", seed).masks["weight"]

        assert torch.equal(masks(1), masks(1))
        assert not torch.equal(masks(1), masks(2))

    def test_the_global_generator_is_left_alone(self) -> None:
        target, upstream = ResNet([1]), ResNet([1])
        before = torch.get_rng_state()
        inherit(target, upstream, 0.5)
        assert torch.equal(torch.get_rng_state(), before)

    def test_largest_first(self) -> None:
        upstream = nn.Linear(2, 4)
        with torch.no_grad():
            upstream.weight.copy_(torch.tensor([[0.0, 1.0], [9.0, 1.0], [0.0, 2.0], [-8.0, 8.0]]))
            upstream.bias.zero_()
        assert inherit(nn.Linear(2, 4), upstream, 0.5, "filter", "magnitude").masks["bias"].tolist() == [0, 1, 0, 1]
        scores = {"weight": torch.zeros(4, 2), "bias": torch.tensor([3.0, 0.0, 2.0, 1.0])}
        report = inherit(nn.Linear(2, 4), upstream, 0.5, "filter", "fisher", fisher=scores)
        assert report.masks["bias"].tolist() == [1, 0, 1, 0]
        assert inherit(nn.Linear(2, 4), upstream, 0.5, "filter", "uniform").masks["bias"].tolist() == [0, 1, 0, 1]

    def test_narrower_takes_the_preferred_channels(self) -> None:
        upstream = mlp(3, 6, 2)
        with torch.no_grad():
            upstream[0].weight.mul_(torch.tensor([1.0, 50.0, 1.0, 50.0, 50.0, 1.0])[:, None])
        target = mlp(3, 3, 2)
        inherit(target, upstream, 1.0, "filter", "magnitude")
        assert torch.equal(target[0].weight, upstream[0].weight[[1, 3, 4]])
        assert torch.equal(target[2].weight, upstream[2].weight[:, [1, 3, 4]])

    def test_fisher_from_batches(self) -> None:
        torch.manual_seed(0)
        upstream = mlp(3, 6, 2)
        inputs = torch.randn(32, 3) * torch.tensor([10.0, 0.1, 0.1])
        batches = [(inputs, torch.randint(2, (32,)))]
        mask = inherit(mlp(3, 6, 2), upstream, 1 / 3, "element", "fisher", batches=batches).masks["0.weight"]
        assert mask[:, 0].float().mean() > mask[:, 1:].float().mean()
