"""The public functions, and those among them that no fuzz target is for, with the reason."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

MODULES = (
    "ops",
    "fisher",
    "scores",
    "otqms",
    "otqms.theory",
    "otqms.allocation",
    "otqms.dimension",
    "otqms.akaike",
    "otqms.paper_grid",
    "adapt",
    "rank",
    "data",
    "compat.tllib",
    "compat.logme",
    "compat.transformer_ranker",
)

_TRAINS = "trains networks: its arithmetic is that of the functions here, its inputs are in test_otqms_trainer*.py"
_FILES = "reads files: fuzzed byte by byte in test_readers.py"
EXEMPT = {
    "adapt.Frozen": "made by adapt.freeze",
    "adapt.adapt_layers": "damped steps that end in adapt.adapt_head's solution: test_adapt_head.py",
    "adapt.simulate": "a simulation with a setting and no data: test_simulation.py",
    "adapt.gamma_index": "a formula of a checked setting: test_simulation.py",
    "compat.transformer_ranker.Estimator": "abstract",
    "data.load_bundle": _FILES,
    "data.load_digits_domains": "takes no argument",
    "data.load_folder": _FILES,
    "data.load_npz": _FILES,
    "fisher.parameter_differences": "takes models: test_fisher_directions.py",
    "otqms.ConvNet": "a network",
    "otqms.EpochLog": "writes lines",
    "otqms.FeatureNet": "a network",
    "otqms.OTQMS": _TRAINS,
    "otqms.akaike.explain_shares": "sentences about akaike_shares",
    "otqms.allocation.check_problem": "fuzzed through otqms.allocate",
    "otqms.compare": _TRAINS,
    "otqms.network_for": "makes a network",
    "otqms.read_log": _FILES,
    "otqms.register": "takes a function",
    "otqms.theory.nonnegative": "fuzzed through the formulas",
    "otqms.theory.positive": "fuzzed through the formulas",
    "otqms.to_json": "of a finished study",
    "otqms.write_json": "writes a document",
    "rank.default_scores": "takes no argument",
    "rank.extract_cached": _FILES,
    "rank.gradient_relations": _TRAINS,
    "rank.embedding_relations": "of networks, by scores.task_distance: test_rank.py",
    "rank.load_candidate": "downloads a model",
    "rank.rank_candidates": "of extractions, by the scores here: test_rank.py",
    "rank.source_candidates": _TRAINS,
    "rank.source_relations": "of networks, by the scores here: test_rank.py",
    "rank.to_json": "of a finished ranking",
    "rank.transport_relations": "of networks, by scores.otce: test_rank.py",
    "scores.PrincipalGradientExpectation": "takes a network: test_pge.py",
    "scores.Score": "abstract",
}


def public_functions() -> dict[str, Any]:
    """By name all that can be called with data: functions, and classes that are not merely what functions return."""
    found = {}
    for place in MODULES:
        module = importlib.import_module(f"transferops.{place}")
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            value = getattr(module, name)
            if inspect.isfunction(value) or (inspect.isclass(value) and not _is_record(value)):
                found[f"{place}.{name}"] = value
    return found


def _is_record(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or issubclass(cls, (tuple, Exception)) or cls.__name__ == "HeadPath"
