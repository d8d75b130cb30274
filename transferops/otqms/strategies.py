"""Strategies: sequences of phases, or a construction, under the names they have in options, tables and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transferops._validate import fail
from transferops.otqms import decisions
from transferops.otqms.baselines.ensembles import h_ensemble, maximal_correlation_weighting, released_h_ensemble
from transferops.otqms.baselines.published import paper, released
from transferops.otqms.baselines.wadn import wadn
from transferops.otqms.phases import Anchor, Construction, Decide, Phase, everything, target_alone

ALL_BASELINES = "all-baselines"
"""Stands for every strategy but those of :func:`register`."""


@dataclass(frozen=True)
class Strategy:
    """What a name stands for.

    Attributes:
        phases: Of its training, in order; none if it is a construction.
        uses_source_models: Whether it needs them (calls ``gram``, starts from one, is made of them): they are
            then trained first, and their time is reported apart.
        anchor: The model trained on the target only that it needs, if it does.
        surveys: Whether it needs a survey.
        all_labels: Whether it trains on the validation samples, too: for one that needs no early stopping.
        construction: Puts its model together.
        comparison_only: What it is to be used for, if not for its results.
    """

    phases: tuple[Phase, ...] = ()
    uses_source_models: bool = False
    anchor: Anchor | None = None
    surveys: bool = False
    all_labels: bool = False
    construction: Construction | None = None
    comparison_only: bool = False


STRATEGIES: dict[str, Strategy] = {}


def add(name: str, strategy: Strategy) -> None:
    """Make ``strategy`` known as ``name``.

    Raises:
        ValueError: If the name is taken.
    """
    _check_new(name)
    STRATEGIES[name] = strategy


def register(name: str, *, uses_source_models: bool = False) -> Callable[[Decide], Decide]:
    """Decorator that makes a decision function a strategy of one phase, ``name``.

    Args:
        name: A new name.
        uses_source_models: Whether the function calls ``Situation.gram``: the source models are then trained
            before the first epoch, and their time is reported apart from it.

    Raises:
        ValueError: If the name is taken.
    """

    _check_new(name)

    def make(decide: Decide) -> Decide:
        add(name, Strategy((Phase(decide),), uses_source_models))
        return decide

    return make


def _check_new(name: str) -> None:
    if name in STRATEGIES or name == ALL_BASELINES:
        fail("name", "a name that is not taken", repr(name))


def expand(names: Sequence[str]) -> list[str]:
    """``names`` with "all-baselines" replaced by all strategies there are."""
    return [each for name in names for each in (STRATEGIES if name == ALL_BASELINES else (name,))]


def check_strategies(names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``names`` are registered, each once, and at least one."""
    for name in names:
        if name not in STRATEGIES:
            fail("strategy", f"names among {', '.join(STRATEGIES)}", repr(name))
    if not names or len(set(names)) < len(names):
        fail("strategy", "at least one name, each once", ", ".join(names) or "none")


FINE_TUNE = Phase(
    target_alone,
    start="previous",
    lr_factor=0.25,
    epochs=1,
    steps=160,
    batch_size=32,
    schedule="cosine",
    may_stay=True,
    name="fine-tune",
)
"""On the target alone from the model before, which early stopping keeps if it validates better."""

TRANSLATION = 1 / 16
"""Two pixels of a digit's 28 each way. A part of the image's sides so that it means the same at any resolution."""

SURVEYED = Phase(
    decisions.surveyed_quantities,
    start="survey",
    epochs=14,
    batch_size=32,
    schedule="plateau",
    averaging=0.998,
    translation=TRANSLATION,
    decide_once=True,
    early_stopping=False,
    name="quantities",
)
"""Quantities by a survey, its common start, and what makes the most of few target samples that come again and again."""

FINISH = replace(
    FINE_TUNE, lr_factor=0.125, steps=120, halfway=True, early_stopping=False, may_stay=False, name="finish"
)
"""A last look at the target: half of the way to a shorter fine-tuning."""

add("recommended", Strategy((SURVEYED, FINISH), surveys=True, all_labels=True))
add("quantities", STRATEGIES["recommended"])
add(
    "shares",
    Strategy(
        (replace(SURVEYED, decide=decisions.surveyed_shares, name="shares"), FINISH), surveys=True, all_labels=True
    ),
)
add("target-only", Strategy((Phase(target_alone),)))
add("all-sources", Strategy((Phase(everything),)))
add("pooled-then-fine-tuned", Strategy((Phase(everything, name="pooled"), FINE_TUNE)))
# What the translations of "recommended" do without its quantities.
_pooled = Phase(everything, translation=TRANSLATION, name="pooled")
add("all-sources-translated", Strategy((_pooled,)))
add("pooled-then-fine-tuned-translated", Strategy((_pooled, replace(FINE_TUNE, translation=TRANSLATION))))
add(
    "best-source-then-fine-tuned",
    Strategy((Phase(target_alone, start="best-source", lr_factor=0.25),), uses_source_models=True),
)
add("quantities-dynamic", Strategy((Phase(decisions.dynamic_quantities),), uses_source_models=True))
for _anchor, _name in (("exact", "quantities-static"), ("under", "quantities-under"), ("over", "quantities-over")):
    _phase = Phase(decisions.quantities_at(cast(Anchor, _anchor)), decide_once=True)
    add(_name, Strategy((_phase,), uses_source_models=True, anchor=cast(Anchor, _anchor)))
add(
    "quantities-anchored",
    Strategy(
        (Phase(decisions.quantities_at("exact", debias=True), decide_once=True),),
        uses_source_models=True,
        anchor="exact",
    ),
)
add("weights", Strategy((Phase(decisions.weights, name="weights"),), uses_source_models=True))
add("budget", Strategy((Phase(decisions.budget),), uses_source_models=True))
add("uniform", Strategy((Phase(decisions.uniform),), uses_source_models=True))
add("paper", Strategy((Phase(paper),), uses_source_models=True, comparison_only=True))
add("released", Strategy((Phase(released),), uses_source_models=True, comparison_only=True))
add("h-ensemble", Strategy(uses_source_models=True, construction=h_ensemble))
add("h-ensemble-released", Strategy(uses_source_models=True, construction=released_h_ensemble, comparison_only=True))
add("mcw", Strategy(uses_source_models=True, construction=maximal_correlation_weighting))
add("wadn", Strategy((Phase(wadn),)))
