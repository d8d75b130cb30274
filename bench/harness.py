"""How every benchmark here measures: contenders take turns in one run, the minimum counts, memory is the kernel's word.

Minimum over rounds because noise on a shared machine only ever adds time; turns because a slow moment then hits all
contenders alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

Contender = Callable[[], object]


def interleaved_minimum(
    contenders: dict[str, Contender], seconds: float = 3.0, rounds: int = 25, slow: float = float("inf")
) -> dict[str, float]:
    """Seconds of each contender's fastest call.

    Each gets at least 3 turns, or 1 if that took more than ``slow`` seconds, then as many as fit ``seconds`` each.
    """
    best = dict.fromkeys(contenders, float("inf"))
    spent = dict.fromkeys(contenders, 0.0)
    for turn in range(rounds):
        for name, call in contenders.items():
            if turn >= (1 if best[name] > slow else 3) and spent[name] > seconds:
                continue
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            best[name] = min(best[name], elapsed)
            spent[name] += elapsed
    return best


def peak_megabytes(call: Contender) -> float | None:
    """Growth of the resident set at its highest during one call (Linux; None elsewhere)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or memory kept by the allocator would hide what the call needs
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def sgemm_rate() -> float:
    """Operations per second of torch's float32 matrix product on this machine, with the threads in force."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty(2048, 2048)
    best = interleaved_minimum({"sgemm": lambda: torch.mm(left, right, out=out)}, seconds=2)
    return 2 * 2048**3 / best["sgemm"]


def compare(
    benchmark: Any,
    ours: Contender,
    peers: dict[str, Contender],
    *,
    floor: float | tuple[Contender, float],
    sizes: dict[str, int],
    values: dict[str, float],
    slow: float = float("inf"),
) -> None:
    """Record one row: our time and memory, every peer's, the ratio to the best peer, and the floor.

    Args:
        benchmark: the pytest-benchmark fixture; its own statistics are of ``ours`` alone.
        ours, peers: calls on the same inputs.
        floor: seconds that the unavoidable operations or bytes take at this machine's measured rate; or a call that
            moves bytes and how many times its seconds are the floor, which then takes turns with the others: the rate
            of memory that others use as well changes within minutes.
        sizes: what the inputs were.
        values: results to put on record (errors, scores).
        slow: seconds of a call beyond which one is enough, as in :func:`interleaved_minimum`.
    """
    moves = {"floor": floor[0]} if isinstance(floor, tuple) else {}
    seconds = interleaved_minimum({"ours": ours, **peers, **moves}, slow=slow)
    floor_seconds = seconds.pop("floor") * floor[1] if isinstance(floor, tuple) else floor
    best_peer = min(peers, key=lambda name: seconds[name])
    benchmark.extra_info.update(
        sizes=sizes,
        threads=torch.get_num_threads(),
        seconds=seconds,
        megabytes={name: peak_megabytes(call) for name, call in {"ours": ours, **peers}.items()},
        best_peer=best_peer,
        times_faster=seconds[best_peer] / seconds["ours"],
        floor_seconds=floor_seconds,
        times_floor=seconds["ours"] / floor_seconds,
        values=values,
    )
    slow = seconds["ours"] > 2  # its own statistics are not worth minutes then
    benchmark.pedantic(ours, rounds=1 if slow else 5, warmup_rounds=0 if slow else 1)
