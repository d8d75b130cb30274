"""The compile report of the CUDA kernels: every budget is kept, and a broken one is noticed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys

import pytest
from emulator import KERNELS, ROOT

MISSING = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} on PATH")
KERNEL = "gram_tiles<float, true>"


@pytest.fixture(scope="module")
def report():
    specification = importlib.util.spec_from_file_location("cuda_report", ROOT / "scripts" / "cuda_report.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["cuda_report"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels(report):
    """Compiled once for all tests."""
    return report.compile_all(report.find_cuobjdump())


@pytest.fixture
def run(report, kernels, monkeypatch, tmp_path):
    """Runs the script with changed budgets; the exit status and the problems it names."""
    monkeypatch.setattr(report, "compile_all", lambda cuobjdump: kernels)

    def run(change=lambda budgets: None):
        budgets = json.loads((KERNELS / "budgets.json").read_text())
        change(budgets["gram.cu"])
        (tmp_path / "budgets.json").write_text(json.dumps(budgets))
        output = tmp_path / "report.json"
        status = report.main(["--budgets", str(tmp_path / "budgets.json"), "--output", str(output)])
        return status, json.loads(output.read_text())["problems"]

    return run


@needs_compiler
def test_kernels_are_within_their_budgets(run):
    assert run() == (0, [])


@needs_compiler
def test_every_kernel_is_parsed(kernels):
    assert sum(kernel.file == "gram.cu" for kernel in kernels) == 10
    assert all(8 <= kernel.registers <= 255 for kernel in kernels)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda budgets: budgets[KERNEL].update(registers=16), f"{KERNEL} uses .* registers, budget 16"),
        (lambda budgets: budgets.pop(KERNEL), f"{KERNEL} has no budget"),
        (lambda budgets: budgets.update(gone={"registers": 1}), "gone has a budget but does not exist"),
        (lambda budgets: budgets[KERNEL].update(speed=1), f"{KERNEL} has a budget for speed"),
    ],
    ids=["exceeded", "missing", "stale", "unknown"],
)
def test_a_wrong_budget_fails(run, change, problem):
    status, problems = run(change)
    assert status == 1
    assert len(problems) == 1
    assert re.search(problem, problems[0])


def test_spills_and_missing_instructions_are_found(report):
    log = """
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90'
ptxas info    : Function properties for _Z5firstv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
"""
    instructions = "DMMA.16x8x8,HMMA.1688.F32.TF32,LDG.E.128,LDG.E.64,STG.E.128,LDGSTS.E.BYPASS.128,LDL,STL"
    assembly = "Function : _Z5firstv\n" + instructions.replace(",", " R0\n") + " R0\n"
    resources = report.parse_resources(log)["_Z5firstv"]
    counts = report.parse_instructions(assembly)["_Z5firstv"]
    assert resources == {"registers": 255, "stack": 8, "spills": 28, "shared": 2048}
    assert counts == {"dmma": 1, "hmma": 1, "wide_loads": 1, "wide_stores": 1, "async_copies": 1, "local": 2}
    kernel = report.Kernel("moments.cu", "first", **resources, **counts)
    budget = {"registers": 255, "dmma": 2, "hmma": 1, "wide_stores": 2, "async_copies": 2}
    problems = report.find_problems([kernel], {"moments.cu": {"first": budget}})
    assert [problem.split(": ")[1] for problem in problems] == [
        "first spills 28 bytes, 2 local accesses",
        "first has 1 dmma, expected at least 2",
        "first has 1 wide_stores, expected at least 2",
        "first has 1 async_copies, expected at least 2",
    ]
