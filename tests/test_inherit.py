"""Inheriting parameters between networks of one family: what is copied, what is not, and that it fits together."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from math import floor

import pytest
import torch
from families import VGG, ResNet, Untraceable, ViT, mlp
from torch import nn

from transferops.adapt import InheritanceReport, freeze, inherit, load_matching
from transferops.adapt.channel_graph import structure_of
from transferops.adapt.masks import GRANULARITIES, SELECTIONS
from transferops.adapt.matching import match_names

Make = Callable[[], nn.Module]


def transformer(width: int, heads: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, width), encoder, nn.Linear(width, 5))


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


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if name.endswith("var") else torch.randn(tensor.shape) / 3)
            else:
                tensor.fill_(int(torch.randint(1, 9, ())))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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


class TestCoherence:
    @pytest.mark.parametrize(
        ("small", "wide", "shape"),
        [
            (lambda: ResNet([1, 2], 8), lambda: ResNet([1, 2], 12), (4, 3, 8, 8)),
            (lambda: ResNet([1, 1], 4, bottleneck=True), lambda: ResNet([1, 1], 6, bottleneck=True), (4, 3, 8, 8)),
            (lambda: VGG([1, 2], 8), lambda: VGG([1, 2], 12), (4, 3, 8, 8)),
            (lambda: mlp(6, 16, 16, 5, norm=True), lambda: mlp(6, 24, 24, 5, norm=True), (4, 6)),
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


class TestMatching:
    def test_same_numbers_go_by_name(self) -> None:
        shapes = {"blocks.0.w": (2, 2), "blocks.1.w": (2, 3)}
        assert match_names(shapes, shapes) == {name: name for name in shapes}

    @pytest.mark.parametrize(
        ("here", "there", "expected"), [(3, 6, [0, 3, 5]), (6, 3, [0, 0, 1, 1, 2, 2]), (1, 4, [0]), (4, 1, [0] * 4)]
    )
    def test_blocks_are_rescaled(self, here: int, there: int, expected: list[int]) -> None:
        target = {f"blocks.{i}.fc.weight": (4, 8) for i in range(here)}
        upstream = {f"blocks.{i}.fc.weight": (4, 8) for i in range(there)}
        pairs = match_names(target, upstream)
        # round(i (m-1)/(n-1)), halves up
        assert [int(pairs[name].split(".")[1]) for name in target] == expected

    def test_blocks_of_another_kind_are_anchors(self) -> None:
        pairs = match_names(shapes_of(ResNet([1, 3])), shapes_of(ResNet([1, 2])))
        matched = {
            name.split(".conv1")[0]: source.split(".conv1")[0] for name, source in pairs.items() if "conv1" in name
        }
        assert matched["layer2.0"] == "layer2.0"
        assert matched["layer2.1"] == matched["layer2.2"] == "layer2.1"

    def test_convolutions_keep_their_norms(self) -> None:
        pairs = match_names(shapes_of(VGG([1, 2])), shapes_of(VGG([2, 3])))
        for name, source in pairs.items():
            if name.startswith("features") and name.endswith("running_mean"):
                number, other = int(name.split(".")[1]) - 1, int(source.split(".")[1]) - 1
                assert pairs[f"features.{number}.weight"] == f"features.{other}.weight"

    def test_first_and_last_layers(self) -> None:
        pairs = match_names(shapes_of(mlp(6, 16, 5)), shapes_of(mlp(6, 16, 16, 16, 5)))
        assert pairs["0.weight"] == "0.weight"
        assert pairs["2.weight"] == "6.weight"

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_wrappers(self, prefix: str) -> None:
        upstream = {f"{prefix}{name}": tensor for name, tensor in ResNet([1]).state_dict().items()}
        report = load_matching(ResNet([1]), upstream)
        assert report.copied == report.total


class TestReport:
    def test_text_and_dictionary(self) -> None:
        import json

        report = load_matching(ResNet([1, 1], 8, classes=3), ResNet([2, 1], 12).state_dict())
        text = str(report)
        assert "conv1.weight" in text
        assert "8x3x3x3 <- 12x3x3x3" in text
        assert "3 outputs here, 5 upstream" in text
        assert "not used upstream: layer1.1.conv1.weight" in text
        document = json.loads(json.dumps(report.to_dict()))
        assert document["copied"] == report.copied < document["total"] == report.total
        assert len(document["tensors"]) == len(report.tensors)

    def test_masks_survive_a_file(self) -> None:
        report = inherit(mlp(3, 4, 2), mlp(3, 4, 2), 0.5)
        buffer = io.BytesIO()
        torch.save(report.masks, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert all(torch.equal(loaded[name], mask) for name, mask in report.masks.items())

    def test_shared_tensors_count_once(self) -> None:
        def tied() -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].weight = model[0].weight
            return model

        target, upstream = tied(), tied()
        report = inherit(target, upstream, 1.0)
        assert report.total == 16 + 4 + 4
        assert report.copied == report.total
        assert next(t for t in report.tensors if t.name == "1.weight").note == "the same tensor as 0.weight"

    def test_graph_that_cannot_be_followed(self) -> None:
        structure = structure_of(Untraceable())
        assert not structure.traced
        report = inherit(Untraceable(), Untraceable(), 0.5)
        assert "could not be followed" in str(report)
        assert torch.equal(report.masks["stem.bias"], report.masks["blocks.1.bias"])


class TestDtypes:
    def test_conversion(self) -> None:
        upstream = mlp(3, 4, 2).double()
        target = mlp(3, 4, 2)
        report = load_matching(target, upstream.state_dict())
        assert target[0].weight.dtype == torch.float32
        assert torch.equal(target[0].weight, upstream[0].weight.float())
        assert "converted from float64" in str(report)
        half = mlp(3, 4, 2).half()
        load_matching(half, target.state_dict())
        assert torch.equal(half[0].weight, target[0].weight.half())

    def test_overflow_is_refused_and_nothing_written(self) -> None:
        upstream = mlp(3, 4, 2)
        with torch.no_grad():
            upstream[2].weight[0, 0] = 1e30
        target = mlp(3, 4, 2).half()
        before = state(target)
        message = r"upstream_state in float16: expected finite numbers, got inf in '2.weight' at \[0, 0\]"
        with pytest.raises(ValueError, match=message):
            inherit(target, upstream, 1.0)
        assert all(torch.equal(value, before[name]) for name, value in state(target).items())

    def test_kinds_do_not_mix(self) -> None:
        upstream = {"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}
        report = inherit(nn.Linear(3, 2), upstream, 1.0)
        assert [(t.copied, t.note) for t in report.tensors] == [(0, "float32 here, int64 upstream"), (2, "")]

    def test_tables_of_integers_are_not_cut(self) -> None:
        def model(entries: int) -> nn.Module:
            layer = nn.Linear(3, 3)
            layer.register_buffer("order", torch.randperm(entries))
            return layer

        target, upstream = model(5), model(5)
        assert not inherit(target, upstream, 0.5, "filter").masks["order"].any()
        assert inherit(target, upstream, 1.0, "filter").masks["order"].all()
        assert torch.equal(target.order, upstream.order)
        target = model(4)
        report = inherit(target, upstream, 1.0, "filter")
        assert target.order.sort().values.tolist() == [0, 1, 2, 3]
        assert report.tensors[-1].note == "a table of another shape upstream, [5]"

    @pytest.mark.gpu
    def test_devices(self) -> None:
        target, upstream = ResNet([1, 1]).cuda(), randomized(ResNet([1, 1], 12))
        plain = copy.deepcopy(target).cpu()
        inherit(target, upstream, 0.5, "filter", "magnitude")
        inherit(plain, copy.deepcopy(upstream).cuda(), 0.5, "filter", "magnitude")
        assert all(torch.equal(value, target.state_dict()[name].cpu()) for name, value in plain.state_dict().items())


class TestErrors:
    @pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, "half", None])
    def test_alpha(self, alpha: object) -> None:
        with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\]"):
            inherit(nn.Linear(2, 2), nn.Linear(2, 2), alpha)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"granularity": "channel"},
                "granularity: expected 'element' or 'filter' or 'layer' or 'block', got 'channel'",
            ),
            ({"select": "best"}, "select: expected 'random' or"),
            ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
            ({"select": "fisher"}, "fisher: expected a diagonal by name"),
            ({"select": "fisher", "fisher": {"x": torch.ones(2)}}, "fisher: expected names of upstream parameters"),
            (
                {"select": "fisher", "fisher": {"weight": torch.ones(2)}},
                r"fisher\['weight'\]: expected a tensor of shape",
            ),
            (
                {"select": "fisher", "fisher": {"bias": torch.tensor([1.0, float("inf")])}},
                "fisher: expected finite numbers, got inf in 'bias'",
            ),
        ],
    )
    def test_options(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            inherit(nn.Linear(2, 2), nn.Linear(2, 2), 0.5, **arguments)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_upstream_not_finite(self, value: float) -> None:
        upstream = mlp(3, 4, 2)
        with torch.no_grad():
            upstream[2].bias[1] = value
        target = mlp(3, 4, 2)
        before = state(target)
        with pytest.raises(ValueError, match=r"upstream_state: expected finite numbers, got .* in '2.bias' at \[1\]"):
            inherit(target, upstream, 1.0)
        assert all(torch.equal(v, before[name]) for name, v in state(target).items())

    def test_nothing_corresponds(self) -> None:
        with pytest.raises(ValueError, match="upstream_state: expected at least one tensor that corresponds"):
            inherit(mlp(3, 4, 2), {"other": torch.ones(3)}, 0.5)
        with pytest.raises(ValueError, match=r"weight: 2 dimensions here, 1 upstream"):
            inherit(nn.Linear(2, 2, bias=False), {"weight": torch.ones(3)}, 0.5)

    @pytest.mark.parametrize("upstream", [3, {"weight": 3}, {"epoch": 1, "state": {}}])
    def test_not_a_state(self, upstream: object) -> None:
        with pytest.raises(TypeError, match="upstream_state: expected"):
            inherit(nn.Linear(2, 2), upstream, 0.5)  # type: ignore[arg-type]

    def test_empty_state(self) -> None:
        with pytest.raises(ValueError, match="upstream_state: expected tensors by name, got none"):
            inherit(nn.Linear(2, 2), {}, 0.5)

    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"target: expected a torch\.nn\.Module"):
            inherit({"weight": torch.ones(2)}, nn.Linear(2, 2), 0.5)  # type: ignore[arg-type]

    def test_uninitialised_target(self) -> None:
        for model in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
            with pytest.raises(ValueError, match=r"target: expected initialised parameters, got '.*' without values"):
                inherit(model, nn.Linear(2, 2), 0.5)
        broken = nn.Linear(2, 2)
        with torch.no_grad():
            broken.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="target: expected finite numbers, got nan in 'weight'"):
            inherit(broken, nn.Linear(2, 2), 0.5)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def train_steps(model: nn.Module, steps: int = 3, decay: float = 0.1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=decay)
    model.train()
    for _ in range(steps):
        images = torch.randn(8, 3, 8, 8)
        loss = nn.functional.cross_entropy(model(images), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class TestFreeze:
    def test_masks(self) -> None:
        torch.manual_seed(0)
        model = ResNet([1, 1])
        report = inherit(model, randomized(ResNet([1, 1])), 0.5, "filter")
        before = state(model)
        with freeze(model, report.masks):
            train_steps(model)
        after = state(model)
        for name, mask in report.masks.items():
            assert torch.equal(after[name][mask], before[name][mask]), name
        moved = [
            name for name, mask in report.masks.items() if not torch.equal(after[name][~mask], before[name][~mask])
        ]
        assert {"conv1.weight", "bn1.running_mean", "bn1.running_var", "fc.weight"} <= set(moved)
        train_steps(model)
        assert not torch.equal(
            model.conv1.weight[report.masks["conv1.weight"]], before["conv1.weight"][report.masks["conv1.weight"]]
        )

    def test_momentum_from_before_does_not_move_it(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

        def step() -> None:
            optimizer.zero_grad()
            layer(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

        step()
        mask = torch.tensor([[True, False, True], [False, True, False]])
        before = layer.weight.detach().clone()
        frozen = freeze(layer, {"weight": mask})
        step()
        assert torch.equal(layer.weight[mask], before[mask])
        assert not torch.equal(layer.weight[~mask], before[~mask])
        frozen.release()
        frozen.release()
        step()
        assert not torch.equal(layer.weight[mask], before[mask])

    def test_names_and_statistics(self) -> None:
        torch.manual_seed(0)
        model = randomized(ResNet([1, 1]))
        before = state(model)
        frozen = freeze(model, ["conv1", "bn1", "layer1"])
        train_steps(model)
        model.train()
        images = torch.randn(2, 3, 8, 8)
        stem = model.layer1(nn.functional.relu(model.bn1(model.conv1(images))))
        for name, value in state(model).items():
            kept = name.startswith(("conv1", "bn1", "layer1"))
            assert torch.equal(value, before[name]) == kept, name
        frozen.release()
        assert model.bn1.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.eval()
        torch.testing.assert_close(stem, model.layer1(nn.functional.relu(model.bn1(model.conv1(images)))))

    def test_frozen_channels_compute_as_in_evaluation(self) -> None:
        torch.manual_seed(0)
        norm = randomized(nn.BatchNorm2d(4))
        images = torch.randn(3, 4, 2, 2)
        expected = copy.deepcopy(norm).eval()(images)
        batch = copy.deepcopy(norm).train()(images)
        mask = torch.tensor([True, False, False, True])
        with freeze(norm, {"running_mean": mask, "running_var": mask}):
            output = norm.train()(images)
        torch.testing.assert_close(output[:, mask], expected[:, mask])
        torch.testing.assert_close(output[:, ~mask], batch[:, ~mask])

    def test_what_was_frozen_before_stays(self) -> None:
        model = nn.Linear(2, 2)
        model.weight.requires_grad_(False)
        with freeze(model, ["weight", "bias"]):
            assert not model.bias.requires_grad
        assert not model.weight.requires_grad
        assert model.bias.requires_grad

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (["nothing"], "part: expected names of the model's tensors or modules, got 'nothing'"),
            (
                {"nothing": torch.ones(2, dtype=torch.bool)},
                "part: expected names of the model's tensors, got 'nothing'",
            ),
            ({"bias": torch.ones(3, dtype=torch.bool)}, r"part\['bias'\]: expected a bool tensor of shape \[2\]"),
            ({"bias": torch.ones(2)}, r"part\['bias'\]: expected a bool tensor"),
        ],
    )
    def test_errors(self, part: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            freeze(nn.Linear(2, 2), part)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model: expected"):
            freeze(3, [])  # type: ignore[arg-type]
