"""Ops from many threads, in forked workers, with any number of OpenMP threads: the same bits, and no memory kept."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transferops import ops
from transferops.otqms import allocate
from transferops.scores import h_score


def _problem() -> dict[str, Callable[[], list[Tensor]]]:
    """Every op once, on sizes that several threads share."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, labels = some(3000, 70), torch.randint(5, (3000,), generator=generator)
    a, b, moves = some(40, 9, 50), some(40, 9, 30), some(3, 30, 50)
    image, signal, kernels = some(6, 4, 12, 12), some(6, 8, 12, 12), some(2, 8, 4, 3, 3)
    rows, logits, tangents = some(30, 5000), some(200, 17), some(4, 200, 17)
    lists = [[some(64, 65), some(7)] for _ in range(3)]
    probabilities = some(500, 12).softmax(1)

    def expectation() -> list[Tensor]:
        means = [torch.zeros_like(value) for value in lists[0]]
        squares = [torch.zeros_like(value) for value in lists[0]]
        for count, gradients in enumerate(lists):
            ops.gradient_expectation_(means, squares, gradients, count)
        return means + squares

    def joint_expectation() -> list[Tensor]:
        means = [[torch.zeros_like(value) for value in tensors] for tensors in lists]
        return [ops.gradient_expectation_gram_(means, None, lists, [0, 0, 0]), *(m for part in means for m in part)]

    return {
        "class_moments": lambda: list(ops.class_moments(x, labels, 5)),
        "sample_gram": lambda: list(ops.sample_gram(x[:200])),
        "norm_moments": lambda: list(ops.norm_moments(x, x.double().mean(0))),
        "empirical_prediction": lambda: list(ops.empirical_prediction(probabilities, labels[:500], 5)),
        "linear_fisher_diagonal": lambda: [ops.linear_fisher_diagonal(a, b)],
        "linear_fisher_projection": lambda: [ops.linear_fisher_projection(a, b, moves)],
        "linear_grad_norm": lambda: [ops.linear_grad_norm(a, b)],
        "conv_fisher_diagonal": lambda: [ops.conv_fisher_diagonal(image, signal, (3, 3), 1, 1)],
        "conv_fisher_projection": lambda: [ops.conv_fisher_projection(image, signal, kernels, (3, 3), 1, 1)],
        "conv_grad_norm": lambda: [ops.conv_grad_norm(image, signal, (3, 3), 1, 1)],
        "softmax_fisher_gram": lambda: [ops.softmax_fisher_gram(logits, tangents)],
        "gradient_expectation_": expectation,
        "gradient_expectation_gram_": joint_expectation,
        "gradient_gram": lambda: [ops.gradient_gram(lists)],
        "weighted_gram": lambda: [ops.weighted_gram(rows, rows[0].abs(), rows[1])],
        "gradient_fisher_gram": lambda: list(ops.gradient_fisher_gram(rows, rows[:3])),
    }


PROBLEM = _problem()


def _bits(name: str) -> str:
    digest = hashlib.sha256()
    for value in PROBLEM[name]():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _all_bits(_: int = 0) -> dict[str, str]:
    return {name: _bits(name) for name in PROBLEM}


def test_every_op_is_here() -> None:
    assert set(PROBLEM) == {name for name in ops.__all__ if name.islower()}


def test_from_many_threads() -> None:
    expected = _all_bits()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(_all_bits, range(16)):
            assert found == expected


def test_scores_and_allocations_from_many_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(200, 20, generator=generator), torch.randint(3, (200,), generator=generator)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)

    def both(_: int) -> tuple[float, list[float]]:
        return h_score(features, labels), allocate(root.mT @ root, 20, [50] * 4, 30).quantities.tolist()

    expected = both(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(both, range(32)))


def test_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(_all_bits())
    finally:
        torch.set_num_threads(before)
    assert all(bits == found[0] for bits in found)


class _Forked(torch.utils.data.Dataset[str]):
    def __getitem__(self, index: int) -> str:
        return repr(_all_bits())

    def __len__(self) -> int:
        return 4


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one processor
def test_in_forked_workers_of_a_loader() -> None:
    """After OpenMP has run in the parent. A worker has one thread, which torch sees to."""
    expected = repr(_all_bits())
    loader = torch.utils.data.DataLoader(_Forked(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [expected] * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_no_memory_is_kept() -> None:
    """10,000 calls. The bound is what the allocator is seen to move by: a few hundred pages, 0.5 KiB a call."""
    small = torch.randn(20, 6)
    labels = torch.randint(3, (20,))
    image, signal = torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5)
    mean = [torch.zeros(20, 6)]

    def calls(times: int) -> None:
        for count in range(times):
            ops.class_moments(small, labels, 3)
            ops.linear_fisher_diagonal(small, small)
            ops.conv_grad_norm(image, signal, (3, 3), 1, 1)
            ops.gradient_expectation_(mean, None, [small], count)
            ops.softmax_fisher_gram(small, small.unsqueeze(0))

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls(400)
    before = resident()
    calls(2000)
    grown = resident() - before
    torch.set_num_threads(threads)
    assert grown < 5 << 20


def test_nothing_depends_on_calls_before() -> None:
    """In a fresh process, in the opposite order."""
    program = (
        "import sys; sys.path[0] = sys.argv[1]; import test_concurrency as t;"
        "print(sorted((name, t._bits(name)) for name in reversed(t.PROBLEM)))"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(sorted(_all_bits().items()))
