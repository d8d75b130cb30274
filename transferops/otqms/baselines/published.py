"""OTQMS as it was published, and as its released code has it: for comparison with ours."""

from __future__ import annotations

import numpy as np

from transferops.otqms.paper_grid import paper_grid
from transferops.otqms.phases import Decision, Situation
from transferops.otqms.rounding import largest_remainder
from transferops.otqms.theory import FloatArray


def paper(situation: Situation) -> Decision:
    """The paper's algorithm to the letter [paper]: grid over s, a quadratic program each, d all that is trained."""
    best = paper_grid(situation.gram(), situation.target_samples, situation.source_samples, float(situation.parameters))
    return Decision(_whole(best.quantities, situation), best.risk)


def released(situation: Situation) -> Decision:
    """The variant in the paper's released code, for comparison only: its matrix, and 1/s added to the risk.

    The matrix is :func:`transferops.otqms.discrepancy.released_gram`. That code also picks the epoch on the test
    set; here it is picked on the validation samples, as for every strategy. s = 0 has no 1/s and is left out.
    """
    gram, available = situation.released_gram(), situation.source_samples
    found = paper_grid(gram, situation.target_samples, available, float(situation.parameters))
    total = found.totals[1 + int(np.argmin(found.risks[1:] + 1 / found.totals[1:]))]
    # The shares at a given s do not depend on d; with a large one, taking nothing is never better.
    large = 1e6 * (float(gram.abs().max()) + 1) * (situation.target_samples + sum(available))
    chosen = paper_grid(gram, situation.target_samples, available, large, totals=[total])
    return Decision(_whole(chosen.quantities, situation))


def _whole(quantities: FloatArray, situation: Situation) -> tuple[int, ...]:
    available = np.array(situation.source_samples, dtype=np.float64)
    rounded = largest_remainder(np.minimum(quantities, available), available, np.ones_like(available))
    return tuple(rounded.tolist())
