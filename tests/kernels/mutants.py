"""Kernels with one mistake put in: a barrier left out, a bound off by one. The tests have to notice each of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emulator import ADDRESS, KERNELS, ORDERS, ROOT, EmulationError, Emulator, compile_object, disagreement, link


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

    sources: tuple[Path, ...]  # the mutated .cu file first, the harness last
    files: tuple[str, ...]  # whose barriers are left out
    changes: tuple[tuple[str, str, str, str], ...]  # name, file, old, new
    emulator: type[Emulator]
    cases: Callable[[], list[Case]]
    type: str = "float"

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

    def symptoms(self, folder: Path) -> dict[str, str | None]:
        """What is wrong with each mutant in any case and thread order, and with the kernels as they are ("none")."""
        kernel, *others = self.sources
        objects = [
            compile_object(folder / f"{s.stem}.o", s, f"-DONLY_TYPE={self.type}", sanitizers=ADDRESS) for s in others
        ]
        cases = self.cases()

        def examine(index: int, mutant: Mutant | None) -> str | None:
            copy = folder / str(index) / "cuda"
            shutil.copytree(KERNELS, copy)
            shutil.copy(ROOT / "csrc" / "kernels" / "scalar.h", copy.parent)
            if mutant:
                text = (copy / mutant.file).read_text()
                end = mutant.position + len(mutant.old)
                (copy / mutant.file).write_text(text[: mutant.position] + mutant.new + text[end:])
            source = copy / kernel.name
            unused = re.compile(rf"^TRANSFEROPS_INSTANTIATE\((?!{self.type}\)).*\n", re.MULTILINE)
            source.write_text(unused.sub("", source.read_text()))
            compiled = compile_object(copy / "kernel.o", source, "-Wno-error", includes=copy, sanitizers=ADDRESS)
            with self.emulator(link(copy / "program", compiled, *objects, sanitizers=ADDRESS)) as emulator:
                return next(symptoms_of(emulator, cases), None)

        mutants = self.mutants()
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(examine, range(len(mutants) + 1), [None, *mutants])
            return dict(zip(["none", *(mutant.name for mutant in mutants)], found, strict=True))


def symptoms_of(emulator: Emulator, cases: list[Case]) -> Iterable[str]:
    for case in cases:
        for order in ORDERS:
            try:
                wrong = disagreement(case.run(emulator, order), case.references)
            except EmulationError as error:
                wrong = str(error)
            if wrong:
                yield f"{case.name}, {order}: {wrong}"
