"""Compiles CUDA kernels for the CPU and runs them: the Python side of harness.h and cuda_emulation.h."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"

TYPES = ("float32", "float64", "float16", "bfloat16")
ORDERS = ("forward", "backward", "shuffled")

COMPILER = os.environ.get("CXX", "g++")
NO_COMPILER = f"needs a C++20 compiler: {COMPILER} is not on PATH" if shutil.which(COMPILER) is None else None

ADDRESS = ("-fsanitize=address",)
# Without checks that double the time to compile: of pointers, whose use AddressSanitizer checks.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=undefined",
)


def compile_object(
    target: Path, source: Path, *options: str, includes: Path = KERNELS, sanitizers: Sequence[str] = SANITIZERS
) -> Path:
    """Compiles ``source`` (.cpp, or .cu as C++) with the emulation and ``sanitizers``."""
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    folders = (f"-I{folder}" for folder in (HERE / "emulation", HERE, includes))
    command = [COMPILER, "-std=c++20", "-O1", *warnings, *sanitizers, *options, *folders]
    command += ["-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def link(program: Path, *objects: Path, sanitizers: Sequence[str] = SANITIZERS) -> Path:
    subprocess.run([COMPILER, *sanitizers, *map(str, objects), "-o", str(program)], check=True)
    return program


def build(folder: Path, sources: tuple[Path, ...]) -> Path:
    """A program of these sources, with line numbers in what the sanitizers report."""
    objects = [compile_object(folder / f"{source.stem}.o", source, "-g1") for source in sources]
    return link(folder / "program", *objects)


def encode(values: np.ndarray, type: str) -> np.ndarray:
    """``values`` rounded to ``type`` (bfloat16: towards zero); 16-bit types as their bits."""
    if type == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    stored = values.astype(type)
    return stored.view(np.uint16) if type == "float16" else stored


def decode(stored: np.ndarray, type: str) -> np.ndarray:
    """What the kernels read, in float64."""
    if type == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    elif type == "float16":
        stored = stored.view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaN among all the bit patterns
        return stored.astype(np.float64)


def disagreement(outputs: tuple[np.ndarray, ...], references: list[tuple[np.ndarray, np.ndarray]]) -> str | None:
    """What is wrong with ``outputs``, given (value, tolerance) of each, or None; what was not written is NaN."""
    for index, (output, (value, tolerance)) in enumerate(zip(outputs, references, strict=True)):
        wrong = ~(abs(output - value) <= tolerance)
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            return (
                f"output {index} is wrong at {int(wrong.sum())} of {wrong.size} places, first at {place}: "
                f"{output[place]!r}, expected {value[place]!r} +- {float(tolerance[place]):.3g}"
            )
    return None


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

    def call(
        self,
        function: str,
        header: list[int],
        arrays: list[np.ndarray],
        outputs: list[tuple[tuple[int, ...], str]],
    ) -> tuple[np.ndarray, ...]:
        """Sends a request; the outputs of these shapes and types. Raises EmulationError where the process dies."""
        request = struct.pack(f"{len(header)}q", *header) + b"".join(array.tobytes() for array in arrays)
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([self.program], stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            status, self.workspace = struct.unpack("2q", self._read(16))
            results = tuple(self._read_array(shape, type) for shape, type in outputs)
        except (EOFError, BrokenPipeError):
            message = self.process.stderr.read().decode(errors="replace")
            self.close()
            raise EmulationError(message) from None
        if status != 0:
            raise EmulationError(f"{function} returned CUDA error {status}")
        return results

    def _read_array(self, shape: tuple[int, ...], type: str) -> np.ndarray:
        dtype = np.dtype(type)
        return np.frombuffer(self._read(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data
