"""Inheriting between dtypes and devices, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ResNet, mlp, randomized, state
from torch import nn

from transferops.adapt import inherit, load_matching


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
            inherit(nn.Linear(2, 2), nn.Linear(2, 2), alpha)

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
            inherit(nn.Linear(2, 2), nn.Linear(2, 2), 0.5, **arguments)

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
            inherit(nn.Linear(2, 2), upstream, 0.5)

    def test_empty_state(self) -> None:
        with pytest.raises(ValueError, match="upstream_state: expected tensors by name, got none"):
            inherit(nn.Linear(2, 2), {}, 0.5)

    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"target: expected a torch\.nn\.Module"):
            inherit({"weight": torch.ones(2)}, nn.Linear(2, 2), 0.5)

    def test_uninitialised_target(self) -> None:
        for model in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
            with pytest.raises(ValueError, match=r"target: expected initialised parameters, got '.*' without values"):
                inherit(model, nn.Linear(2, 2), 0.5)
        broken = nn.Linear(2, 2)
        with torch.no_grad():
            broken.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="target: expected finite numbers, got nan in 'weight'"):
            inherit(broken, nn.Linear(2, 2), 0.5)
