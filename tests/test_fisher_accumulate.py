"""Quantities of samples that come in parts, or are divided over processes, against one pass over all of them."""

from __future__ import annotations

import importlib
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from transferops.fisher import Accumulator, FisherInformation

CLASSES, SAMPLES = 3, 7
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    """With a norm whose statistics are buffers, and a layer that is never used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    model.register_module("idle", nn.Linear(2, 2).double())
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    return model


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 4).double(), torch.randint(CLASSES, (SAMPLES,))


def step(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    x, y = samples()
    return list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes)))


QUANTITIES: dict[str, Callable[[nn.Module], tuple[Any, ...]]] = {
    "gram": lambda model: ([step(model, 1), step(model, 2)],),
    "matvec": lambda model: (step(model, 1),),
    "block": lambda model: ("0.weight",),
    "diagonal": lambda model: (),
    "trace": lambda model: (),
    "kfac": lambda model: (),
}


def fisher_of(model: nn.Module, quantity: str, estimator: str) -> FisherInformation:
    used = [n for n, _ in model.named_parameters() if "idle" not in n]
    return FisherInformation(model, estimator, parameters=used if quantity == "kfac" else None)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "monte_carlo"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_parts_give_the_whole(quantity: str, estimator: str) -> None:
    model = network()
    what = QUANTITIES[quantity](model)
    fisher = fisher_of(model, quantity, estimator)
    expected = getattr(fisher, quantity)(*what, batches(3, 4))
    whole: Accumulator[Any] = fisher.accumulate(quantity, *what)
    assert_same(whole.update(batches(3)).update([]).update(batches(3, 4)[1:]).compute(), expected)
    assert whole.samples == SAMPLES
    assert_same(whole.compute(), expected)
    if estimator != "monte_carlo":  # parts draw the same numbers for other samples
        first, second, empty = (fisher.accumulate(quantity, *what) for _ in range(3))
        first.update(batches(2))
        merged = second.update(batches(2, 4, 1)[1:]).merge(first).merge(empty)
        assert (merged.samples, first.samples) == (SAMPLES, 2)
        assert_same(merged.compute(), expected)
        assert_same(first.compute(), getattr(fisher, quantity)(*what, batches(2)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def share(rank: int, port: int, folder: str) -> None:
    """One process: unequal numbers of batches, one none at all; a model that DistributedDataParallel wraps."""
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn.functional")  # see transferops.otqms.distributed.launched
    address, wait = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    distributed.init_process_group("gloo", address, timeout=wait, world_size=2, rank=rank)
    try:
        torch.save(shared_results(rank), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def shared_results(rank: int) -> dict[str, Any]:
    mine = batches(2, 4, 1)[:2] if rank == 0 else batches(2, 4, 1)[2:]
    found: dict[str, Any] = {}
    for quantity, what in QUANTITIES.items():
        for estimator in ("exact", "empirical"):
            model = network()
            part = fisher_of(model, quantity, estimator).accumulate(quantity, *what(model))
            found[f"{quantity} {estimator}"] = part.update(mine).all_reduce().compute()
    fisher = FisherInformation(network(), "empirical")
    alone = fisher.accumulate("diagonal").update(batches(SAMPLES) if rank == 0 else []).all_reduce()
    found["alone"] = (alone.samples, alone.compute())

    model = DistributedDataParallel(network(), find_unused_parameters=True)
    wrapped = FisherInformation(model, "empirical")
    found["wrapped"] = wrapped.accumulate("diagonal").update(mine).all_reduce().compute()
    x, y = batches(4)[0]
    for _ in range(2):  # and training goes on
        nn.functional.cross_entropy(model(x + rank), y).backward()
        wrapped.gram([step(model, 1)], mine)
    found["gradient"] = model.module[0].weight.grad

    sharded = network()
    mesh = init_device_mesh("cpu", (2,))
    sharded[3].weight = nn.Parameter(distribute_tensor(sharded[3].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"whole in every process, '3.weight' among them, got DTensor"):
        FisherInformation(sharded, "empirical").diagonal(mine)
    return found


def test_processes_give_the_whole(tmp_path: Path) -> None:
    port = free_port()
    other = multiprocessing.get_context("spawn").Process(target=share, args=(1, port, str(tmp_path)))
    other.start()
    share(0, port, str(tmp_path))  # this process is the first: only one more has to import torch
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for quantity, what in QUANTITIES.items():
        for estimator in ("exact", "empirical"):
            model = network()
            expected = getattr(fisher_of(model, quantity, estimator), quantity)(*what(model), batches(SAMPLES))
            for found in (first, second):
                assert_same(found[f"{quantity} {estimator}"], expected)
    diagonal = FisherInformation(network(), "empirical").diagonal(batches(SAMPLES))
    for found in (first, second):
        assert found["alone"][0] == SAMPLES
        assert_same(found["alone"][1], diagonal)
        assert_same(found["wrapped"], {f"module.{name}": value for name, value in diagonal.items()})
    assert torch.equal(first["gradient"], second["gradient"])
    assert first["gradient"].abs().max() > 0


def test_a_failed_update_is_not_forgotten() -> None:
    model = network()
    part = FisherInformation(model, "empirical").accumulate("diagonal").update(batches(3))
    with pytest.raises(ValueError, match="targets of 3 classes"):
        part.update([*batches(2), (torch.ones(1, 4).double(), torch.tensor([7]))])
    for call in (part.compute, lambda: part.update([]), lambda: part.merge(part), part.all_reduce):
        with pytest.raises(RuntimeError, match="expected an accumulator that has whole sums"):
            call()


def accumulate(*arguments: Any) -> Any:
    return FisherInformation(network(), "empirical").accumulate(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: accumulate("hessian"),
            ValueError,
            "quantity: expected 'gram', 'diagonal', 'trace', 'matvec', 'block' or 'kfac', got 'hessian'",
        ),
        (lambda: accumulate("trace", 3), ValueError, "what: expected nothing, 'trace' having no argument, got 3"),
        (
            lambda: accumulate("gram"),
            TypeError,
            "directions: expected a list of dictionaries from parameter name to tensor, of modules or of flat vectors, "
            "got None",
        ),
        (lambda: accumulate("trace").compute(), ValueError, "batches: expected at least one sample, got none"),
        (
            lambda: accumulate("trace").update(torch.ones(2, 4)),
            TypeError,
            "batches: expected an iterable of batches, such as [inputs], got a float32 tensor of shape [2, 4] on cpu",
        ),
        (
            lambda: accumulate("trace").merge(3),
            ValueError,
            "other: expected an accumulator of trace, empirical, cross_entropy, shapes [[]], got 3",
        ),
        (
            lambda: accumulate("block", "0.bias").merge(accumulate("block", "3.bias")),
            ValueError,
            "other: expected an accumulator of block, empirical, cross_entropy, shapes [[5, 5]], "
            "got one of block, empirical, cross_entropy, shapes [[3, 3]]",
        ),
        (
            lambda: accumulate("trace").all_reduce(),
            RuntimeError,
            "group: expected torch.distributed to be initialised, got no process group",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
