"""Adapt a pretrained model: the best head in closed form, and what to inherit of its parameters."""

from transferops.adapt.adapt_head import adapt_head
from transferops.adapt.adapt_layers import LayersReport, adapt_layers
from transferops.adapt.freezing import Frozen, freeze
from transferops.adapt.head_folds import k_fold_path
from transferops.adapt.head_path import HeadPath
from transferops.adapt.head_report import HeadReport, ShiftBound
from transferops.adapt.head_solver import HeadSolver
from transferops.adapt.inheritance import inherit, load_matching
from transferops.adapt.inheritance_report import InheritanceReport, TensorReport
from transferops.adapt.published import published_head
from transferops.adapt.recursive_head import RecursiveHead
from transferops.adapt.simulation import TransferSetting, gamma_index, simulate
from transferops.adapt.transfer_check import TransferCheck, transfer_check
from transferops.adapt.verdict import Effect, paired_effects

__all__ = [
    "Effect",
    "Frozen",
    "HeadPath",
    "HeadReport",
    "HeadSolver",
    "InheritanceReport",
    "LayersReport",
    "RecursiveHead",
    "ShiftBound",
    "TensorReport",
    "TransferCheck",
    "TransferSetting",
    "adapt_head",
    "adapt_layers",
    "freeze",
    "gamma_index",
    "inherit",
    "k_fold_path",
    "load_matching",
    "paired_effects",
    "published_head",
    "simulate",
    "transfer_check",
]
