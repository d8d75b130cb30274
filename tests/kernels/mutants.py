"""Kernels with one mistake put in: a barrier left out, a bound off by one. The tests have to notice each of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emulator import ADDRESS, KERNELS, ORDERS, ROOT, EmulationError, Emulator, compile_object, disagreement, link

SHARE = 1 if os.environ.get("TRANSFEROPS_MUTANTS") == "all" else 48
"""Each has to be compiled: the tests try one in 48, and `make mutants` all."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    position: int  # of what is replaced
    old: str
    new: str


@dataclass(frozen=True)
class Case:
    """A run of the kernels: every loop and every tail of every kernel has to be in some case of a family."""

    name: str
    run: Callable[..., tuple[np.ndarray, ...]]  # of an emulator and an order
    references: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Family:
    """What is mutated and how it is run. For speed, of one element type and under AddressSanitizer alone."""

    sources: tuple[Path, ...]  # kernels, and the harness last
    files: tuple[str, ...]  # whose barriers are left out
    changes: tuple[tuple[str, str, str, str], ...]  # name, file, old, new
    emulator: type[Emulator]
    cases: Callable[[], list[Case]]
    type: str = "float"
    others: tuple[str, ...] = ()  # types that kernels of this one need of others

    def mutants(self) -> list[Mutant]:
        mutants = []
        for file in self.files:
            text = (KERNELS / file).read_text()
            for match in re.finditer(r"__sync(?:threads|warp)\(\);", text):
                line = text.count("\n", 0, match.start()) + 1
                mutants.append(Mutant(f"no barrier in {file}:{line}", file, match.start(), match.group(), ";"))
        for name, file, old, new in self.changes:
            text = (KERNELS / file).read_text()
            assert text.count(old) == 1, f"{name}: expected one {old!r} in {file}, found {text.count(old)}"
            mutants.append(Mutant(name, file, text.index(old), old, new))
        return mutants

    def symptoms(self, folder: Path, mutants: list[Mutant]) -> dict[str, str | None]:
        """What is wrong with each of these in any case and order of threads; "none": with the kernels as they are."""
        *kernels, harness = self.sources
        harness = compile_object(folder / "harness.o", harness, f"-DONLY_TYPE={self.type}", sanitizers=ADDRESS)
        kept = "|".join((self.type, *self.others))
        unused = re.compile(rf"^TRANSFEROPS_INSTANTIATE\((?!(?:{kept})\)).*\n", re.MULTILINE)
        cases = self.cases()

        def compile_kernel(copy: Path, kernel: Path) -> Path:
            source = copy / kernel.name
            source.write_text(unused.sub("", source.read_text()))
            return compile_object(copy / f"{kernel.stem}.o", source, "-Wno-error", includes=copy, sanitizers=ADDRESS)

        originals = copy_kernels(folder / "originals")
        with ThreadPoolExecutor(2) as pool:
            objects = dict(
                zip(kernels, pool.map(lambda kernel: compile_kernel(originals, kernel), kernels), strict=True)
            )

        def examine(index: int, mutant: Mutant | None) -> str | None:
            copy = copy_kernels(folder / str(index))
            parts = dict(objects)
            if mutant:
                text = (copy / mutant.file).read_text()
                end = mutant.position + len(mutant.old)
                (copy / mutant.file).write_text(text[: mutant.position] + mutant.new + text[end:])
                changed = [kernel for kernel in kernels if depends_on(kernel, mutant.file)]
                parts |= {kernel: compile_kernel(copy, kernel) for kernel in changed}
            with self.emulator(link(copy / "program", *parts.values(), harness, sanitizers=ADDRESS)) as emulator:
                return next(symptoms_of(emulator, cases), None)

        with ThreadPoolExecutor(2) as pool:
            found = pool.map(examine, range(len(mutants) + 1), [None, *mutants])
            return dict(zip(["none", *(mutant.name for mutant in mutants)], found, strict=True))


def tried(families: dict[str, Family]) -> dict[str, list[Mutant]]:
    """Those of this run, one in so many of all families together; families that have one."""
    mutants = [(name, mutant) for name, family in families.items() for mutant in family.mutants()]
    chosen: dict[str, list[Mutant]] = {}
    for name, mutant in mutants[::SHARE]:
        chosen.setdefault(name, []).append(mutant)
    return chosen


def copy_kernels(folder: Path) -> Path:
    """The CUDA kernels and what they include, below ``folder``."""
    copy = folder / "cuda"
    shutil.copytree(KERNELS, copy)
    shutil.copy(ROOT / "csrc" / "kernels" / "scalar.h", folder)
    return copy


def depends_on(source: Path, file: str) -> bool:
    headers = re.findall(r'^#include "(\w+\.h)"', source.read_text(), re.MULTILINE)
    return source.name == file or any(depends_on(source.parent / header, file) for header in headers)


def symptoms_of(emulator: Emulator, cases: list[Case]) -> Iterable[str]:
    for case in cases:
        for order in ORDERS:
            try:
                wrong = disagreement(case.run(emulator, order), case.references)
            except EmulationError as error:
                wrong = str(error)
            if wrong:
                yield f"{case.name}, {order}: {wrong}"
