"""Every public function on random inputs: it agrees with a float64 reference, or refuses in the documented way.

A few examples each, always the same; ``make fuzz`` runs as many as ten minutes allow (run.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

import targets_compat
import targets_models
import targets_ops
import targets_otqms
import targets_outputs
import targets_scores
from outcomes import TARGETS
from surface import EXEMPT, public_functions

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())
NEEDS = {"scores.otce": "ot"}  # what not every environment of the tests has
CHECKS = {target.check: name for name, target in reversed(TARGETS.items())}  # one name for each, the first


@pytest.mark.parametrize("name", CHECKS.values())
def test_agrees_or_refuses(name: str) -> None:
    target = TARGETS[name]
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])

    @hypothesis.settings(
        derandomize=True,
        database=None,
        max_examples=8,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.specs)
    def run(spec: dict[str, Any]) -> None:
        assert target.check(spec) in ("agreed", "refused")

    run()


@pytest.mark.parametrize("entry", CORPUS, ids=[f"{entry['target']}: {entry['what']}" for entry in CORPUS])
def test_example_that_once_failed(entry: dict[str, Any]) -> None:
    if entry["target"] in NEEDS:
        pytest.importorskip(NEEDS[entry["target"]])
    assert TARGETS[entry["target"]].check(entry["example"]) == entry["outcome"]


def test_every_public_function_is_a_target_or_has_a_reason_not_to_be() -> None:
    functions = public_functions()
    covered = {id(functions[name]) for name in TARGETS if name in functions}
    missing = [name for name, value in functions.items() if id(value) not in covered and name not in EXEMPT]
    assert not missing
    assert not [name for name in EXEMPT if name not in functions]
    assert not [name for name in EXEMPT if id(functions[name]) in covered]


def test_modules_are_registered() -> None:
    for module in (targets_compat, targets_models, targets_ops, targets_otqms, targets_outputs, targets_scores):
        checks = {target.check.__module__ for target in TARGETS.values()}
        assert module.__name__ in checks
