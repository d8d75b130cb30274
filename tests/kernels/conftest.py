from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from emulator import CENTRING, HARNESS, MOMENTS, NO_COMPILER, Emulator, compile_object, link


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The moments kernels on the CPU, under AddressSanitizer."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    folder = tmp_path_factory.mktemp("emulator")
    sources = (MOMENTS, CENTRING, HARNESS)
    objects = [compile_object(folder / f"{source.stem}.o", source, "-g") for source in sources]
    with Emulator(link(folder / "moments", *objects)) as emulator:
        yield emulator
