"""What every score offers: batches in any order, merging, saving, reduction over processes, fit, details."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferops import scores
from transferops.scores import (
    SCORES,
    FeatureMoments,
    HScore,
    Knn,
    LogMe,
    MultiSourceHScore,
    Otce,
    Score,
    ScoreCollection,
    ScoreDetails,
    ScoreWarning,
    TransRate,
    score_all,
)


def features(samples: int, dim: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    means = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return torch.randn(samples, dim, generator=generator, dtype=torch.float64) + means[labels], labels


def probabilities(samples: int) -> tuple[Tensor, Tensor]:
    values, labels = features(samples)
    return values.softmax(1), labels


def source_labels(samples: int) -> tuple[Tensor, Tensor]:
    return torch.arange(samples) // 2 % 4, torch.arange(samples) % 3


def targets(samples: int) -> tuple[Tensor, Tensor]:
    values, _ = features(samples)
    return values, values[:, :2] + torch.arange(samples).unsqueeze(1) / samples


def stacked(samples: int) -> tuple[Tensor, Tensor]:
    values, labels = features(samples)
    return torch.stack([values, values.roll(1, 0)]), labels


MAKE = {
    "features": features,
    "probabilities": probabilities,
    "logits": features,
    "source_labels": source_labels,
    "features of every source": stacked,
}
# How to make each score, and its data.
CASES: dict[str, tuple[Callable[[], Score], Callable[[int], tuple[Tensor, Tensor]]]] = {
    **{name: (cls, MAKE[cls.takes]) for name, cls in SCORES.items()},
    "n_leep": (lambda: scores.NLeep(components_per_class=2), features),
    "regularized h_score": (lambda: HScore(regularized=True), features),
    "log_me regression": (lambda: LogMe(regression=True), targets),
    "etran regression": (lambda: scores.Etran(regression=True), targets),
    "multi_source_h_score": (lambda: MultiSourceHScore(2), stacked),
    "otce": (lambda: Otce(*features(20, seed=4), regularization=None), features),
}


def part(values: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    return (values[:, rows] if values.dim() == 3 else values[rows]), labels[rows]


@pytest.fixture(autouse=True)
def needs_packages(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name == "n_leep":
        pytest.importorskip("sklearn")
    if name == "otce":
        pytest.importorskip("ot")


@pytest.mark.parametrize("samples", [5, 40])
@pytest.mark.parametrize("name", CASES)
def test_batches_merging_and_saving_equal_one_pass(name: str, samples: int) -> None:
    """Uneven batches; parts merged out of order; half of the way through a file. N <= D and N > D."""
    create, make = CASES[name]
    if samples == 5 and name in ("multi_source_h_score", "n_leep"):
        samples = 13
    values, labels = make(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)
        want = create().update(values, labels).compute()
        bounds = [0, 1, 3, max(4, samples // 2), samples]
        parts = [part(values, labels, slice(a, b)) for a, b in itertools.pairwise(bounds)]
        streamed = create().update(*part(values, labels, slice(0, 0)))
        for batch in parts:
            streamed.update(*batch)
        assert streamed.samples == samples
        assert streamed.compute() == pytest.approx(want, rel=1e-9)
        merged = create().merge(create().update(*parts[3]).update(*parts[0]))
        merged.merge(create().update(*parts[2])).merge(create().update(*parts[1]))
        if name != "n_leep":  # whose mixture starts from samples picked by their position
            assert merged.compute() == pytest.approx(want, rel=1e-9)

        half = create().update(*parts[0]).update(*parts[1])
        file = io.BytesIO()
        torch.save(half.state_dict(), file)
        file.seek(0)
        resumed = create()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.samples == 3
        resumed.update(*parts[2]).update(*parts[3])
        assert resumed.compute() == pytest.approx(want, rel=1e-9)
        assert half.samples == 3
        resumed.reset()
        assert resumed.samples == 0


@pytest.mark.parametrize("name", CASES)
def test_fit_in_the_manner_of_scikit_learn(name: str) -> None:
    create, make = CASES[name]
    values, labels = make(40)
    score = create()
    assert score.update(*make(31)).fit(values, labels) is score
    assert score.samples == 40
    assert score.score_ == pytest.approx(score.compute(), rel=1e-12)
    if values.dim() == 2:
        assert create().fit(values.tolist(), labels.tolist()).score_ == pytest.approx(score.score_, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_details_and_facts(name: str) -> None:
    create, make = CASES[name]
    values, labels = make(40)
    score = create().update(values, labels)
    details = score.details()
    assert isinstance(details, ScoreDetails)
    assert details.value == score.compute()
    assert details.samples == 40
    assert details.classes == (0 if labels.is_floating_point() or score.takes == "logits" else 3)
    assert details.warnings == ()
    assert score.higher_is_better
    assert details.rank is None or 0 < details.rank <= 6


@pytest.mark.parametrize("name", CASES)
def test_details_hold_the_warnings_that_compute_issues(name: str) -> None:
    create, make = CASES[name]
    values, labels = make(40)
    if labels.is_floating_point():
        pytest.skip("no classes")
    score = create().update(values, labels * 0)
    texts = score.details().warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score.compute()
    assert tuple(str(item.message) for item in caught) == texts
    assert all(item.filename == __file__ for item in caught)  # they point at the caller
    assert bool(texts) == (name != "energy")  # which does not look at labels


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("n_leep", "otce", "multi_source_h_score")])
def test_order_of_samples_and_names_of_classes_do_not_matter(name: str) -> None:
    create, make = CASES[name]
    values, labels = make(40)
    want = create().update(values, labels).compute()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert create().update(values[order], labels[order]).compute() == pytest.approx(want, rel=1e-9)
    if not labels.is_floating_point():
        renamed = torch.tensor([2**40, -7, 0])[labels]
        assert create().update(values, renamed).compute() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_the_function_is_the_class(name: str) -> None:
    create, make = CASES[name]
    values, labels = make(40)
    function = getattr(scores, name)
    assert SCORES[name].name == name
    assert getattr(scores, name.title().replace("_", "")) is SCORES[name]
    if name == "n_leep":
        assert function(values, labels, components_per_class=2) == create().update(values, labels).compute()
    else:
        assert function(values.numpy(), labels.numpy()) == pytest.approx(
            create().update(values, labels).compute(), rel=1e-12
        )


@pytest.mark.parametrize("samples", [4, 40])
def test_merging_a_score_with_itself_doubles_its_samples(samples: int) -> None:
    values, labels = features(samples)
    for score in (HScore(regularized=True), Knn(metric="euclidean")):
        score.update(values, labels).merge(score)
        again = type(score)(**({"regularized": True} if isinstance(score, HScore) else {"metric": "euclidean"}))
        again.update(torch.cat([values, values]), torch.cat([labels, labels]))
        assert score.samples == 2 * samples
        assert score.compute() == pytest.approx(again.compute(), rel=1e-9)


def test_state_of_another_score_is_refused() -> None:
    state = Knn().update(*features(10)).state_dict()
    for score in (Knn(neighbors=2), TransRate(), HScore()):
        with pytest.raises(ValueError, match=r"state: expected that of \{'score'"):
            score.load_state_dict(state)
        assert score.samples == 0


# Collections


@pytest.mark.parametrize("samples", [5, 40])
def test_collection_equals_single_scores(samples: int) -> None:
    values, labels = features(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)
        together = score_all(values, labels)
        assert list(together) == [
            name for name, cls in SCORES.items() if cls.takes == "features" and cls.requires is None
        ]
        streamed = ScoreCollection().update(values[:3], labels[:3])
        streamed.merge(ScoreCollection().update(values[3:], labels[3:]))
        state = streamed.state_dict()
        loaded = ScoreCollection()
        loaded.load_state_dict(state)
        assert loaded.samples == streamed.samples == samples
        for name, value in together.items():
            want = SCORES[name]().update(values, labels).compute()
            assert value == pytest.approx(want, rel=1e-9)
            assert loaded.compute()[name] == pytest.approx(want, rel=1e-9)
    streamed.reset()
    assert streamed.samples == 0


def test_collection_shares_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of all samples are made once, whatever the number of scores; rows are kept only where needed."""
    values, labels = features(40)
    made = []
    original = FeatureMoments.of
    monkeypatch.setattr(
        FeatureMoments, "of", staticmethod(lambda *a, **k: (made.append(len(a[0])), original(*a, **k))[1])
    )
    chosen = {
        "h_score": HScore(),
        "regularized": HScore(regularized=True),
        "log_me": LogMe(),
        "trans_rate": TransRate(),
        "knn": Knn(),
        "gbc": scores.Gbc(),
    }
    score_all(values, labels, chosen)
    assert made == [40]
    lean = ScoreCollection({name: chosen[name] for name in ("h_score", "regularized", "log_me")})
    made.clear()
    assert lean.update(values, labels).compute()["h_score"] == HScore().update(values, labels).compute()
    assert "rows" not in lean.state_dict()["data"]
    assert "rows" in ScoreCollection(["knn"]).state_dict()["data"]


def test_collection_warns_for_each_score() -> None:
    values, labels = features(40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score_all(values, labels * 0, ["h_score", "trans_rate"])
    assert [str(item.message).split(":")[0] for item in caught] == ["h_score", "trans_rate"]
    assert all(item.filename == __file__ for item in caught)


# Several processes


def test_all_reduce_needs_a_group() -> None:
    for score in (HScore(), Knn()):
        with pytest.raises(ValueError, match=r"group: expected torch\.distributed to be initialised"):
            score.all_reduce()


def test_all_reduce_over_two_processes(tmp_path: Path) -> None:
    """Parts of different sizes, means and classes; few samples (rows are gathered) and many; an idle process."""
    script = tmp_path / "reduce.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, warnings
            sys.path.insert(0, sys.argv[3])
            import torch, torch.distributed as dist
            from test_scores_interface import CASES, MultiSourceHScore, ScoreCollection, features, part
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            rank, path = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
            names = "h_score", "regularized h_score", "log_me regression", "knn", "leep", "multi_source_h_score"
            for name in names:
                create, make = CASES[name]
                for samples, split in ((40, 13), (5, 2), (40, 40), (40, 38)):
                    if samples == 5 and name == "multi_source_h_score":
                        continue
                    values, labels = make(samples)
                    order = labels.argsort(stable=True) if labels.dim() == 1 else torch.arange(samples)
                    values = values[:, order] if values.dim() == 3 else values[order]
                    labels = labels[order]
                    score = create()
                    if rank == 0 or split < samples:
                        score.update(*part(values, labels, slice(0, split) if rank == 0 else slice(split, samples)))
                    got, want = score.all_reduce().compute(), create().update(values, labels).compute()
                    assert score.samples == samples, (name, score.samples)
                    assert abs(got - want) <= 1e-9 * abs(want), (name, samples, split, got, want)
            values, labels = features(40)
            mine = slice(0, 9) if rank == 0 else slice(9, 40)
            got = ScoreCollection(["h_score", "log_me"]).update(values[mine], labels[mine]).all_reduce().compute()
            want = ScoreCollection(["h_score", "log_me"]).update(values, labels).compute()
            assert all(abs(got[k] - want[k]) < 1e-9 for k in want)
            # Computed before: the few samples are still rows.
            values, labels = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
            score = MultiSourceHScore(2, shrinkage=0.5).update(values[:, rank::2], labels[rank::2])
            score.compute()
            want = MultiSourceHScore(2, shrinkage=0.5).update(values, labels).compute()
            assert abs(score.all_reduce().compute() - want) < 1e-9 and score.samples == 6
            # No samples anywhere; and dimensions that disagree.
            assert CASES["h_score"][0]().all_reduce().samples == 0
            for name in ("h_score", "knn"):
                try:
                    CASES[name][0]().update(*features(9, dim=3 + rank)).all_reduce()
                    raise SystemExit("not refused")
                except ValueError as error:
                    assert "in every process, got" in str(error), error
            dist.barrier()
            print("reduced", flush=True)
            os._exit(0)  # gloo's threads do not always survive the interpreter's own way out
            """
        )
    )
    command = [sys.executable, str(script)]
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "reduced" in out


def test_numpy_arrays_and_half_precision() -> None:
    """float16 features give the score of their values."""
    values, labels = features(60)
    for name, cls in SCORES.items():
        if cls.takes == "features" and name != "n_leep":
            half = values.half()
            assert cls().update(half, labels).compute() == pytest.approx(
                cls().update(half.double().numpy(), labels.numpy().astype(np.uint8)).compute(), rel=1e-6
            )


def test_any_strides() -> None:
    values, labels = features(40)
    wide = torch.stack([values, values], 2).flatten(1)[:, ::2]
    for name, cls in SCORES.items():
        if cls.takes == "features" and name != "n_leep":
            assert not wide.is_contiguous()
            assert cls().update(wide, labels).compute() == cls().update(values, labels).compute()


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (
        lambda: ScoreCollection(["h_scor"]),
        "scores: expected names among h_score, log_me, trans_rate, knn, gbc, sfda, etran, parc, n_leep, got 'h_scor'",
    ),
    "other input": (
        lambda: ScoreCollection(["leep"]),
        "scores: expected names among h_score, log_me, trans_rate, knn, gbc, sfda, etran, parc, n_leep, got 'leep'",
    ),
    "targets": (
        lambda: ScoreCollection({"a": LogMe(regression=True)}),
        "scores: expected scores of features and class labels, got a: LogMe",
    ),
    "used": (
        lambda: ScoreCollection({"a": HScore().update(*features(9))}),
        "scores: expected scores that have seen no samples, got a with 9",
    ),
    "none": (lambda: ScoreCollection([]), "scores: expected at least one score, got none"),
    "no samples": (
        lambda: ScoreCollection(["knn"]).compute(),
        "features: expected at least one sample before the scores are computed, got none",
    ),
    "merge": (
        lambda: ScoreCollection(["knn"]).merge(ScoreCollection(["h_score"])),
        "other: expected a ScoreCollection of knn with the same options, got ScoreCollection",
    ),
    "state": (
        lambda: ScoreCollection(["knn"]).load_state_dict({}),
        "state: expected that of a ScoreCollection of knn with the same options, got dict",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_of_a_collection_is_refused(case: str) -> None:
    call, message = MISUSE[case]
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [5, 40])
@pytest.mark.parametrize("name", CASES)
def test_gpu_agrees_with_cpu(name: str, samples: int) -> None:
    create, make = CASES[name]
    if samples == 5 and name in ("multi_source_h_score", "n_leep"):
        samples = 13
    values, labels = make(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)
        want = create().update(values, labels).compute()
        score = Otce(*(x.cuda() for x in features(20, seed=4)), regularization=None) if name == "otce" else create()
        got = score.update(values.cuda(), labels.cuda())
        assert got.compute() == pytest.approx(want, rel=1e-8)
        resumed = create()
        resumed.load_state_dict(got.state_dict())
        assert resumed.compute() == pytest.approx(want, rel=1e-8)
