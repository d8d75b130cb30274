"""Compiles CUDA kernels for the CPU and runs them: the Python side of harness.cpp and cuda_emulation.h."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
MOMENTS = KERNELS / "moments.cu"
CENTRING = KERNELS / "centring.cu"
HARNESS = HERE / "harness.cpp"

FUNCTIONS = ("class_sums", "gram", "sample_gram", "norm_moments", "centred_class_sums")
TYPES = ("float32", "float64", "float16", "bfloat16")
ORDERS = ("forward", "backward", "shuffled")

COMPILER = os.environ.get("CXX", "g++")
NO_COMPILER = f"needs a C++20 compiler: {COMPILER} is not on PATH" if shutil.which(COMPILER) is None else None

ADDRESS_SANITIZER = "-fsanitize=address"


def compile_object(target: Path, source: Path, *options: str, includes: Path = KERNELS) -> Path:
    """Compiles ``source`` (.cpp, or .cu as C++) with the emulation, under AddressSanitizer."""
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    command = [COMPILER, "-std=c++20", "-O1", *warnings, ADDRESS_SANITIZER, *options]
    command += [f"-I{HERE / 'emulation'}", f"-I{includes}", "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def link(program: Path, *objects: Path) -> Path:
    subprocess.run([COMPILER, ADDRESS_SANITIZER, *map(str, objects), "-o", str(program)], check=True)
    return program


@dataclass(frozen=True)
class Features:
    """``stored`` [sets, rows, columns], and how it lies in memory; 16-bit types are stored as their bits."""

    stored: np.ndarray
    type: str = "float32"
    row_stride: int = 0  # 0: contiguous
    set_stride: int = 0
    displacement: int = 0  # of the first element from an aligned address, in elements
    shift: np.ndarray | None = None  # [sets, columns]

    @classmethod
    def of(cls, values: np.ndarray, type: str = "float32", **layout) -> Features:
        """Rounds ``values`` to ``type`` (bfloat16: towards zero)."""
        if type == "bfloat16":
            return cls((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), type, **layout)
        stored = values.astype(type)
        return cls(stored.view(np.uint16) if type == "float16" else stored, type, **layout)

    @property
    def values(self) -> np.ndarray:
        if self.type == "bfloat16":
            stored = (self.stored.astype(np.uint32) << 16).view(np.float32)
        else:
            stored = self.stored.view(np.float16) if self.type == "float16" else self.stored
        with np.errstate(invalid="ignore"):  # signalling NaN among all the bit patterns
            return stored.astype(np.float64)

    @property
    def shifted(self) -> np.ndarray:
        """What the kernels compute with: values minus shift, rounded to float64 once."""
        return self.values if self.shift is None else self.values - self.shift[:, None, :]


class EmulationError(RuntimeError):
    """The emulated kernel ended the process (an invalid access, a divergent barrier), or failed to launch."""


class Emulator:
    """A process that runs kernels in the emulation, started when it is first needed."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.workspace = 0  # doubles, of the latest run

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def run(
        self,
        function: str,
        features: Features,
        *,
        labels: np.ndarray | None = None,
        classes: int = 0,
        multiprocessors: int = 4,
        order: str = "forward",
        seed: int = 0,
    ) -> tuple[np.ndarray, ...]:
        """The outputs of ``function``; raises EmulationError where the process dies."""
        sets, rows, columns = features.stored.shape
        row_stride = features.row_stride or columns
        request = struct.pack(
            "13q",
            FUNCTIONS.index(function),
            TYPES.index(features.type),
            ORDERS.index(order),
            seed,
            sets,
            rows,
            columns,
            features.set_stride or rows * row_stride,
            row_stride,
            features.displacement,
            classes,
            multiprocessors,
            features.shift is not None,
        )
        request += features.stored.tobytes()
        if features.shift is not None:
            request += features.shift.astype(np.float64).tobytes()
        if function in ("class_sums", "centred_class_sums"):
            ordered = np.sort(labels)
            offsets = np.searchsorted(ordered, np.arange(classes + 1))
            request += np.argsort(labels, kind="stable").astype(np.int64).tobytes()
            request += (offsets if function == "class_sums" else ordered).astype(np.int64).tobytes()
        shapes = {
            "class_sums": [(sets, classes, columns)],
            "gram": [(sets, columns, columns)],
            "sample_gram": [(sets, rows, rows)],
            "norm_moments": [(sets, columns), (sets,)],
            "centred_class_sums": [(classes,), (sets, classes, columns), (sets, columns)],
        }[function]

        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([self.program], stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            status, self.workspace = struct.unpack("2q", self._read(16))
            outputs = tuple(self._read_array(shape) for shape in shapes)
        except (EOFError, BrokenPipeError):
            message = self.process.stderr.read().decode(errors="replace")
            self.close()
            raise EmulationError(message) from None
        if status != 0:
            raise EmulationError(f"{function} returned CUDA error {status}")
        return outputs

    def _read_array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self._read(8 * int(np.prod(shape)))).reshape(shape)

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data
