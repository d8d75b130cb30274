"""Principal gradient expectation: the gap's formula, pairing, batching, standard errors, resuming, joining."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops.fisher.batches import Batch
from transferops.scores import PrincipalGradientExpectation, pge_cosine, pge_gap, restarts
from transferops.scores.restarts import RestartedNetwork

EPS = torch.finfo(torch.float64).eps


class Net(nn.Sequential):
    def __init__(self, classes: int = 3, *middle: nn.Module) -> None:
        super().__init__(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, classes))


def task(
    classes: int, turn: float = 0.0, samples: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Inputs, and labels by the largest of linear functions; ``turn`` mixes in those of another task."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 5, generator=generator)
    one, other = (torch.randn(5, classes, generator=generator) for _ in range(2))
    return x.to(dtype), (x @ (math.cos(turn) * one + math.sin(turn) * other)).argmax(1)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for x in tensors])


def lists(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (7,), ())]


# ---- the formula ----


def test_gap_is_the_published_formula_and_its_identity() -> None:
    source, target = lists(0), lists(1)
    a, b = flat(source), flat(target)
    published = float((a - b).norm() / (a.norm() * b.norm()))
    identity = float((a / a.dot(a) - b / b.dot(b)).norm())
    assert published == pytest.approx(identity, rel=1e-12)
    assert pge_gap(source, target) == pytest.approx(published, rel=1e-12)
    assert pge_gap(target, source) == pge_gap(source, target)
    assert pge_cosine(source, target) == pytest.approx(float(a.dot(b) / (a.norm() * b.norm())), rel=1e-12)


def test_gap_of_a_task_with_itself_is_zero_and_ten_times_the_expectation_gives_a_tenth() -> None:
    source, target = lists(0), lists(1)
    assert pge_gap(source, source) == 0
    assert pge_cosine(source, source) == 1
    scaled = [[10 * x for x in side] for side in (source, target)]
    assert pge_gap(*scaled) == pytest.approx(pge_gap(source, target) / 10, rel=1e-6)


def test_gap_of_nearly_equal_expectations_keeps_half_the_digits() -> None:
    source = [x.double() for x in lists(0)]
    target = [x + 1e-6 * y.double() for x, y in zip(source, lists(1))]
    a, b = flat(source), flat(target)
    want = float((a - b).norm() / (a.norm() * b.norm()))
    assert pge_gap(source, target) == pytest.approx(want, abs=1e-7 / float(a.norm()))
    assert pge_gap(source, target) == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        (3, [torch.ones(2)], TypeError, "source_expectation: expected a list of tensors, got 3"),
        ([torch.zeros(2)], [torch.ones(2)], ValueError, "source_expectation: expected a non-zero, finite expectation"),
        ([torch.ones(2)], [torch.full((2,), math.nan)], ValueError, "target_expectation: expected a non-zero, finite"),
        ([torch.ones(2)], [torch.ones(3)], ValueError, r"gradients\[1\]\[0\]: expected shape \[2\] on cpu"),
    ],
)
def test_bad_expectations_are_refused(source: Any, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pge_gap(source, target)


# ---- the expectation ----


def by_definition(pge: PrincipalGradientExpectation, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over restarts and batches of plain gradients at the restarts' initialisations, all but the last layer's."""
    total = []
    for seed in pge.seeds:
        network = RestartedNetwork(model, pge.head or (), 3, random=True, initialize=None)
        state = network.draw([seed])
        for x, y in batches:
            fresh = copy.deepcopy(model).train()
            fresh.load_state_dict({name: value[0] for name, value in state.items()})
            loss = F.cross_entropy(fresh(x), y)
            own = [p for name, p in fresh.named_parameters() if not name.startswith(f"{pge.head[0]}.")]
            total.append(flat(list(torch.autograd.grad(loss, own))))
    return torch.stack(total)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_expectation_and_variance_are_those_of_plain_gradients(norm: bool) -> None:
    model = Net(3, *([nn.BatchNorm1d(8)] if norm else []))
    before = copy.deepcopy(model.state_dict())
    (x, y), pge = task(3), PrincipalGradientExpectation(model, restarts=5, groups=2, variance=True)
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    for batch in batches:
        pge.update("a", *batch)
    assert pge.loop_reason is None
    gradients = by_definition(pge, model, batches)
    size = gradients.abs().max()
    assert (flat(pge.expectation("a")) - gradients.mean(0)).abs().max() <= 1e-5 * size
    assert (flat(pge.variance("a")) - gradients.var(0)).abs().max() <= 1e-5 * size**2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_batched_restarts_equal_one_by_one(init: str, norm: bool) -> None:
    model = Net(4, *([nn.BatchNorm1d(8)] if norm else []))
    expectations = []
    for restart_batch in (1, 3, None):
        pge = PrincipalGradientExpectation(model, restarts=7, init=init, restart_batch=restart_batch)
        for turn in (0.0, 0.3):
            pge.update("a", *task(3, turn), num_classes=3)
        assert pge.loop_reason is None
        expectations.append(flat(pge.expectation("a")))
    for other in expectations[1:]:
        assert (other - expectations[0]).norm() <= 1e-5 * expectations[0].norm()


def test_restarts_at_once_are_those_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: fewer than 4 are taken one by one, and all give the same expectation."""
    inputs, labels = task(3)
    batch = Batch.parse(0, (inputs, labels), torch.device("cpu"))
    taken: list[int | None] = []
    batched = RestartedNetwork._batched

    def counted(self: RestartedNetwork, batch: Batch, state: dict[str, Tensor], step: int | None) -> list[Tensor]:
        taken.append(step)
        return batched(self, batch, state, step)

    monkeypatch.setattr(RestartedNetwork, "_batched", counted)
    network = RestartedNetwork(Net(3), ("2",), 3, random=True, initialize=None)
    state = network.draw(range(10))
    kept = network._bytes_kept(batch, {name: x[0] for name, x in state.items()})
    activations = 24 * (5 + 8 + 3)  # the inputs, the hidden layer, the logarithms of the probabilities
    assert 4 * activations <= kept <= 4 * activations + 8 * 24 + 64  # the labels, and what is of no account
    rows = []
    for fit, expected in ((0, []), (3, []), (4, [4]), (7, [7]), (50, [None])):
        monkeypatch.setattr(restarts, "_CACHE_BYTES", fit * kept)
        taken.clear()
        rows.append(network.gradients(batch, state, range(10), 0))
        assert taken == expected
    for row in rows[1:]:
        for one, other in zip(row, rows[0]):
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_dropout_goes_one_by_one_with_the_reason_and_repeats() -> None:
    model = Net(3, nn.Dropout(0.5))
    results = []
    for _ in range(2):
        pge = PrincipalGradientExpectation(model, restarts=3).update("a", *task(3))
        assert "random" in str(pge.loop_reason)
        results.append(flat(pge.expectation("a")))
    assert torch.equal(*results)


def test_pretrained_keeps_the_backbone_and_draws_the_head() -> None:
    model = Net(3)
    network = RestartedNetwork(model, ("2",), 4, random=False, initialize=None)
    state = network.draw([1, 2])
    assert set(state) == {"2.weight", "2.bias"}
    assert state["2.weight"].shape == (2, 4, 8)
    assert not torch.equal(state["2.weight"][0], state["2.weight"][1])


# ---- pairing ----


def test_tasks_of_different_class_counts_see_the_same_backbones() -> None:
    model = Net(3)
    three, seven = (RestartedNetwork(model, ("2",), c, random=True, initialize=None).draw([11, 12]) for c in (3, 7))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(three[name], seven[name])
        assert not torch.equal(three[name][0], three[name][1])
    assert seven["2.weight"].shape == (2, 7, 8)


def test_inference_mode_makes_no_difference() -> None:
    want = PrincipalGradientExpectation(Net(3), restarts=2).update("a", *task(3)).expectation("a")
    with torch.inference_mode():
        got = PrincipalGradientExpectation(Net(3), restarts=2).update("a", *task(3)).expectation("a")
    assert torch.equal(flat(got), flat(want))


def test_reducing_without_a_process_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group: expected torch\.distributed to be initialised"):
        PrincipalGradientExpectation(Net(3), restarts=2).update("a", *task(3)).all_reduce()


def test_drawing_leaves_the_random_state_alone() -> None:
    model = Net(3, nn.Dropout(0.5))
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    PrincipalGradientExpectation(model, restarts=2).update("a", *task(3), num_classes=4)
    assert torch.equal(torch.rand(2), want)


def test_equal_tasks_have_gap_zero_and_the_gap_grows_with_the_difference() -> None:
    pge = PrincipalGradientExpectation(Net(3), restarts=4)
    turns = [0.0, 0.0, 0.3, 0.7, 1.3]
    for index, turn in enumerate(turns):
        pge.update(str(index), *task(3, turn, samples=60))
    result = pge.compute()
    gaps, cosines = result.gap[0].tolist(), result.cosine[0].tolist()
    assert gaps[1] == 0
    assert gaps[1] < gaps[2] < gaps[3] < gaps[4]
    assert cosines[1] == pytest.approx(1, abs=4 * EPS)
    assert cosines[2] > cosines[3] > cosines[4]
    assert torch.equal(result.score, -result.gap)
    assert torch.equal(result.gap, result.gap.T)


def test_computed_gaps_are_those_of_the_expectations() -> None:
    pge = PrincipalGradientExpectation(Net(3), restarts=5, groups=3)
    pge.update("a", *task(3)).update("b", *task(3, 1.0)).update("c", *task(6, 0.5), num_classes=6)
    result = pge.compute()
    assert result.tasks == ("a", "b", "c")
    for i, one in enumerate(result.tasks):
        for j, other in enumerate(result.tasks):
            if i == j:
                continue
            want = pge_gap(pge.expectation(one), pge.expectation(other))
            assert float(result.gap[i, j]) == pytest.approx(want, rel=1e-5)
            assert float(result.cosine[i, j]) == pytest.approx(
                pge_cosine(pge.expectation(one), pge.expectation(other)), rel=1e-5, abs=1e-6
            )


# ---- standard errors ----


def test_standard_error_is_the_jackknife_over_restarts() -> None:
    """By definition: the gap of the expectations without each restart in turn."""
    restarts = 6
    pge = PrincipalGradientExpectation(Net(3), restarts=restarts, groups=restarts)
    data = {"a": task(3), "b": task(3, 0.8)}
    for name, batch in data.items():
        pge.update(name, *batch)
    single = {}
    for name, batch in data.items():
        rows = []
        for index in range(restarts):
            part = PrincipalGradientExpectation(Net(3), restarts=restarts, shard=(index, restarts))
            rows.append(flat(part.update(name, *batch).expectation(name)))
        single[name] = torch.stack(rows)
    without = []
    for index in range(restarts):
        kept = [i for i in range(restarts) if i != index]
        without.append(pge_gap([single["a"][kept].mean(0)], [single["b"][kept].mean(0)]))
    partial = torch.tensor(without, dtype=torch.float64)
    want = math.sqrt((restarts - 1) / restarts * float((partial - partial.mean()).square().sum()))
    assert float(pge.compute().gap_standard_error[0, 1]) == pytest.approx(want, rel=1e-4)


def test_standard_error_covers_the_spread_over_seeds() -> None:
    """The root mean square of the errors is the spread of the gap between runs, within a factor of two."""
    gaps, errors = [], []
    for seed in range(12):
        pge = PrincipalGradientExpectation(Net(3), restarts=20, groups=10, seed=seed)
        result = pge.update("a", *task(3)).update("b", *task(3, 0.8)).compute()
        gaps.append(result.gap[0, 1])
        errors.append(result.gap_standard_error[0, 1])
    ratio = float(torch.stack(errors).square().mean().sqrt() / torch.stack(gaps).std())
    assert 0.5 < ratio < 2


def test_one_restart_has_no_standard_error() -> None:
    pge = PrincipalGradientExpectation(Net(3), restarts=1).update("a", *task(3)).update("b", *task(3, 1.0))
    assert pge.compute().gap_standard_error.isnan().all()


# ---- the head ----


class NamedOddly(nn.Module):
    """The head is neither last in the module list nor called one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.first = nn.Conv2d(4, 3, 1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(F.relu(self.body(F.relu(self.stem(x))))).mean((2, 3))


def test_the_head_is_the_last_layer_to_run() -> None:
    pge = PrincipalGradientExpectation(NamedOddly(), restarts=2)
    assert pge.head is None
    images, labels = torch.randn(6, 1, 6, 6), torch.tensor([0, 1, 2, 3, 4, 4])
    pge.update("a", images, labels, num_classes=5)
    assert pge.head == ("first",)
    assert [tuple(x.shape) for x in pge.expectation("a")] == [(4, 1, 3, 3), (4,), (4, 4, 3, 3), (4,)]


def test_the_head_can_be_named() -> None:
    pge = PrincipalGradientExpectation(Net(3, nn.Linear(8, 8)), restarts=2, head=["1", "3"]).update("a", *task(3))
    assert [tuple(x.shape) for x in pge.expectation("a")] == [(8, 5), (8,)]
    whole = PrincipalGradientExpectation(Net(3), restarts=2, head=()).update("a", *task(3), num_classes=3)
    assert len(whole.expectation("a")) == 4


def test_a_model_whose_last_layer_does_not_give_the_outputs_needs_a_name() -> None:
    class Doubled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)] * 2, 1)

    with pytest.raises(ValueError, match="head: expected the name of the layer that gives the model's 6 outputs"):
        PrincipalGradientExpectation(Doubled(3)).update("a", *task(3))


def test_frozen_parameters_are_left_out() -> None:
    model = Net(3)
    model[0].bias.requires_grad_(False)
    pge = PrincipalGradientExpectation(model, restarts=2).update("a", *task(3))
    assert [tuple(x.shape) for x in pge.expectation("a")] == [(8, 5)]


# ---- resuming, merging, distributing ----


def test_resuming_is_exact() -> None:
    settings = {"restarts": 3, "groups": 2, "variance": True}
    model = Net(3, nn.Dropout(0.3))
    whole = PrincipalGradientExpectation(model, **settings)
    first, second = PrincipalGradientExpectation(model, **settings), PrincipalGradientExpectation(model, **settings)
    whole.update("a", *task(3)).update("a", *task(3, 0.2)).update("b", *task(3, 1.0))
    first.update("a", *task(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.update("a", *task(3, 0.2)).update("b", *task(3, 1.0))
    for name in ("a", "b"):
        assert torch.equal(flat(whole.expectation(name)), flat(second.expectation(name)))
        assert torch.equal(flat(whole.variance(name)), flat(second.variance(name)))
    assert torch.equal(whole.compute().gap, second.compute().gap)


def test_merging_shards_of_restarts_gives_the_whole() -> None:
    settings = {"restarts": 5, "groups": 3, "variance": True}
    whole = PrincipalGradientExpectation(Net(3), **settings)
    parts = [PrincipalGradientExpectation(Net(3), shard=(rank, 2), **settings) for rank in range(2)]
    for pge in (whole, *parts):
        pge.update("a", *task(3)).update("b", *task(3, 1.0))
    merged = parts[0].merge(parts[1])
    for name in ("a", "b"):
        want, size = flat(whole.expectation(name)), flat(whole.expectation(name)).abs().max()
        assert (flat(merged.expectation(name)) - want).abs().max() <= 1e-6 * size
        difference = flat(merged.variance(name)) - flat(whole.variance(name))
        assert difference.abs().max() <= 1e-5 * flat(whole.variance(name)).max()
    assert torch.allclose(merged.compute().gap_standard_error, whole.compute().gap_standard_error, rtol=1e-3)


def test_merging_batches_and_new_tasks() -> None:
    (x, y), settings = task(3), {"restarts": 2, "groups": 2}
    whole = PrincipalGradientExpectation(Net(3), **settings).update("a", x[:10], y[:10]).update("a", x[10:], y[10:])
    one = PrincipalGradientExpectation(Net(3), **settings).update("a", x[:10], y[:10])
    other = PrincipalGradientExpectation(Net(3), **settings).update("a", x[10:], y[10:]).update("b", x, y)
    one.merge(other)
    assert one.tasks == ("a", "b")
    assert torch.allclose(flat(one.expectation("a")), flat(whole.expectation("a")), atol=1e-7)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pge = PrincipalGradientExpectation(Net(3), restarts=3, groups=3, variance=True)
    pge.update("a", *task(3))
    if rank == 1:
        pge.update("b", *task(4, 1.0), num_classes=4)  # a task that the other rank has not seen
    pge.all_reduce()
    torch.save(pge.state_dict()["tasks"], f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads do not always survive the interpreter's own way out


def test_two_ranks_share_the_restarts(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = PrincipalGradientExpectation(Net(3), restarts=3, groups=3, variance=True).update("a", *task(3))
    want = whole.state_dict()["tasks"]["a"]
    for state in states:
        assert state["a"]["counts"] == want["counts"] == [1, 1, 1]
        assert state["b"]["counts"] == [0, 0, 1]
        for kind in ("means", "squares"):
            for got, expected in zip(state["a"][kind], want[kind]):
                assert torch.allclose(flat(got), flat(expected), atol=1e-7)
    assert all(torch.equal(flat(a), flat(b)) for a, b in zip(states[0]["b"]["means"], states[1]["b"]["means"]))


# ---- malformed calls ----


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def test_a_module_that_cannot_be_drawn_anew_is_named_and_can_be_initialised_by_hand() -> None:
    with pytest.raises(ValueError, match=r"model: expected modules with reset_parameters .*got Bare '' without"):
        PrincipalGradientExpectation(Bare()).update("a", *task(3))

    def initialize(module: nn.Module) -> None:
        if isinstance(module, Bare):
            nn.init.normal_(module.scale)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    pge = PrincipalGradientExpectation(Bare(), restarts=2, initialize=initialize).update("a", *task(3))
    assert [tuple(x.shape) for x in pge.expectation("a")] == [(5,)]


X, Y = task(3)
BAD_UPDATES = {
    "floating labels": ({"labels": Y.float()}, TypeError, "labels: expected a tensor of integers"),
    "label out of range": ({"labels": Y + 1}, ValueError, "labels: expected 3 classes 0..2, got 3 at position"),
    "too few labels": ({"labels": Y[:3]}, ValueError, "labels: expected 24 of them"),
    "no samples": ({"inputs": X[:0], "labels": Y[:0]}, ValueError, "expected at least one sample"),
    "one class": ({"num_classes": 1}, ValueError, "num_classes: expected an integer of at least 2, got 1"),
    "a task by number": ({"task": 3}, TypeError, "task: expected a name, got 3"),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_malformed_batches_are_refused(name: str) -> None:
    change, error, message = BAD_UPDATES[name]
    pge = PrincipalGradientExpectation(Net(3), restarts=2)
    with pytest.raises(error, match=message):
        pge.update(**{"task": "a", "inputs": X, "labels": Y, **change})
    assert pge.tasks == ()


def test_other_misuse_is_refused() -> None:
    pge = PrincipalGradientExpectation(Net(3), restarts=2)
    with pytest.raises(ValueError, match="task: expected a batch of at least one task"):
        pge.compute()
    pge.update("a", X, Y)
    with pytest.raises(ValueError, match="num_classes: expected 3, as before, got 4"):
        pge.update("a", X, Y, num_classes=4)
    with pytest.raises(ValueError, match=r"task: expected one of \['a'\], got 'b'"):
        pge.expectation("b")
    with pytest.raises(ValueError, match="variance: expected an expectation that was told variance=True"):
        pge.variance("a")
    with pytest.raises(ValueError, match="other: expected seed=0, got seed=1"):
        pge.merge(PrincipalGradientExpectation(Net(3), restarts=2, seed=1))
    with pytest.raises(ValueError, match=r"init: expected 'random' or 'pretrained', got 'zeros'"):
        PrincipalGradientExpectation(Net(3), init="zeros")
    with pytest.raises(ValueError, match="shard: expected"):
        PrincipalGradientExpectation(Net(3), shard=(2, 2))
    with pytest.raises(ValueError, match="inputs: expected a non-zero finite gradient expectation of the task 'nan'"):
        pge.update("nan", torch.full_like(X, math.nan), Y).compute()
