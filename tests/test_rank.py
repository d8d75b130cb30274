"""Features of models over data, kept on disk, and the table of their scores."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from transferops.otqms import TrainingOptions
from transferops.rank import (
    HEAD_INPUT,
    Candidate,
    Extraction,
    embedding_relations,
    extract,
    extract_cached,
    gradient_relations,
    load_candidate,
    rank_candidates,
    source_candidates,
    source_relations,
    transport_relations,
)
from transferops.scores import RELATIONS, h_score, knn, leep


class Network(nn.Module):
    """Convolution, normalisation and a head whose modules are not in the order in which they run."""

    calls: ClassVar[int] = 0  # not of the network: what a network has is part of its hash

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(4, classes)
        self.stem = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Linear(2, 2)
        self.slope = 0.0

    def forward(self, x: Tensor) -> Tensor:
        Network.calls += len(x)
        hidden = torch.nn.functional.leaky_relu(self.norm(self.stem(x)), self.slope)
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(23, 3, 6, 6, generator=generator), torch.arange(23) % 4


def batches(inputs: Tensor, labels: Tensor, size: int = 7) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(inputs.split(size), labels.split(size), strict=True)


class TestExtract:
    def test_layers(self, network: Network, data: tuple[Tensor, Tensor]) -> None:
        network.train()
        found = extract(network, batches(*data), layers=[HEAD_INPUT, "stem", "head"])
        assert network.training  # put back
        assert network.norm.num_batches_tracked == 0
        network.eval()
        stem = network.stem(data[0])
        with torch.no_grad():
            torch.testing.assert_close(found.features["stem"], stem.mean((2, 3)))
            torch.testing.assert_close(found.features[HEAD_INPUT], network.norm(stem).relu().mean((2, 3)))
            torch.testing.assert_close(found.outputs, network(data[0]))
        assert torch.equal(found.features["head"], found.outputs)
        assert torch.equal(found.labels, data[1])
        assert len(found) == 23

    def test_tokens_and_sequences(self) -> None:
        tokens = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(5 * 6, 3))
        x = torch.randn(2, 5, 4)
        found = extract(tokens, [(x, torch.tensor([0, 1]))], layers=["0"])
        torch.testing.assert_close(found.features["0"], tokens[0](x).mean(1).detach())
        sequence = nn.Sequential(nn.Conv1d(5, 6, 2), nn.Flatten(), nn.Linear(18, 3))
        found = extract(sequence, [(x, torch.tensor([0, 1]))], layers=["0"])
        torch.testing.assert_close(found.features["0"], sequence[0](x).mean(2).detach())

    def test_mappings_and_logits(self) -> None:
        class Answer:
            def __init__(self, logits: Tensor) -> None:
                self.logits = logits

        class Keywords(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.classifier = nn.Linear(3, 2)

            def forward(self, pixels: Tensor, scale: float) -> Answer:
                return Answer(self.classifier(pixels * scale))

        x = torch.randn(4, 3)
        found = extract(Keywords(), [{"pixels": x, "scale": 2.0, "labels": torch.tensor([0, 1, 0, 1])}])
        torch.testing.assert_close(found.features[HEAD_INPUT], 2 * x)
        assert found.outputs.shape == (4, 2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"layers": ["nothing"]},
                "layers: expected 'head input' or modules of the model (head, stem, norm, unused, ...), got 'nothing'",
            ),
            ({"layers": []}, "layers: expected at least one layer, each once, got []"),
            ({"layers": ["unused"]}, "layers: expected layers that run, got 'unused', which does not"),
            ({"head": "norm"}, "head: expected a linear or convolutional layer, got BatchNorm2d at 'norm'"),
            ({"head": "x"}, "head: expected a module of the model, such as 'stem', 'norm', 'unused', got 'x'"),
        ],
    )
    def test_refuses(
        self, network: Network, data: tuple[Tensor, Tensor], arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises((ValueError, TypeError)) as caught:
            extract(network, batches(*data), **arguments)
        assert str(caught.value) == message

    def test_refuses_data(self, network: Network, data: tuple[Tensor, Tensor]) -> None:
        with pytest.raises(ValueError, match=r"^batches: expected at least one batch, got none$"):
            extract(network, [])
        with pytest.raises(ValueError, match=r"^batches\[0\]: expected labels, got none$"):
            extract(network, [data[0]])
        with pytest.raises(TypeError, match=r"^batches\[0\] labels: expected integers"):
            extract(network, [(data[0], data[1].float())])
        with pytest.raises(ValueError, match=r"^batches\[0\] labels: expected shape \[23\], got shape \[22\]$"):
            extract(network, [(data[0], data[1][1:])])

    def test_a_head_used_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.as_tensor(self.layer(self.layer(x)))

        with pytest.raises(ValueError, match=r"^model: expected a head that runs once, got 'layer', which runs 2"):
            extract(Twice(), [(torch.randn(2, 3), torch.tensor([0, 1]))])


class TestCache:
    def test_reads_what_is_there(self, network: Network, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        want = extract(network, batches(*data, size=256))
        Network.calls = 0
        first = extract_cached(network, *data, tmp_path / "deep")
        assert Network.calls == 23 + 1  # one to find the head
        again = extract_cached(network, *data, tmp_path / "deep")
        assert Network.calls == 23 + 1
        for found in (first, again):
            assert torch.equal(found.features[HEAD_INPUT], want.features[HEAD_INPUT])
            assert torch.equal(found.outputs, want.outputs)

    def test_whatever_changes_is_computed_anew(
        self, network: Network, data: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        def files() -> int:
            return len(list(tmp_path.iterdir()))

        extract_cached(network, *data, tmp_path)
        assert files() == 1
        extract_cached(network, *data, tmp_path, layers=["stem"])
        assert files() == 2
        extract_cached(network, data[0] + 1e-6, data[1], tmp_path)
        assert files() == 3
        with torch.no_grad():
            network.head.bias[0] += 1e-6
        extract_cached(network, *data, tmp_path)
        assert files() == 4
        network.norm.running_mean += 1  # a buffer
        extract_cached(network, *data, tmp_path)
        assert files() == 5
        network.slope = 0.1  # neither in the state nor in what is printed
        extract_cached(network, *data, tmp_path)
        assert files() == 6
        for entry in (2.0, 3.0):
            network.register_buffer("scale", torch.tensor(entry), persistent=False)
            extract_cached(network, *data, tmp_path)
        assert files() == 8

    def test_what_stays_is_read_by_another_process(self, tmp_path: Path) -> None:
        """Addresses and the order of sets are others there."""
        script = tmp_path / "extract.py"
        script.write_text(
            "import functools, sys, torch\n"
            "from transferops.rank import extract_cached\n"
            "network = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
            "network.names, network.norm = {'a', 'b', 'c'}, functools.partial(sorted, key=lambda x: x)\n"
            "for parameter in network.parameters():\n"
            "    torch.nn.init.ones_(parameter)\n"
            "extract_cached(network, torch.ones(3, 2), torch.zeros(3, dtype=torch.long), sys.argv[1])\n"
        )
        for seed in ("1", "2"):
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            subprocess.run([sys.executable, script, tmp_path / "cache"], check=True, env=environment)
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_damaged_and_interrupted(
        self, network: Network, data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("transferops.rank.cache._PART", 10)
        want = extract_cached(network, *data, None)

        seen = []

        def stop(samples: int) -> None:
            seen.append(samples)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract_cached(network, *data, tmp_path, on_batch=stop)
        (kept,) = tmp_path.iterdir()  # the first part; the second was not finished
        Network.calls = 0
        found = extract_cached(network, *data, tmp_path)
        assert Network.calls == 13 + 2
        assert torch.equal(found.outputs, want.outputs)
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 1
        kept.write_bytes(content)
        Network.calls = 0
        assert torch.equal(extract_cached(network, *data, tmp_path).outputs, want.outputs)
        assert Network.calls == 10 + 1


class TestCandidates:
    @pytest.fixture
    def module(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        module = ModuleType("my_models")
        module.make = lambda: nn.Linear(3, 2)
        module.number = lambda: 3
        monkeypatch.setitem(sys.modules, "my_models", module)
        return module

    def test_function(self, module: ModuleType) -> None:
        candidate = load_candidate("my_models:make")
        assert (candidate.name, candidate.parameters) == ("my_models:make", 8)

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("resnet", ValueError, "model: expected module:function, timm:NAME or hf:NAME, got 'resnet'"),
            ("no_such_package:f", ValueError, "got no module named 'no_such_package'"),
            ("my_models:other", ValueError, "model: expected a function 'other' in my_models, got none"),
            ("my_models:number", TypeError, "model: expected a torch.nn.Module from my_models:number, got 3"),
        ],
    )
    def test_refuses(self, module: ModuleType, name: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error) as caught:
            load_candidate(name)
        assert message in str(caught.value)

    @pytest.mark.parametrize(("package", "name"), [("timm", "timm:resnet18"), ("transformers", "hf:x/y")])
    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'pip install "transferops\[{package}\]"'):
            load_candidate(name)

    def test_function_of_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the current folder, which is how a user names a model of their own."""
        (tmp_path / "a_file_of_models.py").write_text(
            "from torch import nn\n"
            "def small():\n    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
        candidate = load_candidate("a_file_of_models:small")
        assert candidate.parameters == 26
        found = extract(candidate.model, [(torch.randn(5, 3), torch.arange(5) % 2)])
        assert (found.features[HEAD_INPUT].shape, found.outputs.shape) == ((5, 4), (5, 2))

    def test_timm(self) -> None:
        pytest.importorskip("timm")
        candidate = load_candidate("timm:resnet10t", pretrained=False)
        found = extract(candidate.model, [(torch.randn(2, 3, 64, 64), torch.arange(2))])
        assert (found.features[HEAD_INPUT].shape, found.outputs.shape) == ((2, 512), (2, 1000))
        with pytest.raises(ValueError, match=r"^model: expected a model that timm knows"):
            load_candidate("timm:no_such_model", pretrained=False)

    def test_transformers(self, tmp_path: Path) -> None:
        """A name is a folder too, so nothing is fetched; without its weights it is drawn at random."""
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=5,
        )
        torch.manual_seed(0)
        saved = transformers.ViTForImageClassification(config)
        saved.save_pretrained(tmp_path)
        images, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
        candidate = load_candidate(f"hf:{tmp_path}")
        found = extract(candidate.model, [(images, labels)])
        assert found.features[HEAD_INPUT].shape == (3, 16)
        assert torch.allclose(found.outputs, saved.eval()(images).logits, atol=1e-6)
        untrained = load_candidate(f"hf:{tmp_path}", pretrained=False)
        assert untrained.parameters == candidate.parameters
        assert not torch.equal(extract(untrained.model, [(images, labels)]).outputs, found.outputs)


def make(separation: float, seed: int = 0) -> Extraction:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(120) % 3
    features = torch.randn(120, 6, generator=generator) + separation * torch.eye(3, 6)[labels]
    return Extraction({HEAD_INPUT: features}, features[:, :4] * 2, labels)


class TestRanking:
    def test_values_and_order(self) -> None:
        made = {"far": make(0.2), "near": make(3.0, 1), "middle": make(1.0, 2)}
        ranking = rank_candidates(
            made,
            parameters={"far": 5, "near": 5, "middle": 9},
            extra={"mine": {"far": 1.0, "near": 2.0, "middle": 3.0}},
        )
        rows = {row.name: row for row in ranking.rows}
        for name, extraction in made.items():
            features = extraction.features[HEAD_INPUT]
            scores = rows[name].scores
            assert scores["h_score_regularized"] == pytest.approx(
                h_score(features, extraction.labels, regularized=True)
            )
            assert scores["knn"] == pytest.approx(knn(features, extraction.labels))
            assert scores["leep"] == pytest.approx(leep(extraction.outputs.double().softmax(1), extraction.labels))
        assert [row.name for row in ranking.order("log_me")] == ["near", "middle", "far"]
        assert ranking.order("mine")[0].name == "middle"
        assert ranking.scores[-2:] == ("knn", "parameters")
        ranks = ranking.mean_ranks()
        assert ranks[1] == min(ranks)
        assert ranks[0] == max(ranks)
        assert sum(ranks) == pytest.approx(6)  # 1 + 2 + 3, ties shared
        assert (ranking.samples, ranking.classes) == (120, 3)

    def test_what_cannot_be_computed_is_a_note(self) -> None:
        few = make(1.0)
        few = Extraction({HEAD_INPUT: few.features[HEAD_INPUT][:1]}, few.outputs[:1], few.labels[:1])
        ranking = rank_candidates({"a": few}, scores=["h_score", "leep"])
        (row,) = ranking.rows
        assert math.isnan(row.scores["knn"])
        assert row.notes["knn"] == "features: expected more than 1 samples for 1 neighbors, got 1"
        assert row.scores["h_score"] == row.scores["leep"] == 0
        assert "one class" in row.notes["h_score"]
        assert ranking.first("knn") == ()

    def test_rounding_does_not_rank(self) -> None:
        """Plain H-scores of fewer samples than features are C - 1, and differ in their last digits."""
        values = {"a": 8.999999999999995, "b": 9.0, "c": 8.9}
        ranking = rank_candidates(dict.fromkeys(values, make(1.0)), scores=["knn"], extra={"mine": values})
        assert ranking.mean_ranks() == (1.5, 1.5, 3)
        assert [row.name for row in ranking.first("mine")] == ["a", "b"]

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"^extractions: expected at least one candidate, got none$"):
            rank_candidates({})
        with pytest.raises(ValueError, match=r"^scores: expected names among h_score_regularized, .*, got 'best'$"):
            rank_candidates({"a": make(1)}, scores=["best"])
        with pytest.raises(ValueError, match=r"^score: expected one of"):
            rank_candidates({"a": make(1)}, scores=["leep"]).order("log_me")
        other = make(1)
        other = Extraction(other.features, other.outputs, other.labels.flip(0))
        with pytest.raises(ValueError, match=r"^extractions: expected the same target samples for every candidate"):
            rank_candidates({"a": make(1), "b": other})


def related_task(shift: int, count: int, seed: int = 0) -> Any:
    """Three classes at corners of a cube; a shift permutes the labels."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(inputs=2 * torch.eye(3, 8)[(labels + shift) % 3] + noise, labels=labels)


def related_network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


class TestRelations:
    def test_the_same_task_is_the_nearest(self) -> None:
        target = related_task(0, 60)
        sources = {"other": related_task(1, 90, 1), "same": related_task(0, 300, 2)}
        found = gradient_relations(related_network, target, sources, restarts=4)
        assert set(found) == {"pge", "pge_cosine"}
        for values in found.values():
            assert values["same"] > values["other"]
        itself = gradient_relations(related_network, target, {"itself": target}, restarts=2)
        assert itself["pge"]["itself"] == pytest.approx(0, abs=1e-5)
        assert itself["pge_cosine"]["itself"] == pytest.approx(1)
        with pytest.raises(ValueError, match=r"^sources: expected at least one source, got none$"):
            gradient_relations(related_network, target, {})

    def test_inputs_that_lie_alike_have_near_embeddings(self) -> None:
        """The Fisher information sees inputs and predictions, not labels."""
        target = related_task(0, 60)
        far = SimpleNamespace(inputs=related_task(0, 90, 1).inputs.flip(1), labels=target.labels.repeat(2)[:90])
        sources = {"far": far, "near": related_task(0, 300, 2), "itself": target}
        options = TrainingOptions(source_steps=30)
        found = embedding_relations(related_network, target, sources, options=options, samples=60)["task2vec"]
        assert found["itself"] == pytest.approx(0, abs=1e-12)
        assert 0 > found["near"] > found["far"] >= -1
        with pytest.raises(ValueError, match=r"^sources: expected at least one source, got none$"):
            embedding_relations(related_network, target, {})

    def test_all_of_them_by_name(self) -> None:
        pytest.importorskip("ot")
        target = related_task(0, 60)
        sources = {
            "noise": SimpleNamespace(
                inputs=related_task(0, 90, 1).inputs,
                labels=torch.randint(3, (90,), generator=torch.Generator().manual_seed(0)),
            ),
            "same": related_task(0, 150, 2),
        }
        options = TrainingOptions(source_steps=30)
        candidates = source_candidates(related_network, target, sources, options=options)
        found = source_relations(RELATIONS, related_network, target, sources, candidates, options=options)
        assert list(found) == list(RELATIONS)
        assert all(list(values) == ["noise", "same"] for values in found.values())
        assert found["otce"]["same"] > found["otce"]["noise"]
        assert found["otce"]["same"] <= 0
        twice = {name: Candidate(name, _Scaled(candidate.model, 100.0)) for name, candidate in candidates.items()}
        scaled = transport_relations(twice, target, sources)["otce"]
        assert scaled == pytest.approx(found["otce"], rel=1e-4)
        with pytest.raises(ValueError, match=r"^names: expected names among pge, .*, got 'h_score'$"):
            source_relations(["h_score"], related_network, target, sources, candidates)
        with pytest.raises(ValueError, match=r"^sources: expected at least one source, got none$"):
            transport_relations({}, target, {})


class _Scaled(nn.Module):
    """A network with its features, and nothing else, on another scale."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.body, self.head, self.scale = model[:-1], model[-1], scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.scale * self.body(inputs))
        return logits
