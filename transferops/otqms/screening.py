"""Which sources mean the same by their labels as the target: a test before anything is trained on them [derived].

A survey starts from a network trained on the sources together, and sources whose labels are arbitrary there (shuffled,
of other classes, of noise) spoil the start for all others. Whether a source's labels are arbitrary can be tested with
many samples, those of the source, instead of with the few of the target: a model that has seen none of them either
predicts them better than chance or not. The model of the target alone is weak, so trust spreads: a model of the
sources that agree with it judges the others, until no more are admitted.

A source stays unless it is shown to be of no use: what is neither admitted nor rejected is kept. A source whose inputs
look so different that no model of the others recognises anything in them is taken for one with arbitrary labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._validate import check_array, describe, fail
from transferops.otqms.theory import FloatArray

LEVEL = 0.05
GAIN = 0.1
_DRAWS = 10_000
_ENTRIES = 2**20  # of assignments held at a time
_TINY = 1e-12  # in the place of no spread at all

# By whether arbitrary labels hardly agree so much, and labels of use hardly so little.
_DECISIONS = {
    (True, False): "accept",
    (True, True): "weak",
    (False, True): "reject",
    (False, False): "undecided",
}

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelVerdicts:
    """Which sources' labels agree with a model's predictions.

    Attributes:
        decisions: "accept", "weak", "reject" or "undecided", one for each source.
        agreements: 0 on average if the labels are arbitrary, 1 if every prediction is certain and right; float64 [K].
        standard_errors: of these; infinite where no class has two samples.
        p_arbitrary: the probability of so much agreement, were the labels arbitrary: small speaks for the source.
        p_useful: the probability of so little, were the source of use: small speaks against it.
    """

    decisions: tuple[str, ...]
    agreements: FloatArray
    standard_errors: FloatArray
    p_arbitrary: FloatArray
    p_useful: FloatArray

    def sentence(self, number: int, name: str, judge: str) -> str:
        """What was decided about source ``number`` and why; ``judge`` is what the model that predicted is of."""
        return (
            f"source {name}: {self.decisions[number]}, its labels agree with a model of {judge} by "
            f"{self.agreements[number]:.2g} (standard error {self.standard_errors[number]:.2g}; 0: arbitrary, 1: "
            f"wholly); p = {self.p_arbitrary[number]:.2g} of so much for arbitrary labels, "
            f"{self.p_useful[number]:.2g} of so little for labels of use"
        )


def judge_labels(
    probabilities: Sequence[ArrayLike],
    labels: Sequence[ArrayLike],
    *,
    gain: float = GAIN,
    level: float = LEVEL,
    draws: int = _DRAWS,
    seed: int = 0,
) -> LabelVerdicts:
    """Whether sources' labels mean what a model predicts that has not seen them [derived].

    The agreement is balanced accuracy among the m classes that a source has, adjusted for chance, with probabilities in
    the place of decisions: the mean over its classes of the mean over their samples of p(y|x) - (1/m) sum_c p(c|x),
    over 1 - 1/m. Labels that are independent of the inputs have 0 on average, however uneven the classes and however
    one-sided the predictions; so has a single class, which says nothing about what tells classes apart.

    "accept": so much agreement is rare among the m! ways to assign the names of its classes to the source's classes
    (all of them if they are few, else random ones). The test is exact if the names are arbitrary, whatever the
    structure of inputs and labels; it holds for shuffled labels and for inputs of noise, too. Where there are too few
    classes for it to reach the level, the labels are permuted over the samples, with the normal distribution of the
    permutations' mean and variance: that rules out labels independent of the inputs, not others. "reject": not so, and
    the agreement is below ``gain`` beyond its sampling error (Student's). "weak": both, more than arbitrary labels
    have and less than those of use. A source whose labels are arbitrary is accepted or weak, and a source of use
    rejected or weak, with a probability of at most ``level`` over all sources together (Bonferroni).

    Args:
        probabilities: by the model, of the samples of each source, shape [N_i, C] each, N_i at least 1, C at least 2.
        labels: integers from 0 to C - 1, shape [N_i] each.
        gain: the agreement from which on a source is of use, between 0 and 1.
        level: error rate, between 0 and 1/2.
        draws: random assignments at least; more where the level asks for it.
        seed: of these.

    Returns:
        See :class:`LabelVerdicts`.

    Raises:
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
    """
    try:
        from scipy.special import stdtr
    except ImportError as missing:
        raise ImportError("judge_labels: expected SciPy, got none; run `pip install scipy`") from missing
    if not probabilities or len(labels) != len(probabilities):
        fail("labels", f"one array for each of {len(probabilities)} sources, at least one", str(len(labels)))
    if not 0 < gain < 1:
        fail("gain", "a number between 0 and 1", describe(gain))
    if not 0 < level < 0.5:
        fail("level", "a number between 0 and 1/2", describe(level))
    own = level / len(probabilities)
    draws, generator = max(draws, math.ceil(2 / own)), np.random.default_rng(seed)
    found = []
    for number, (given, truth) in enumerate(zip(probabilities, labels, strict=True)):
        scores, index = _checked(f"probabilities[{number}]", given, f"labels[{number}]", truth)
        counts = np.bincount(index)
        classes, freedom = len(counts), len(index) - len(counts)
        if math.factorial(classes) >= 1 / own:
            p_arbitrary = _among_names(scores, index, counts, draws, generator)
        else:
            p_arbitrary = _among_permutations(scores, index, counts)
        own_scores = scores[np.arange(len(index)), index] - scores.mean(1)
        scale = 1 - 1 / max(classes, 2)
        agreement = float((np.bincount(index, own_scores) / counts).mean()) / scale
        error = _standard_error(own_scores, index, counts) / scale
        p_useful = float(stdtr(freedom, (agreement - gain) / max(error, _TINY))) if freedom else 1.0
        decision = _DECISIONS[p_arbitrary <= own, p_useful <= own]
        found.append((decision, agreement, error, p_arbitrary, p_useful))
    decisions, *numbers = zip(*found, strict=True)
    return LabelVerdicts(decisions, *(np.array(column) for column in numbers))


Sources = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Screening:
    """Which sources are trained on at all.

    Attributes:
        kept: Their numbers, in order.
        sentences: About every source that was not admitted, or that nothing could be told.
        judges: The sources whose model judged the others, by round; none in the first, where it is the target's.
    """

    kept: Sources
    sentences: tuple[str, ...] = ()
    judges: tuple[Sources, ...] = ()


def screen(names: Sequence[str], judge: Callable[[Sources, Sources], LabelVerdicts]) -> Screening:
    """Spread trust from the target over the sources, and reject what it does not reach and what is of no use.

    Admitted are those that agree, be it weakly. Among several sources with arbitrary labels one may come out so by
    chance: what agreed weakly is judged once more at the end, by a model of those that agreed well. If the target alone
    admits none, its samples are too few to tell anything, and all are kept. The error rate of :func:`judge_labels` is
    that of one round, of which there are rarely more than two or three.

    Args:
        names: Of the sources.
        judge: Given the sources admitted so far and the others, what a model of the first, or of the target if there
            are none, makes of the labels of the others.

    Returns:
        See :class:`Screening`.
    """
    everything, admitted, weak = tuple(range(len(names))), Sources(), Sources()
    judges: list[Sources] = []
    sentences: list[str] = []
    rejected: set[int] = set()

    def ask(trusted: Sources, others: Sources) -> LabelVerdicts:
        judges.append(trusted)
        return judge(trusted, others)

    def conclude(trusted: Sources, others: Sources, verdicts: LabelVerdicts) -> None:
        judged_by = ", ".join(names[i] for i in trusted)
        for number, (i, decision) in enumerate(zip(others, verdicts.decisions, strict=True)):
            if decision != "accept":
                sentences.append(verdicts.sentence(number, names[i], judged_by))
            if decision == "reject":
                rejected.add(i)

    while len(admitted) < len(names):
        others = tuple(i for i in everything if i not in admitted)
        verdicts = ask(admitted, others)
        decisions = dict(zip(others, verdicts.decisions, strict=True))
        new = tuple(i for i in others if decisions[i] in ("accept", "weak"))
        if not new and not admitted:
            told = "screening: the target's samples do not tell which sources' labels are arbitrary; none is rejected"
            return Screening(everything, (told,), tuple(judges))
        if not new:
            conclude(admitted, others, verdicts)
            break
        weak += tuple(i for i in new if decisions[i] == "weak")
        admitted = tuple(sorted((*admitted, *new)))
    firm = tuple(i for i in admitted if i not in weak)
    if weak and firm:
        conclude(firm, weak, ask(firm, weak))
    return Screening(tuple(i for i in everything if i not in rejected), tuple(sentences), tuple(judges))


def _checked(name: str, given: ArrayLike, label_name: str, truth: ArrayLike) -> tuple[FloatArray, IntArray]:
    """The probabilities of the classes that the source has, and which of them each sample is of."""
    table, values = check_array(name, given), np.asarray(truth)
    if table.ndim != 2 or not table.shape[0] or table.shape[1] < 2:
        fail(name, "shape [N, C], N at least 1, C at least 2", f"shape {list(table.shape)}")
    if values.shape != table.shape[:1] or not np.issubdtype(values.dtype, np.integer):
        fail(label_name, f"integers of shape {[len(table)]}", f"{values.dtype} of shape {list(values.shape)}")
    if values.min() < 0 or values.max() >= table.shape[1]:
        fail(label_name, f"classes from 0 to {table.shape[1] - 1}", f"{values.min()} to {values.max()}")
    classes, index = np.unique(values, return_inverse=True)
    return table[:, classes], index


def _among_names(
    scores: FloatArray, index: IntArray, counts: IntArray, draws: int, generator: np.random.Generator
) -> float:
    """How often other names of the classes agree as well; the own ones count."""
    classes, means = len(counts), _class_means(scores, index, counts)
    names = np.arange(classes)

    def as_well(others: IntArray) -> int:
        return int((means[names, others].sum(1) >= means.trace() - _TINY).sum())

    if math.factorial(classes) <= draws:
        return as_well(np.array(list(itertools.permutations(names)))) / math.factorial(classes)
    at_once = max(_ENTRIES // classes, 1)
    sizes = [min(at_once, draws - done) for done in range(0, draws, at_once)]
    found = sum(as_well(generator.permuted(np.tile(names, (size, 1)), axis=1)) for size in sizes)
    return (found + 1) / (draws + 1)


def _class_means(scores: FloatArray, index: IntArray, counts: IntArray) -> FloatArray:
    """The mean score of each name (column) over the samples of each class (row)."""
    sums = np.zeros((len(counts), len(counts)))
    np.add.at(sums, index, scores)
    return sums / counts[:, None]


def _among_permutations(scores: FloatArray, index: IntArray, counts: IntArray) -> float:
    """The same for permutations of the labels over the samples (mean and variance: Hoeffding 1951)."""
    if len(index) < 2:
        return 1.0
    centred = scores / counts
    centred -= centred.mean(0)
    centred -= (centred @ (counts / len(index)))[:, None]
    variance = float((centred**2 @ counts).sum()) / (len(index) - 1)
    total = float(centred[np.arange(len(index)), index].sum())
    return math.erfc(total / math.sqrt(2 * variance)) / 2 if variance > _TINY**2 else 1.0


def _standard_error(values: FloatArray, index: IntArray, counts: IntArray) -> float:
    """Of the mean over classes of the mean over samples, with one variance for all classes."""
    if len(values) == len(counts):
        return math.inf
    means = np.bincount(index, values) / counts
    variance = float(((values - means[index]) ** 2).sum()) / (len(values) - len(counts))
    return math.sqrt(variance * float((1 / counts).sum())) / len(counts)
