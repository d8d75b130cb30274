"""Fuzz targets of transferops.otqms: the risk formulas in rational arithmetic, the allocation by what proves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from cases import SEEDS, Spec
from hypothesis import strategies as st
from outcomes import Refusal, outcome, refused, target

from transferops import otqms
from transferops.otqms import akaike, allocation, dimension, paper_grid, semidefinite, theory

EPS = 2.0**-52
NUMBERS = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 10.0, 100.0]),
    st.floats(1e-3, 1e3),
    st.floats(1e-30, 1e30),
    st.sampled_from([-1.0, math.nan, math.inf, -math.inf]),
)
FORMS = st.sampled_from(["number", "list", "numpy", "tensor", "float32"])


def given(value: list[float], form: str) -> Any:
    """The numbers as a caller might have them."""
    if form == "number" and len(value) == 1:
        return value[0]
    if form == "numpy":
        return np.array(value)
    if form in ("tensor", "float32"):
        return torch.tensor(value, dtype=torch.float64 if form == "tensor" else torch.float32)
    return value


def as_numbers(value: Any) -> list[float]:
    return np.atleast_1d(np.asarray(value, dtype=np.float64)).tolist()


@st.composite
def _numbers(draw: Any, *names: str) -> Spec:
    """An array of one size for each name, or a single number, which broadcasts."""
    size = draw(st.sampled_from([1, 1, 2, 3, 0]))
    spec = {}
    for name in names:
        count = draw(st.sampled_from([size, 1]))
        spec[name] = [draw(st.lists(NUMBERS, min_size=count, max_size=count)), draw(FORMS)]
    return spec


def _formula(
    name: str,
    module: Any,
    exact: Callable[..., tuple[Fraction, Fraction]],
    *,
    positive: tuple[str, ...] = (),
    nonnegative: tuple[str, ...] = (),
    real: tuple[str, ...] = (),
) -> None:
    """A function of numbers. ``exact`` gives its value and the sum of the magnitudes that enter it."""
    arguments = tuple(exact.__code__.co_varnames[: exact.__code__.co_argcount])

    def check(spec: Spec) -> str:
        values = {key: given(*spec[key]) for key in arguments}
        result = outcome(getattr(module, name), **values)
        wrong = []
        for key in arguments:
            found = as_numbers(values[key])
            bad = any(not math.isfinite(x) for x in found)
            bad = bad or (key in positive and any(x <= 0 for x in found))
            if bad or (key in nonnegative and any(x < 0 for x in found)):
                wrong.append(key)
        if wrong:
            return refused(result, *wrong)
        rows = np.broadcast_arrays(*(np.asarray(values[key], dtype=np.float64) for key in arguments))
        assert not isinstance(result, Refusal), result
        assert result.shape == rows[0].shape, (result.shape, rows[0].shape)
        for index in np.ndindex(rows[0].shape):
            value, size = exact(*(Fraction(float(row[index])) for row in rows))
            got = float(result[index])
            if size > Fraction(1e300):
                continue
            assert abs(Fraction(got) - value) <= size * Fraction(32 * EPS) + Fraction(1e-300), (got, float(value))
        return "agreed"

    place = module.__name__.removeprefix("transferops.")
    names = [f"{place}.{name}"] + ([f"otqms.{name}"] if place != "otqms" and hasattr(otqms, name) else [])
    target(*names, specs=_numbers(*arguments))(check)


def _target_only(target_samples: Fraction, dimension: Fraction) -> Any:
    value = dimension / (2 * target_samples)
    return value, value


def _single(quantity: Fraction, discrepancy: Fraction, target_samples: Fraction, dimension: Fraction) -> Any:
    pooled = target_samples + quantity
    value = dimension / 2 * (1 / pooled + quantity**2 * discrepancy / pooled**2)
    return value, value


def _weight(quantity: Fraction, discrepancy: Fraction) -> Any:
    value = 1 / (1 + quantity * discrepancy)
    return value, value


def _single_weighted(quantity: Fraction, discrepancy: Fraction, target_samples: Fraction, dimension: Fraction) -> Any:
    value = dimension / 2 / (target_samples + quantity / (1 + quantity * discrepancy))
    return value, value


def _effective(risk: Fraction, dimension: Fraction) -> Any:
    return dimension / (2 * risk), dimension / (2 * risk)


def _prior(target_samples: Fraction, prior_variance: Fraction) -> Any:
    return 1 / (target_samples * prior_variance), 1 / (target_samples * prior_variance)


def _optimism(training_loss: Fraction, validation_loss: Fraction, target_samples: Fraction) -> Any:
    size = target_samples * (abs(validation_loss) + abs(training_loss))
    return target_samples * (validation_loss - training_loss), size


def _distance(squared_distance: Fraction, first_samples: Fraction, second_samples: Fraction) -> Any:
    value = squared_distance / (1 / first_samples + 1 / second_samples)
    return value, value


_formula("target_only_risk", theory, _target_only, positive=("target_samples", "dimension"))
_formula(
    "single_source_risk",
    theory,
    _single,
    positive=("target_samples", "dimension"),
    nonnegative=("quantity", "discrepancy"),
)
_formula("optimal_weight", theory, _weight, nonnegative=("quantity", "discrepancy"))
_formula(
    "single_source_weighted_risk",
    theory,
    _single_weighted,
    positive=("target_samples", "dimension"),
    nonnegative=("quantity", "discrepancy"),
)
_formula("effective_samples", theory, _effective, positive=("risk", "dimension"))
_formula("prior_damping", dimension, _prior, positive=("target_samples", "prior_variance"))
_formula("optimism_dimension", dimension, _optimism, positive=("target_samples",))
_formula(
    "distance_dimension",
    dimension,
    _distance,
    positive=("first_samples", "second_samples"),
    nonnegative=("squared_distance",),
)


@target("otqms.optimal_quantity", specs=_numbers("discrepancy", "target_samples", "source_samples"))
def optimal_quantity(spec: Spec) -> str:
    values = {key: given(*spec[key]) for key in ("discrepancy", "target_samples", "source_samples")}
    result = outcome(otqms.optimal_quantity, **values)
    t, n0, n1 = (as_numbers(value) for value in values.values())
    wrong = ["discrepancy"] if not all(math.isfinite(x) and x >= 0 for x in t) else []
    wrong += ["target_samples"] if not all(math.isfinite(x) and x > 0 for x in n0) else []
    wrong += ["source_samples"] if not all(x >= 0 for x in n1) else []
    if wrong:
        return refused(result, *wrong)
    rows = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in values.values()))
    for index in np.ndindex(rows[0].shape):
        t, n0, n1 = (float(row[index]) for row in rows)
        got, excess = float(result[index]), 2 * Fraction(n0) * Fraction(t) - 1
        if abs(excess) < Fraction(1e-9) * (excess + 2):  # the two sides of the threshold are not told apart
            assert 0 <= got <= n1
            continue
        best = (
            min(Fraction(n0) / excess, Fraction(n1) if n1 < math.inf else Fraction(10) ** 400) if excess > 0 else None
        )
        expected = n1 if best is None else float(best)
        assert got == expected or abs(got - expected) <= 1e-6 * expected + 1e-300, (got, expected)
    return "agreed"


# Several sources


@st.composite
def _problem(draw: Any) -> Spec:
    sources = draw(st.integers(1, 5))
    counts = st.one_of(st.integers(0, 1000), st.sampled_from([0, 1, 10**6, 10**12]))
    return {
        "rank": draw(st.integers(0, sources)),
        "exponent": draw(st.one_of(st.integers(-3, 3), st.integers(-30, 30))),
        "spread": draw(st.sampled_from([0, 0, 1, 6])),
        "seed": draw(SEEDS),
        "spoil": draw(st.sampled_from([None] * 12 + ["nan", "asymmetric", "negative", "shape"])),
        "form": draw(st.sampled_from(["numpy", "tensor", "float32", "list"])),
        "target_samples": draw(st.one_of(st.integers(1, 1000), st.sampled_from([1e12, 0, -1, math.nan]))),
        "source_samples": draw(st.lists(counts, min_size=sources, max_size=sources)),
        "dimension": draw(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e12), st.sampled_from([0, -1.0]))),
        "budget": draw(st.one_of(st.just(0.0), st.floats(0, 3000))),
        "mode": draw(st.sampled_from(["quantity", "quantity", "weight", "budget"])),
        "debias": draw(st.booleans()),
    }


def _matrix(spec: Spec) -> Any:
    """A positive semidefinite matrix of a rank and scale, with sources whose scales differ; or a spoiled one."""
    generator = np.random.default_rng(spec["seed"])
    sources = len(spec["source_samples"])
    root = generator.standard_normal((spec["rank"], sources))
    root *= 10.0 ** (spec["spread"] * generator.uniform(-1, 1, sources))
    matrix = root.T @ root * 10.0 ** spec["exponent"]
    if spec["spoil"] == "nan":
        matrix[0, -1] = math.nan
    elif spec["spoil"] == "asymmetric" and sources > 1:
        matrix[0, 1] += 0.5 * math.sqrt(matrix[0, 0] * matrix[1, 1]) + 1
    elif spec["spoil"] == "negative":
        matrix[0, 0] = -1 - abs(matrix[0, 0])
    elif spec["spoil"] == "shape":
        matrix = matrix[:, :-1]
    if spec["form"] in ("tensor", "float32"):
        return torch.tensor(matrix, dtype=torch.float64 if spec["form"] == "tensor" else torch.float32)
    return matrix.tolist() if spec["form"] == "list" and matrix.size else matrix


def _no_matrix(spec: Spec, matrix: Any) -> bool:
    """Of the wrong shape or not finite, which a large one in float32 is not."""
    return spec["spoil"] == "shape" or not np.isfinite(np.asarray(matrix)).all()


def _wrong(spec: Spec, matrix: Any) -> list[str]:
    wrong = ["target_samples"] if not spec["target_samples"] >= 1 else []
    wrong += ["dimension"] if not spec["dimension"] > 0 else []
    matrix_wrong = spec["spoil"] == "negative" or _no_matrix(spec, matrix)
    matrix_wrong = matrix_wrong or (spec["spoil"] == "asymmetric" and len(spec["source_samples"]) > 1)
    return wrong + (["gram"] if matrix_wrong else [])


def _risk(masses: Any, matrix: Any, n0: float, quantities: Any, d: float) -> float:
    used = quantities > 0
    variance = (masses[used] ** 2 / quantities[used]).sum() + (1 - masses.sum()) ** 2 / n0
    return float(d * variance + masses @ matrix @ masses) / 2


@target("otqms.allocate", specs=_problem())
def allocate(spec: Spec) -> str:
    """Feasible, certified, its risk as stated, and no worse than the target alone, all samples, or random ones."""
    matrix, available = _matrix(spec), np.array(spec["source_samples"], dtype=np.float64)
    n0, d, mode = spec["target_samples"], spec["dimension"], spec["mode"]
    budget = spec["budget"] if mode == "budget" else None
    result = outcome(otqms.allocate, matrix, n0, available, d, mode, budget, spec["debias"])
    wrong = _wrong(spec, matrix)
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    taken, masses = result.quantities, result.masses
    assert result.kkt_residual <= 1e-6
    assert (taken >= 0).all()
    assert (taken <= available).all()
    assert (masses >= 0).all()
    assert abs(masses.sum() + result.target_mass - 1) <= 1e-9
    assert result.risk <= result.target_only_risk * (1 + 1e-9), (result.risk, result.target_only_risk)
    if budget is not None:
        assert taken.sum() <= budget * (1 + 1e-9) + 1e-12
    whole = result.rounded()
    assert (whole >= 0).all()
    assert (whole <= available).all()
    assert (np.abs(whole - taken) < 1 + 1e-9 * (1 + taken)).all()
    if spec["debias"]:
        return "agreed"
    exact = np.asarray(matrix, dtype=np.float64).reshape(len(available), len(available))
    # The matrix has no more digits than it is stored with, and its terms may cancel.
    rounding = 4 * len(exact) * semidefinite.storage_epsilon(matrix)
    slack = 1e-6 * result.target_only_risk
    least = EPS * float(np.abs(exact).max())  # of the matrix as a whole
    digits = slack + rounding * (masses @ (np.abs(exact) + least) @ masses)
    assert abs(result.risk - _risk(masses, exact, n0, taken, d)) <= digits + 1e-6 * abs(masses @ exact @ masses)
    generator = np.random.default_rng(spec["seed"])
    for share in (0.0, 1.0, generator.random(len(available)), generator.random(len(available)) ** 4):
        other = available * share
        if budget is not None and other.sum() > budget:
            other *= budget / other.sum()
        pooled = other / (n0 + other.sum())
        digits = slack + rounding * (pooled @ (np.abs(exact) + least) @ pooled)
        assert result.risk <= _risk(pooled, exact, n0, other, d) * (1 + 1e-6) + digits
    return "agreed"


@target("otqms.allocation.kkt_residual", specs=_problem())
def kkt_residual(spec: Spec) -> str:
    """Small at the optimum, not at quantities that are clearly worse."""
    matrix, available = _matrix(spec), np.array(spec["source_samples"], dtype=np.float64)
    n0, d = spec["target_samples"], spec["dimension"]
    best = outcome(otqms.allocate, matrix, n0, available, d)
    at = available / 2 if isinstance(best, Refusal) else best.quantities
    result = outcome(allocation.kkt_residual, at, matrix, n0, available, d)
    wrong = _wrong(spec, matrix)
    if wrong:
        return refused(result, *wrong)
    assert isinstance(result, float), result
    assert 0 <= result < math.inf, result
    far = outcome(allocation.kkt_residual, available * 0.5, matrix, n0, available, d)
    exact = np.asarray(matrix, dtype=np.float64)
    middle = _risk(available / 2 / (n0 + available.sum() / 2), exact, n0, available / 2, d)
    assert far >= (middle - best.risk) / middle - 1e-6, (far, middle, best.risk)  # the residual bounds the excess
    return "agreed"


@target("otqms.risk", "otqms.theory.weighted_risk", specs=_problem())
def risk(spec: Spec) -> str:
    matrix, available = _matrix(spec), np.array(spec["source_samples"], dtype=np.float64)
    n0, d = spec["target_samples"], spec["dimension"]
    result = outcome(otqms.risk, available, matrix, n0, d)
    wrong = ["target_samples"] if not n0 > 0 else []
    wrong += ["dimension"] if not d > 0 else []
    wrong += ["gram"] if _no_matrix(spec, matrix) else []
    if wrong:
        return refused(result, *wrong)
    exact = np.asarray(matrix, dtype=np.float64).reshape(len(available), len(available))
    shares = available / (n0 + available.sum())
    size = d / (n0 + available.sum()) + np.abs(shares) @ np.abs(exact) @ np.abs(shares)
    tolerance = 64 * EPS * size
    assert abs(float(result) - _risk(shares, exact, n0, available, d)) <= tolerance + 1e-9 * float(d / n0)
    weighted = outcome(theory.weighted_risk, shares, matrix, n0, available, d)
    assert abs(float(weighted) - float(result)) <= 1e-9 * (size + d / n0), (weighted, result)
    return "agreed"


@target("otqms.akaike.akaike_shares", specs=_problem())
def akaike_shares(spec: Spec) -> str:
    matrix, available = _matrix(spec), np.array(spec["source_samples"], dtype=np.float64)
    n0, d = spec["target_samples"], spec["dimension"]
    result = outcome(akaike.akaike_shares, matrix, n0, available, d)
    wrong = ["target_samples"] if not n0 > 0 else []
    wrong += ["dimension"] if not d >= 0 else []
    wrong += ["gram"] if _no_matrix(spec, matrix) else []
    if wrong:
        return refused(result, *wrong)
    assert 0 <= result.target <= 1
    assert (result.sources >= 0).all()
    assert abs(result.target + result.sources.sum() - 1) <= 1e-9
    assert (result.sources[available == 0] == 0).all()
    assert 0 <= result.risk < math.inf
    return "agreed"


@target("otqms.paper_grid.paper_grid", specs=_problem())
def grid(spec: Spec) -> str:
    """On a grid, so never below the global optimum."""
    matrix, available = _matrix(spec), np.array(spec["source_samples"], dtype=np.float64)
    n0, d = spec["target_samples"], spec["dimension"]
    result = outcome(paper_grid.paper_grid, matrix, n0, available, d, points=8)
    wrong = _wrong(spec, matrix)
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    assert (result.quantities >= 0).all()
    assert (result.quantities <= available * (1 + 1e-6)).all()
    best = outcome(otqms.allocate, matrix, n0, available, d)
    assert best.risk <= result.risk * (1 + 1e-6)
    return "agreed"


@target("otqms.semidefinite.debias", "otqms.semidefinite.project", specs=_problem())
def debias(spec: Spec) -> str:
    """Positive semidefinite, and the identity where there is no noise."""
    if spec["spoil"] is not None:
        return "agreed"
    matrix = np.asarray(_matrix({**spec, "form": "numpy"}))
    sources = len(matrix)
    scale = float(np.abs(matrix).max()) + 1e-300
    for noise in (0.0, scale):
        result = outcome(semidefinite.debias, matrix, noise, np.full(sources, noise))
        assert float(np.linalg.eigvalsh(result)[0]) >= -1e-9 * scale
        if noise == 0:
            assert np.abs(result - matrix).max() <= 1e-8 * scale
    again = semidefinite.project(result)
    assert np.abs(again - result).max() <= 1e-9 * scale
    return "agreed"


# Dimensions


@st.composite
def _spectrum(draw: Any) -> Spec:
    size = draw(st.integers(0, 6))
    plain = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
    numbers = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-30, 1e30), st.sampled_from([-1.0, math.nan]))
    return {
        "eigenvalues": draw(st.lists(draw(st.sampled_from([plain, numbers])), min_size=size, max_size=size)),
        "movements": draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=size, max_size=size)),
        "damping": draw(NUMBERS),
        "target_samples": draw(st.one_of(st.integers(1, 1000), st.sampled_from([0, -1.0]))),
    }


@target(
    "otqms.dimension.effective_dimension",
    "otqms.dimension.displacement_damping",
    "otqms.dimension.evidence_damping",
    specs=_spectrum(),
)
def effective_dimension(spec: Spec) -> str:
    eigenvalues, damping, n0 = spec["eigenvalues"], spec["damping"], spec["target_samples"]
    result = outcome(dimension.effective_dimension, eigenvalues, damping)
    moved = outcome(dimension.displacement_damping, eigenvalues, damping, n0)
    evidence = outcome(dimension.evidence_damping, eigenvalues, spec["movements"], n0)
    bad = not all(math.isfinite(x) for x in eigenvalues) or not any(x > 0 for x in eigenvalues)
    noise = 8 * len(eigenvalues) * EPS * max([*eigenvalues, 0.0]) if not bad else 0.0  # which counts as zero
    bad = bad or min(eigenvalues) < -noise
    wrong = ["eigenvalues"] if bad else []
    for name, found, extra in (
        ("damping", result, [] if math.isfinite(damping) and damping > 0 else ["damping"]),
        (
            "moved",
            moved,
            ([] if math.isfinite(damping) and damping > 0 else ["squared_displacement"])
            + ([] if n0 > 0 else ["target_samples"]),
        ),
        ("evidence", evidence, [] if n0 > 0 else ["target_samples"]),
    ):
        if wrong + extra:
            refused(found, *wrong, *extra)
        else:
            assert not isinstance(found, Refusal), (name, found)
    if wrong:
        return "refused"
    if not isinstance(result, Refusal):
        exact = sum(Fraction(x) / (Fraction(x) + Fraction(damping)) for x in eigenvalues if x > noise)
        assert abs(float(result) - float(exact)) <= 1e-9 + len(eigenvalues) * EPS * 16
    if not isinstance(moved, Refusal):
        back = float(dimension.effective_dimension(eigenvalues, moved)) / (n0 * moved)
        assert abs(back - damping) <= 1e-9 * damping, (back, damping)
    if not isinstance(evidence, Refusal):
        assert evidence > 0
    return "agreed"


@st.composite
def _halves(draw: Any) -> Spec:
    tasks = draw(st.integers(0, 4))
    return {"rows": 2 * tasks + draw(st.sampled_from([0, 0, 0, 1])), "seed": draw(SEEDS), "bad": draw(st.booleans())}


@target("otqms.dimension.split_halves", specs=_halves())
def split_halves(spec: Spec) -> str:
    """Exact, and without noise, where both halves give the same estimates."""
    generator = np.random.default_rng(spec["seed"])
    rows, tasks = spec["rows"], spec["rows"] // 2
    half = generator.standard_normal((tasks, 9))
    points = np.concatenate([half, half])
    gram = points @ points.T
    if spec["bad"] and gram.size:
        gram[0, 0] = math.nan
    if rows % 2:
        gram = gram[1:]
    result = outcome(dimension.split_halves, gram)
    if rows % 2 or tasks < 2 or spec["bad"]:
        return refused(result, "gram")
    apart = half[1:] - half[0]
    assert np.abs(result.gram - apart @ apart.T).max() <= 1e-12 * np.abs(gram).max()
    assert result.target_noise <= 1e-12 * np.abs(gram).max()
    assert result.source_noise.max() <= 1e-12 * np.abs(gram).max()
    return "agreed"
