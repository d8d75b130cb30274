#!/usr/bin/env python3
"""Compiles the CUDA kernels, without a GPU, and compares what they use with csrc/kernels/cuda/budgets.json.

    python scripts/cuda_report.py [--output report.md | report.json]

A budget is {"file.cu": {"kernel": {"registers": at most, "dmma", "hmma", "wide_loads", "wide_stores", "async_copies":
at least}}}. The last five are how many instructions of a kind the kernel has to have: tensor cores in float64 and in
smaller types, global accesses of 16 bytes, and copies of as many from global to shared memory. They are checked where
cuobjdump is found (on PATH, beside nvcc, in its own or Triton's wheel). The exit status is 1 if a register is spilled,
local memory is accessed, an intended instruction is missing, a budget is exceeded, or a kernel or a budget lacks the
other.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
CACHE = ROOT / "build" / "cuda_report"


@dataclass
class Kernel:
    """What one kernel uses; the instruction counts are None where cuobjdump was not found."""

    file: str
    name: str
    registers: int = 0
    stack: int = 0  # bytes
    spills: int = 0  # bytes stored and loaded
    shared: int = 0  # bytes of static shared memory
    dmma: int | None = None
    hmma: int | None = None
    wide_loads: int | None = None
    wide_stores: int | None = None
    async_copies: int | None = None
    local: int | None = None  # accesses of local memory


# What is counted in the machine code, and what a budget may ask for.
INSTRUCTIONS = {
    "dmma": r"\bDMMA\b",  # tensor cores, float64
    "hmma": r"\bHMMA\b",  # tensor cores, 16-bit types and tf32
    "wide_loads": r"\bLDG\.E\.128\b",
    "wide_stores": r"\bSTG\.E\.128\b",
    "async_copies": r"\bLDGSTS(?:\.\w+)*\.128\b",  # from global to shared memory
    "local": r"\b(?:LDL|STL)\b",
}
INTENDED = tuple(key for key in INSTRUCTIONS if key != "local")


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    candidates = [Path(nvcc).resolve().parent / "cuobjdump" for nvcc in [shutil.which("nvcc")] if nvcc]
    if nvidia := importlib.util.find_spec("nvidia"):  # the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
        for folder in nvidia.submodule_search_locations or ():
            candidates += sorted(Path(folder).glob("cu*/bin/cuobjdump"))
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in candidates if path.exists()), None)


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled -> name and template arguments: ``gram_tiles<float, true>``."""
    answer = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(mangled, answer.stdout.splitlines(), strict=True):
        name = re.sub(r"transferops::|cuda::|\(anonymous namespace\)::|^void ", "", name)
        names[symbol] = name[: name.index("(")] if "(" in name else name
    return names


def parse_resources(log: str) -> dict[str, dict[str, int]]:
    """Mangled name -> resources, from what ``ptxas -v`` prints."""
    resources: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        symbol = part[: part.index("'")]

        def number(pattern: str, text: str = part) -> int:
            return sum(int(value) for value in re.findall(pattern, text))

        resources[symbol] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill (?:stores|loads)"),
            "shared": number(r"(\d+) bytes smem"),
        }
    return resources


def parse_instructions(assembly: str) -> dict[str, dict[str, int]]:
    """Mangled name -> instruction counts, from what ``cuobjdump -sass`` prints."""
    counts = {}
    for part in re.split(r"\bFunction : ", assembly)[1:]:
        symbol, _, body = part.partition("\n")
        counts[symbol.strip()] = {key: len(re.findall(pattern, body)) for key, pattern in INSTRUCTIONS.items()}
    return counts


def compile_all(cuobjdump: str | None) -> list[Kernel]:
    """The kernels of all files, compiled as many at a time as there are processors; once for the same sources."""
    sources = sorted(KERNELS.glob("*.cu"), key=lambda source: -source.stat().st_size)  # the longest first
    inputs = [Path(__file__), *sorted(KERNELS.parent.glob("*.h")), *sorted(KERNELS.iterdir())]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version}{cuobjdump}".encode())
    for path in inputs:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    kept = CACHE / f"{digest.hexdigest()}.json"
    if kept.exists():
        return [Kernel(**kernel) for kernel in json.loads(kept.read_text())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda source: compile_kernels(source, cuobjdump), sources)
        kernels = sorted((k for kernels in found for k in kernels), key=lambda kernel: (kernel.file, kernel.name))
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    partial.replace(kept)
    return kernels


def compile_kernels(source: Path, cuobjdump: str | None) -> list[Kernel]:
    """Compiles ``source`` with warnings as errors; the kernels in the order of their names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++20", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
        command += [str(source), "-o", str(cubin)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{compiled.stderr}")
        resources = parse_resources(compiled.stderr)
        instructions: dict[str, dict[str, int]] = {}
        if cuobjdump:
            command = [cuobjdump, "-sass", str(cubin)]
            path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])  # nvdisasm is beside it
            listing = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
            )
            instructions = parse_instructions(listing.stdout)
    names = short_names(list(resources))
    kernels = [Kernel(source.name, names[k], **resources[k], **instructions.get(k, {})) for k in resources]
    return sorted(kernels, key=lambda kernel: kernel.name)


def find_problems(kernels: list[Kernel], budgets: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    problems = []
    for kernel in kernels:
        label = f"{kernel.file}: {kernel.name}"
        if kernel.spills or kernel.local:
            problems.append(f"{label} spills {kernel.spills} bytes, {kernel.local or 0} local accesses")
        budget = budgets.get(kernel.file, {}).get(kernel.name)
        if budget is None:
            problems.append(f"{label} has no budget")
            continue
        if unknown := budget.keys() - {"registers", *INTENDED}:
            problems.append(f"{label} has a budget for {', '.join(sorted(unknown))}, which nobody measures")
        if kernel.registers > budget["registers"]:
            problems.append(f"{label} uses {kernel.registers} registers, budget {budget['registers']}")
        for key in INTENDED:
            count = getattr(kernel, key)
            if count is not None and count < budget.get(key, 0):
                problems.append(f"{label} has {count} {key}, expected at least {budget[key]}")
    found = {(kernel.file, kernel.name) for kernel in kernels}
    for file, names in budgets.items():
        problems += [f"{file}: {name} has a budget but does not exist" for name in names if (file, name) not in found]
    return problems


def markdown(kernels: list[Kernel], budgets: dict[str, dict[str, dict[str, int]]], problems: list[str]) -> str:
    columns = ["file", "kernel", "registers", "budget", "stack", "spills", *INSTRUCTIONS]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for k in kernels:
        budget = budgets.get(k.file, {}).get(k.name, {}).get("registers", "none")
        counts = ["not available" if count is None else count for count in (getattr(k, key) for key in INSTRUCTIONS)]
        cells = [k.file, f"`{k.name}`", k.registers, budget, k.stack, k.spills, *counts]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if all(kernel.dmma is None for kernel in kernels):
        lines += ["", "Instruction counts are not available: no cuobjdump."]
    return "\n".join([*lines, "", *(f"- **{problem}**" for problem in problems or ["within all budgets"]), ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the report here, as .json or .md")
    parser.add_argument("--budgets", type=Path, default=KERNELS / "budgets.json")
    options = parser.parse_args(arguments)
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on PATH: install the CUDA toolkit and binutils")

    budgets = json.loads(options.budgets.read_text())
    kernels = compile_all(find_cuobjdump())
    problems = find_problems(kernels, budgets)
    report = markdown(kernels, budgets, problems)
    print(report)
    if options.output and options.output.suffix == ".json":
        content = {"kernels": [asdict(kernel) for kernel in kernels], "problems": problems}
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    elif options.output:
        options.output.write_text(report)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
