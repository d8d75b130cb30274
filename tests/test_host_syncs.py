"""How often a program waits for its GPU: not once for a batch, counted without one by tests/host_syncs.py."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fisher_models import PROBLEMS, build, directions
from host_syncs import HostSyncs, PretendedStream, pretended_gpu
from otqms_tasks import TARGET, network
from torch import Tensor, nn

from transferops import _transfer
from transferops.fisher import FisherInformation, LowRank, sweep
from transferops.fisher.accumulate import Accumulator
from transferops.otqms import TrainingOptions
from transferops.otqms.distributed import World
from transferops.otqms.pool import Pool
from transferops.otqms.training import EpochPlan, Stepper
from transferops.scores import MomentsAccumulator, PrincipalGradientExpectation

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTITIES = ("gram", "diagonal", "trace", "matvec")
VARIED = ("convolutions", "multi_head_masked", "decoder", "scaled", "recurrent")


def on(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def accumulator(fisher: FisherInformation, quantity: str, steps: list[Any]) -> Accumulator[Any]:
    if quantity == "gram":
        return fisher.accumulate("gram", steps)
    return fisher.accumulate("matvec", steps[0]) if quantity == "matvec" else fisher.accumulate(quantity)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are taken to be on a GPU."""
    for module in ("labels", "likelihood"):
        monkeypatch.setattr(f"transferops.fisher.{module}.readable", lambda value: False)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("estimator", ["exact", "empirical", "monte_carlo"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_operation_of_a_batch_reads_a_value(name: str, estimator: str) -> None:
    """Once the routes have been checked on a first one, and nothing differs for it."""
    model, inputs, targets = build(name)
    fisher, steps = FisherInformation(model, estimator, PROBLEMS[name].loss), directions(model, 2)
    for quantity in QUANTITIES:
        once = accumulator(fisher, quantity, steps).update([(inputs, targets)])
        with HostSyncs() as syncs:
            once.update([(inputs, targets)])
        assert syncs.found == []


def test_what_reads_values_is_noticed() -> None:
    values = torch.arange(3)
    with HostSyncs() as syncs:
        values.max().item()
        values[values > 1]
        values.unique()
        bool((values > 1).any())
    assert len(syncs.found) == 4


@contextlib.contextmanager
def twin_on_gpu(
    name: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FisherInformation, HostSyncs]]:
    """A problem's Fisher information on the pretended GPU, the checks of its routes taken from the CPU."""
    model, inputs, targets = build(name)
    inner = FisherInformation(model, estimator, PROBLEMS[name].loss)._estimation
    with inner.passes():
        (batch,) = inner.batches([(inputs, targets)])
        routes = inner.routes(inner.selected(), batch)

    def names(model: nn.Module, attention: Any) -> dict[nn.Module, str]:
        known = {module: path for path, module in model.named_modules()}
        return known | {projection: f"{known[module]}.in" for module, projection in attention.items()}

    known = names(model, routes.attention)
    layout = {known[module]: calls for module, calls in routes.layout.items()}

    def check(twin: nn.Module, planned: Any, *_: Any) -> None:
        for parameter, why in routes.fallback.items():
            planned.refuse(parameter, why)
        theirs = names(twin, planned.attention)
        planned.layout = {module: layout[theirs[module]] for module in planned.captured}
        planned.expanded = dict(routes.expanded)
        planned.vectorised = routes.vectorised

    monkeypatch.setattr(sweep, "check", check)
    monkeypatch.setattr(sweep, "forward_size", lambda *args: args[-1])
    with pretended_gpu(monkeypatch) as syncs:
        yield FisherInformation(copy.deepcopy(model).to("meta"), estimator, PROBLEMS[name].loss), syncs


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", VARIED)
def test_batches_and_directions_are_copied_without_waiting(
    name: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the host or on the device already; directions dense or products, of all parameters or not of all."""
    model, inputs, targets = build(name)
    with twin_on_gpu(name, estimator, monkeypatch) as (fisher, syncs):
        for place in ("cpu", "meta"):
            steps = [on(place, step) for step in directions(model, 4)]
            first = next(iter(steps[0]))
            del steps[1][first]
            weight = next((n for n, p in steps[0].items() if p.dim() == 2 and n != first), None)
            if weight is not None:
                rows, columns = steps[2][weight].shape
                steps[2][weight] = LowRank(torch.ones(rows, 1, device=place), torch.ones(1, columns, device=place))
            batch = on(place, inputs), on(place, targets)
            for quantity in QUANTITIES:
                empty = accumulator(fisher, quantity, steps)
                syncs.found.clear()
                empty.update([batch] * 2)
                assert syncs.found == []


def test_what_waits_for_a_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as syncs:
        there, here = torch.zeros(3, device="meta"), torch.zeros(3)
        here.to("meta", non_blocking=True)
        there.fill_(1.0)
        assert syncs.found == []
        here.to("meta")
        there.copy_(here)
        there[torch.tensor([0, 2])]
        assert len(syncs.found) == 3
        with pytest.raises((NotImplementedError, RuntimeError)):
            there.cpu()
        assert len(syncs.found) == 4


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_of_the_trainer_waits_for_nothing(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, weights and offsets of a whole epoch are copied at once; losses stay where they are."""
    images = copy.copy(TARGET)
    plan = EpochPlan.shuffled(
        torch.arange(60), 8, 20, torch.Generator().manual_seed(0), torch.rand(60) if weighted else None
    )
    options = TrainingOptions(accumulate=2)
    pool = Pool({"target": images}, torch.device("cpu"))
    with pretended_gpu(monkeypatch) as syncs:
        pool.device = torch.device("meta")
        pool._inputs, pool._device_labels = on("meta", pool._inputs), on("meta", pool.labels)
        stepper, total = Stepper(network().to("meta"), options, 1e-2, World()), torch.zeros((), device="meta")
        syncs.found.clear()
        for loss in stepper.steps(pool, plan, 0, (0, 1)):
            total += loss
        assert syncs.found == []
    assert stepper.optimizer.state_dict()["state"][0]["step"] == plan.total_steps


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("samples", "waits"), [(4, 1), (32, 3)])
def test_moment_scores_read_what_they_say(samples: int, waits: int, norms: bool) -> None:
    """Whether few rows are finite; or of many their classes, whether their sums are, and the classes of both sides."""
    collection = MomentsAccumulator(norms=norms)
    features, labels = torch.randn(samples, 8), torch.arange(samples) % 3
    collection.update(features, labels)
    with HostSyncs() as syncs:
        collection.update(features, labels)
    assert len(syncs.found) == waits


def test_gradient_expectations_read_labels_only_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    expectation = PrincipalGradientExpectation(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), restarts=4)
    inputs, labels = torch.randn(6, 3), torch.arange(6) % 3
    expectation.update("task", inputs, labels)
    with HostSyncs() as syncs:
        expectation.update("task", inputs, labels)
    assert len(syncs.found) == 1  # of labels that are on the CPU
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).to("meta")
    with pretended_gpu(monkeypatch) as syncs:
        pretrained = PrincipalGradientExpectation(network, restarts=2, head="2")
        syncs.found.clear()
        pretrained.update("task", inputs, labels)
        assert syncs.found == []


@pytest.mark.usefixtures("unreadable")
def test_a_target_that_is_no_class_is_named_at_the_end() -> None:
    """The first of all; what has it cannot be merged, and its samples have spoilt nothing on the way."""
    model, inputs, targets = build("language")
    fisher, bad = FisherInformation(model, "empirical"), targets.clone()
    bad[1, 2], bad[3, 0] = 7, -1
    fine = fisher.accumulate("trace").update([(inputs, targets)])
    spoilt = fisher.accumulate("trace").update([(inputs, targets), (inputs, bad), (inputs, bad - 50)])
    message = r"^batches\[1\]: expected targets of 3 classes 0..2 or -100, got 7 at position \[1, 2\]$"
    for use in (lambda: fine.merge(spoilt), spoilt.compute, spoilt.finish):
        with pytest.raises(ValueError, match=message):
            use()
    assert fine.compute() == fisher.trace([(inputs, targets)])
    with pytest.raises(ValueError, match=r"^batches\[0\]: .* got 7 at position \[1, 2\]$"):
        fisher.effective_dimension(0.1, [(inputs, bad)])


class Journal(PretendedStream):
    """What happens on which stream."""

    events: list[str]

    def wait_event(self, event: Any) -> None:
        self.events.append(f"wait for {event}")

    def record_event(self) -> Any:
        return self.events[-1]


def test_the_next_batch_is_copied_before_the_last_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an item's copy, not the next one's, is what its use waits for; on a CPU nothing is read ahead."""
    Journal.events = events = []
    monkeypatch.setattr(torch.cuda, "Stream", Journal)
    monkeypatch.setattr(torch.cuda, "current_stream", Journal)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def bring(item: int) -> int:
        events.append(f"copy {item}")
        return item

    for device in ("cuda", "cpu"):
        events.clear()
        for item in _transfer.ahead(range(3), bring, lambda item: [], torch.device(device)):
            events.append(f"use {item}")
        waits = {f"use {i}": [f"wait for copy {i}", f"use {i}"] for i in range(3)}
        ahead = ["copy 0", "copy 1", *waits["use 0"], "copy 2", *waits["use 1"], *waits["use 2"]]
        plain = [f"{what} {i}" for i in range(3) for what in ("copy", "use")]
        assert events == (ahead if device == "cuda" else plain)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp", *VARIED])
def test_a_gpu_is_not_waited_for(name: str, estimator: str) -> None:
    """PyTorch's own alarm, on a real one."""
    model, inputs, targets = build(name)
    model.to("cuda")
    fisher, steps = FisherInformation(model, estimator, PROBLEMS[name].loss), directions(model, 2)
    steps = [on("cuda", step) for step in steps]
    for quantity in QUANTITIES:
        once = accumulator(fisher, quantity, steps).update([(inputs, targets)] * 2)
        batch = on("cuda", inputs), on("cuda", targets)
        torch.cuda.set_sync_debug_mode("error")
        try:
            once.update([batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        once.compute()
