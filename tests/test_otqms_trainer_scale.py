"""Several processes, data sets that are read as they go, and ways to compute a step that change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from otqms_tasks import task, timeless
from torch import nn
from torch.utils.data import Dataset

from transferops.fisher import FisherInformation, estimation, parameter_differences
from transferops.fisher.exact import push_forward
from transferops.otqms import OTQMS, ConvNet, TrainingOptions, TrainingRun
from transferops.otqms.akaike import akaike_shares, explain_shares
from transferops.otqms.guard import caution, judge_sources
from transferops.otqms.pool import Pool, TensorSamples
from transferops.otqms.report import leave_one_out
from transferops.otqms.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    epochs=3, early_stopping=True, patience=3, batch_size=9, min_steps=8, source_steps=20, lr=1e-2
)
STRATEGIES = ("quantities-dynamic", "weights", "recommended")


TARGET, VALIDATION = task(0, 5), task(5, 4)
SOURCES: dict[str, Any] = {"near": task(1, 20), "far": task(2, 16, 1), "small": task(3, 3)}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(strategy: str, target: Any = TARGET, sources: Any = None, **changes: Any) -> TrainingRun:
    options = dataclasses.replace(OPTIONS, **changes)
    return OTQMS(network, target, sources or SOURCES, validation=VALIDATION, options=options).fit(strategy)


def fit_interrupted(folder: str, **changes: Any) -> TrainingRun:
    """With checkpoints in ``folder``, given up after some of them and taken up again."""
    options = dataclasses.replace(OPTIONS, checkpoint_steps=3, **changes)

    def trainer() -> OTQMS:
        return OTQMS(network, TARGET, SOURCES, validation=VALIDATION, options=options, checkpoint=folder)

    trainer().source_models()  # each by one process alone, which cannot be given up by all at the same time
    save, saves = Run._save, []

    def failing(run: Run) -> None:
        save(run)
        saves.append(run)
        if len(saves) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_save", failing)
        with pytest.raises(KeyboardInterrupt):
            trainer().fit("quantities-dynamic")
    assert saves[-1]._step > 0  # in the middle of an epoch
    return trainer().fit("quantities-dynamic")


SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
import clarabel, torch, torch._dynamo, torch.distributed.fsdp
import torch.distributed as distributed
torch.set_num_threads(1)
from test_otqms_trainer_scale import STRATEGIES, fit, fit_interrupted, timeless
size = int(sys.argv[2])
children = []
for rank in range(size):
    child = os.fork()
    if child == 0:
        address = "file://" + sys.argv[1] + "/store"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        results = {{name: timeless(fit(name)) for name in STRATEGIES}}
        results["sharded"] = timeless(fit("recommended", sharded=True))
        results["sharded and resumed"] = timeless(fit_interrupted(sys.argv[1], sharded=True, accumulate=2))
        with open(f"{{sys.argv[1]}}/{{rank}}.json", "w") as file:
            json.dump(results, file)
        distributed.barrier()
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_like_one(tmp_path: Path) -> None:
    """The same decisions, and the same losses up to float32 rounding, with the same global batch; in shards, too."""
    pytest.importorskip("clarabel")
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path), "2"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stdout == "[0, 0]\n", finished.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    same = {"sharded": "recommended", "sharded and resumed": "quantities-dynamic"}
    assert set(ranks[0]) == {*STRATEGIES, *same}
    for name in ranks[0]:
        alone = timeless(fit(same.get(name, name)))
        for together in (rank[name] for rank in ranks):
            assert len(together) == len(alone)
            for a, b in zip(alone, together, strict=True):
                for key, value in a.items():
                    # Sums in another order: 1e-7 each, growing over some tens of steps.
                    expected = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
                    if isinstance(value, dict):
                        expected = {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in value.items()}
                    assert b[key] == expected, (name, a["epoch"], key)


THREADS = """
import pathlib, torch
from torch.nn.parallel import DistributedDataParallel
from transferops.otqms.distributed import launched
def threads():
    return {(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()}
def train():
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    model(torch.ones(4, 3)).sum().backward()
    print(*(name for name in threads() if "gloo" in name))
with launched(torch.device("cpu")):
    train()
print(*(name for name in threads() if "gloo" in name))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_no_thread_of_a_group_outlives_it() -> None:
    """One may take the process down as the interpreter ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", THREADS]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **alone})
    during, after = finished.stdout.split("\n")[:2]
    assert "gloo" in during, finished.stderr
    assert after == ""


class Pairs(Dataset[Any]):
    """The samples of a task one by one; counts how many were read."""

    def __init__(self, samples: TensorSamples, labels_as: str | None = "targets") -> None:
        self._samples = samples
        self.read = 0
        if labels_as is not None:
            setattr(self, labels_as, samples.labels.tolist())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return self._samples.inputs[index], int(self._samples.labels[index])


class TestData:
    @pytest.mark.parametrize("labels_as", ["targets", "labels", None])
    def test_data_sets_are_like_tensors(self, labels_as: str | None) -> None:
        sources = {name: Pairs(samples, labels_as) for name, samples in SOURCES.items()}
        streamed = fit("quantities-dynamic", Pairs(TARGET, labels_as), sources)
        assert timeless(streamed) == timeless(fit("quantities-dynamic"))

    def test_only_what_is_taken_is_read(self) -> None:
        sources = {name: Pairs(samples) for name, samples in SOURCES.items()}
        fit("target-only", TARGET, sources)
        assert [source.read for source in sources.values()] == [0, 0, 0]
        fit("all-sources", TARGET, sources, epochs=1, min_steps=1)
        assert [source.read for source in sources.values()] == [60, 48, 9]

    def test_pool(self) -> None:
        pool = Pool({"a": task(0, 2), "b": Pairs(task(1, 3))}, torch.device("cpu"))
        assert pool.sizes == (6, 9)
        assert pool.part_of(torch.tensor([0, 5, 6, 14])).tolist() == [0, 0, 1, 1]
        inputs, labels = next(iter(pool.read([torch.tensor([7, 0])])))
        torch.testing.assert_close(inputs, torch.stack([task(1, 3).inputs[1], task(0, 2).inputs[0]]))
        assert labels.tolist() == [1, 0]
        assert [len(labels) for _, labels in pool.batches(size=4)] == [4, 4, 4, 3]

    @pytest.mark.parametrize(
        ("part", "error", "message"),
        [
            (TensorSamples(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), ValueError, "expected 3 labels"),
            (TensorSamples(torch.zeros(2, 4), torch.zeros(2)), ValueError, "expected integer labels, shape"),
            (iter([1]), TypeError, "expected inputs and labels, or a map-style data set"),
        ],
    )
    def test_refuses(self, part: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=rf"^sources\['odd'\]: {message}"):
            OTQMS(network, TARGET, {"odd": part})


class TestSteps:
    def test_accumulation_changes_nothing(self) -> None:
        whole, pieces = fit("recommended"), fit("recommended", accumulate=4)
        for p, q in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        full, half = fit("all-sources"), fit("all-sources", autocast=dtype)
        assert half.model[0].weight.dtype == torch.float32
        losses = [run.epochs[-1].train_loss for run in (full, half)]
        assert losses[0] != losses[1]
        assert losses[1] == pytest.approx(losses[0], rel=0.1)

    def test_another_loss(self) -> None:
        def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.5)

        assert fit("all-sources", loss=smoothed).epochs[-1].train_loss > 0.5

    @pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
    def test_schedules(self, schedule: str) -> None:
        """Over all steps of a phase, after a rise in the first 2 % of them."""
        rates: list[float] = []

        class Recording(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                rates.append(self.param_groups[0]["lr"])
                return super().step(closure)

        fit("all-sources", optimizer=Recording, epochs=10, patience=10, schedule=schedule)
        assert len(rates) == 10 * 15
        factors = {
            "constant": [1.0] * 150,
            "cosine": [(1 + math.cos(math.pi * step / 150)) / 2 for step in range(150)],
            "plateau": [1.0] * 90 + [1 - 0.95 * (step - 90) / 60 for step in range(90, 150)],
        }
        rise = [1 / 3, 2 / 3, *([1.0] * 148)]
        assert rates == pytest.approx([1e-2 * a * b for a, b in zip(rise, factors[schedule], strict=True)])

    def test_channels_last(self) -> None:
        """Images are laid out so unless the model cannot take it; the training is the same up to rounding."""
        generator = torch.Generator().manual_seed(0)
        images = TensorSamples(torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 3)
        data: dict[str, Any] = {"source": images}
        options = dataclasses.replace(OPTIONS, early_stopping=False, optimizer=torch.optim.SGD)

        class Viewing(nn.Sequential):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self[1](self[0](x).view(len(x), -1))

        def layouts(model: Any, **changes: Any) -> tuple[nn.Module, bool, bool]:
            ours = OTQMS(model, images, data, options=dataclasses.replace(options, **changes))
            made = ours.fit("all-sources").model
            weight = next(p for p in made.parameters() if p.dim() == 4)
            inputs, _ = next(ours.samples.batches())
            last = [t.is_contiguous(memory_format=torch.channels_last) for t in (weight, inputs)]
            return made, last[0], last[1]

        def convolutional() -> nn.Module:
            return ConvNet(3, 3, width=4)

        fast, *yes = layouts(convolutional)
        slow, *no = layouts(convolutional, channels_last=False)
        _, *refused = layouts(lambda: Viewing(nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 3)))
        assert (yes, no, refused) == ([True] * 2, [False] * 2, [False] * 2)
        for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_models_are_trained_compiled(self) -> None:
        """Only unwrapped here: compiling takes longer than the rest of these tests together."""
        compiled = OTQMS(lambda: torch.compile(network()), TARGET, SOURCES)
        assert compiled.options.compile
        assert type(compiled._prepared.around.initial) is nn.Sequential

    def test_offloaded_and_rounded_source_models(self) -> None:
        torch.manual_seed(0)
        model = network()
        trainers = [
            OTQMS(network, TARGET, SOURCES, validation=VALIDATION, options=dataclasses.replace(OPTIONS, **changes))
            for changes in ({}, {"offload": True}, {"offload": True, "source_dtype": torch.bfloat16})
        ]
        plain, offloaded, rounded = (trainer.gram(model) for trainer in trainers)
        torch.testing.assert_close(plain, offloaded, rtol=1e-6, atol=0)
        assert not torch.equal(plain, rounded)
        torch.testing.assert_close(plain.diagonal(), rounded.diagonal(), rtol=0.05, atol=0)


def test_few_of_many_source_models_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 6 differences at a time; A is that of all at once."""
    sizes: list[int] = []

    def counting(model: nn.Module, tangents: Any, *rest: Any) -> Any:
        sizes.append(tangents.size)
        return push_forward(model, tangents, *rest)

    monkeypatch.setattr(estimation, "push_forward", counting)
    torch.manual_seed(0)
    model, models = network(), {f"source-{i}": network() for i in range(20)}
    sources = {name: task(1, 3) for name in models}
    options = dataclasses.replace(OPTIONS, early_stopping=False, offload=True)
    many = OTQMS(network, TARGET, sources, options=options, source_models=models)
    found = many.gram(model)
    assert max(sizes) == 5  # 20 in 4 parts
    whole = FisherInformation(model).gram(parameter_differences(list(models.values()), model), [TARGET.inputs])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def trainer() -> OTQMS:
    return OTQMS(network, TARGET, SOURCES, validation=VALIDATION, options=OPTIONS)


class TestReport:
    def test_table_and_pictures(self, trainer: OTQMS, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        run = trainer.fit("weights")
        report = trainer.report(run)
        assert {value.source for value in report.values} == set(SOURCES)
        rises = [value.predicted for value in report.values]
        assert rises == sorted(rises, reverse=True)
        assert rises[-1] >= 0
        told = caution([value.discrepancy for value in report.values], 15, trainer.dimension)
        assert told
        assert list(report.verdicts[:1]) == told
        assert [verdict.split(":")[0] for verdict in report.verdicts[1:]] == [f"source {name}" for name in SOURCES]
        written = report.save(tmp_path / "report")
        assert [path.name for path in written] == ["report.md", "shares.png", "risk.png", "gram.png"]
        table = written[0].read_text()
        assert table.count("\n| ") >= len(run.epochs) + 3
        assert f"| **{run.kept_epoch}** |" in table

    def test_of_a_survey(self) -> None:
        """Explained by what the decision was taken by: the survey's matrix and d, all labelled samples, its rule."""
        options = dataclasses.replace(OPTIONS, screen=False)
        trainer = OTQMS(network, TARGET, SOURCES, validation=VALIDATION, options=options)
        run, found = trainer.fit("shares"), trainer._prepared.survey(all_labels=True)
        report = trainer.report(run)
        assert run.gram is found.gram
        problem = found.gram.numpy(), 15 + 12, np.array([60, 48, 9]), found.dimension
        assert list(report.verdicts) == explain_shares(*problem, list(SOURCES))
        full = akaike_shares(*problem).risk
        without = akaike_shares(problem[0][1:, 1:], 27, [48, 9], found.dimension).risk
        values = {value.source: value.predicted for value in report.values}
        assert values["near"] == pytest.approx(without - full)
        told = found.explain(27, [60, 48, 9]) + caution(found.gram.diagonal(), 27, found.dimension)
        judged = judge_sources(found.gram.diagonal(), 15 + 12, [60, 48, 9], found.dimension)
        report = trainer.report(trainer.fit("recommended"))
        assert list(report.verdicts) == told + judged.sentences(list(SOURCES))
        shrunk = found.shrunk(27, [60, 48, 9])
        assert [value.predicted for value in report.values] == sorted(
            leave_one_out(shrunk, 27, [60, 48, 9], found.dimension, "quantity"), reverse=True
        )

    def test_retrained(self, trainer: OTQMS) -> None:
        run = trainer.fit("all-sources")
        assert trainer.report(run).values == ()
        report = trainer.report(run, retrain=True)
        rest = {name: samples for name, samples in SOURCES.items() if name != "far"}
        without = OTQMS(network, TARGET, rest, validation=VALIDATION, options=OPTIONS).fit("all-sources")
        expected = without.kept.validation_loss - run.kept.validation_loss
        found = {value.source: value.retrained for value in report.values}
        assert found["far"] == pytest.approx(expected)
        assert list(found.values()) == sorted(found.values(), reverse=True)

    def test_refuses(self) -> None:
        options = dataclasses.replace(OPTIONS, early_stopping=False)
        trainer = OTQMS(network, TARGET, SOURCES, options=options)
        with pytest.raises(ValueError, match=r"^retrain: expected early stopping, "):
            trainer.report(trainer.fit("target-only"), retrain=True)
        trainer = OTQMS(network, TARGET, {"near": SOURCES["near"]}, validation=VALIDATION, options=OPTIONS)
        with pytest.raises(ValueError, match=r"^retrain: expected at least two sources, got one$"):
            trainer.report(trainer.fit("target-only"), retrain=True)
