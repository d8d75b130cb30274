"""The simulated two-layer ReLU CNNs against the same networks trained by autograd, and the index."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from transferops.adapt import TransferSetting, gamma_index, paired_effects, simulate
from transferops.adapt.simulation import _Batch, _descend

SMALL = TransferSetting(
    1.5, 12, 5, upstream_signal=0.7, downstream_signal=1.2, upstream_noise=0.8, downstream_noise=1.3, dimension=9
)


def forward(weights: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """f(x) of the definition; weights [m, d], samples [N, 2, d]."""
    half = len(weights) // 2
    answers = (samples @ weights.T).relu().sum(1)
    return (answers[:, :half].sum(1) - answers[:, half:].sum(1)) / half


def test_descent_is_gradient_descent_on_the_definition() -> None:
    batch = _Batch([SMALL, TransferSetting(0.3, 12, 5, dimension=9)], [3, 4], 6, 0.1, 10)
    for task in (batch.upstream, batch.downstream):
        reached = _descend(batch.first, task, task.noise @ task.noise.mT, batch.signs, 0.05, 25)
        for network in range(2):
            weights = batch.first[network].double().requires_grad_()
            labels = task.labels[network].double()
            signal = labels[:, None] * task.signal[network].double()
            samples = torch.stack([signal, task.noise[network].double()], 1)
            for _ in range(25):
                loss = torch.nn.functional.softplus(-labels * forward(weights, samples)).sum()
                (gradient,) = torch.autograd.grad(loss, weights)
                weights = (weights - 0.05 * gradient).detach().requires_grad_()
            # 25 float32 steps on numbers of order 1.
            torch.testing.assert_close(reached[network].double(), weights.detach(), rtol=0, atol=25 * 1e-6)


def test_data_are_those_of_the_model() -> None:
    batch = _Batch([TransferSetting(1.5, 4000, 50, 0.7, 1.2, 0.8, 1.3, 6)], [0], 4, 0.1, 10)
    noise = batch.upstream.noise[0]
    assert not noise[:, :3].any()
    assert noise[:, 3:].std() == pytest.approx(0.8, rel=5 / math.sqrt(2 * noise[:, 3:].numel()))
    assert batch.downstream.noise[0, :, 3:].std() == pytest.approx(1.3, rel=5 / math.sqrt(2 * 150))
    first, second = batch.upstream.signal[0], batch.downstream.signal[0]
    assert first @ second == pytest.approx(1.5**2)
    assert first @ first == pytest.approx(1.5**2 + 0.7**2)
    assert second @ second == pytest.approx(1.5**2 + 1.2**2)
    assert set(batch.upstream.labels.unique().tolist()) == {-1.0, 1.0}
    assert abs(batch.upstream.labels.mean()) < 5 / math.sqrt(4000)


def test_accuracy_is_that_on_drawn_samples() -> None:
    """The shortcut through m inner products against 20000 samples drawn in d dimensions."""
    batch = _Batch([SMALL], [5], 6, 0.3, 20000)
    weights = batch.fresh + 0.6 * batch.downstream.signal[:, None] * (batch.signs[:, None] > 0)
    (fast,) = batch._accuracy(weights).tolist()
    generator = torch.Generator().manual_seed(0)
    noise = 1.3 * torch.randn(20000, 9, generator=generator)
    noise[:, :3] = 0
    labels = torch.randint(0, 2, (20000,), generator=generator) * 2 - 1.0
    samples = torch.stack([labels[:, None] * batch.downstream.signal[0], noise], 1)
    slow = (forward(weights[0], samples) * labels > 0).float().mean().item()
    assert 0.6 < slow < 0.99
    assert fast == pytest.approx(slow, abs=5 * math.sqrt(2 * 0.25 / 20000))


def test_chunks_seeds_and_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [TransferSetting(u, n, 5, dimension=40) for u in (0.0, 2.0) for n in (10, 30)]
    options = {"steps": 20, "test_samples": 500}
    calls: list[tuple[int, int]] = []
    result = simulate(settings, (0, 0.5), (0, 1, 2), on_progress=lambda *at: calls.append(at), **options)
    assert result.shape == (4, 2, 3)
    assert result.dtype == torch.float64
    assert calls[-1] == (12, 12)
    monkeypatch.setattr("transferops.adapt.simulation._CHUNK_ELEMENTS", 1)
    again = simulate(settings[::-1], (0.5, 0), (2, 0, 1), **options).flip(0, 1)[:, :, [1, 2, 0]]
    torch.testing.assert_close(result, again, rtol=0, atol=2 / 500)  # batched products may round differently


def test_alpha_zero_does_not_depend_on_the_upstream_task() -> None:
    settings = [
        TransferSetting(1.0, 20, 5, upstream_signal=v, upstream_noise=s, dimension=50) for v, s in ((1, 1), (3, 2))
    ]
    result = simulate(settings, (0, 1), (0, 1), steps=30)
    assert torch.equal(result[0, 0], result[1, 0])
    assert not torch.equal(result[0, 1], result[1, 1])


def test_known_verdicts() -> None:
    """No shared signal hurts, a strong one helps, with 20 seeds."""
    accuracy = simulate([TransferSetting(0.0), TransferSetting(2.0)], (0, 0.5), range(20))
    (hurts,), (helps,) = (paired_effects(values, (0, 0.5)) for values in accuracy)
    assert hurts.verdict == "negative"
    assert helps.verdict == "positive"
    # Scratch accuracies .81 and .93, and .985 at |u| = 2, are known from an independent simulation.
    assert accuracy[:, 0].mean(1).tolist() == pytest.approx([0.81, 0.93], abs=0.03)
    assert helps.metric == pytest.approx(0.985, abs=0.02)


def test_index() -> None:
    setting = TransferSetting(1.0)
    # S = 20 * 5 / 1000 + 0.5 * 200 / 1000, T^2 = 20/1000 + 0.25 * 200/1000 + 0.25 * 200^2 * 4 / 1000^2
    assert gamma_index(setting, 0.5) == pytest.approx(0.2**2 / (0.02 + 0.05 + 0.04), rel=1e-12)
    assert gamma_index(setting, 0) == pytest.approx(0.1**2 / 0.02, rel=1e-12)
    assert gamma_index(TransferSetting(0.0), 0.5) < gamma_index(TransferSetting(0.0), 0)
    assert gamma_index(TransferSetting(2.0), 0.5) > gamma_index(TransferSetting(2.0), 0)


def test_heat_maps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from transferops.adapt.transfer_plots import plot_transfer_maps

    path = tmp_path / "maps.png"
    plot_transfer_maps(torch.randn(2, 3, 4), (10, 20), (0, 1, 2), (0.25, 0.5, 0.75, 1), path)
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"difference: expected shape \[2, 3, 4\], got \[3, 2, 4\]"):
        plot_transfer_maps(torch.randn(3, 2, 4), (10, 20), (0, 1, 2), (0.25, 0.5, 0.75, 1), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shared": -1.0}, "shared: expected a finite number of at least 0, got -1.0"),
        ({"shared": math.nan}, "shared: expected a finite number"),
        ({"shared": 1.0, "upstream_samples": 0}, "upstream_samples: expected an integer of at least 1, got 0"),
        ({"shared": 1.0, "dimension": 3}, "dimension: expected an integer of at least 4, got 3"),
        ({"shared": 1.0, "downstream_noise": 0}, "downstream_noise: expected a positive number, got 0"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferSetting(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": []}, "settings: expected at least one, got none"),
        ({"alphas": (0, 2)}, r"alphas: expected a number in \[0, 1\], got 2"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"filters": 5}, "filters: expected an even number, got 5"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"initial_scale": math.inf}, "initial_scale: expected a positive number, got inf"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    arguments = {"settings": [SMALL], "alphas": (0, 1), "seeds": (0,), **options}
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)
