"""OTQMS: how many samples of each source to train with (NeurIPS 2025, arXiv 2502.04242).

The theory and the allocation are functions of numbers; the trainer applies them to a network, epoch by epoch;
a study compares strategies over seeds. The trainer knows tensors and names only, whatever data set they come
from.
"""

from transferops.otqms.allocation import Allocation, allocate
from transferops.otqms.log import EpochLog, read_log
from transferops.otqms.networks import ConvNet, FeatureNet, network_for
from transferops.otqms.options import TrainingOptions
from transferops.otqms.phases import Decision, Phase, Situation
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.report import Report
from transferops.otqms.results import to_json, write_json
from transferops.otqms.strategies import STRATEGIES, Strategy, register
from transferops.otqms.study import Study, Trial, compare
from transferops.otqms.theory import optimal_quantity, risk, single_source_risk, target_only_risk
from transferops.otqms.trainer import OTQMS

__all__ = [
    "OTQMS",
    "STRATEGIES",
    "Allocation",
    "ConvNet",
    "Decision",
    "EpochLog",
    "EpochRecord",
    "FeatureNet",
    "Phase",
    "Report",
    "Situation",
    "Strategy",
    "Study",
    "TrainingOptions",
    "TrainingRun",
    "Trial",
    "allocate",
    "compare",
    "network_for",
    "optimal_quantity",
    "read_log",
    "register",
    "risk",
    "single_source_risk",
    "target_only_risk",
    "to_json",
    "write_json",
]
