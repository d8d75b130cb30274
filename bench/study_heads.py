"""Few-shot digits: the closed-form head against no adaptation, ridge regression, gradient descent and pinv.

    python bench/study_heads.py [--data digits_multi.npz]

One network is trained on all other domains together; for every number of shots and every seed each arm gets the same
shots. Targets are two domains of scikit-learn's 8x8 digits (:func:`transferops.data.load_digits_domains`) and, given
the bundle, three of it. A second sweep passes N = p, where the published pseudo-inverse collapses. Writes JSON,
Markdown and a picture to bench/results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from run import environment
from sklearn.linear_model import RidgeCV

from transferops._figures import DPI, new_figure, plain_axes
from transferops.adapt.few_shot import compare_heads, head_inputs, pretrain
from transferops.data import Domain, DomainBundle, few_shot_split, load_digits_domains, load_npz
from transferops.otqms import network_for

SHOTS = (1, 2, 5, 10, 30)
SWEEP = (1, 2, 5, 8, 10, 12, 13, 14, 16, 20, 30)
SEEDS = range(10)
OURS = ("unadapted", "adapted", "gradient", "pinv")
RIVALS = ("unadapted", "ridge (scikit-learn)", "gradient")
RESULTS = Path(__file__).resolve().parent / "results"


def ridge(network: torch.nn.Module, train: Domain, test: Domain) -> float:
    """Accuracy of scikit-learn's ridge regression on one-hot labels, its penalty by leave-one-out."""
    features, targets = head_inputs(network, train.inputs).numpy(), np.eye(10)[train.labels.numpy()]
    fitted = RidgeCV(np.logspace(-4, 6, 60)).fit(features, targets)
    predicted = fitted.predict(head_inputs(network, test.inputs).numpy()).argmax(1)
    return float((predicted == test.labels.numpy()).mean())


def study(bundle: DomainBundle, target: str, epochs: int, shots: tuple[int, ...]) -> dict[str, Any]:
    """Accuracies by arm and shots, a list over seeds each."""
    domain, sources = bundle.choose(target)
    torch.manual_seed(0)
    network = network_for(bundle.sample_shape, bundle.classes)
    pretrain(network, *(torch.cat([getattr(s, key) for s in sources]) for key in ("inputs", "labels")), epochs=epochs)
    least = int(domain.class_counts(bundle.classes).min())
    result: dict[str, Any] = {"features": head_inputs(network, domain.inputs[:1]).shape[1], "shots": {}}
    for count in (count for count in shots if count < least):
        arms: dict[str, list[float]] = {}
        for seed in SEEDS:
            split = few_shot_split(domain, count, validation_fraction=0, seed=seed)
            train, test = split.train, split.test
            pairs = (train.inputs, train.labels), (test.inputs, test.labels)
            for arm, accuracy in compare_heads(network, *pairs, arms=OURS).accuracy.items():
                arms.setdefault(arm, []).append(accuracy)
            arms.setdefault("ridge (scikit-learn)", []).append(ridge(network, train, test))
        result["shots"][count] = arms
    return result


def markdown(document: dict[str, Any]) -> str:
    """A table: accuracy by target, shots and arm, and how far ours is from the best of the others."""
    env = document["environment"]
    arms = ("unadapted", "ridge (scikit-learn)", "gradient", "pinv", "adapted")
    lines = [
        f"Measured {env['date']} at commit {env['commit']} on {env['processor']}, torch {env['torch']}. Test accuracy "
        f"in %, mean and standard error over {len(SEEDS)} seeds (choices of shots; one pretrained network per target). "
        "The last column is ours minus the best mean of no adaptation, ridge and gradient descent.",
        "",
        "| target | shots | " + " | ".join(arms) + " | difference |",
        "|---|---|" + "---|" * (len(arms) + 1),
    ]
    cells, behind = 0, []
    for target, result in document["targets"].items():
        for shots, by_arm in result["shots"].items():
            means = {arm: 100 * fmean(by_arm[arm]) for arm in arms}
            errors = {arm: 100 * stdev(by_arm[arm]) / len(by_arm[arm]) ** 0.5 for arm in arms}
            difference = means["adapted"] - max(means[arm] for arm in RIVALS)
            row = [f"{means[arm]:.1f} ± {errors[arm]:.1f}" for arm in arms]
            lines.append(f"| {target} | {shots} | " + " | ".join(row) + f" | {difference:+.1f} |")
            cells += 1
            if difference < -1:
                behind.append(f"{target} at {shots} ({difference:+.1f})")
    lines += ["", f"More than a point behind in {len(behind)} of {cells}: {', '.join(behind) or 'none'}."]
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], path: Path) -> None:
    """The pseudo-inverse through N = p beside the others, one target."""
    sweep = document["sweep"]
    figure = new_figure(3.6)
    panel = plain_axes(figure.subplots())
    samples = [10 * int(count) for count in sweep["shots"]]
    labels = {"unadapted": "no adaptation", "gradient": "last-layer gradient descent", "pinv": "published pinv"}
    for arm in ("unadapted", "gradient", "ridge (scikit-learn)", "pinv", "adapted"):
        values = [[100 * v for v in by_arm[arm]] for by_arm in sweep["shots"].values()]
        errors = [stdev(v) / len(v) ** 0.5 for v in values]
        panel.errorbar(samples, [fmean(v) for v in values], errors, label=labels.get(arm, arm), capsize=2)
    panel.axvline(sweep["features"], color="black", linewidth=0.8, linestyle=":")
    panel.annotate("N = p", (sweep["features"], 0), (4, 4), ("data", "axes fraction"), "offset points")
    panel.set_xscale("log")
    panel.set_xlabel("labelled target samples N")
    panel.set_ylabel("test accuracy, %")
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz bundle with the domains usps, mnistm and street")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    start = time.perf_counter()
    embedded = load_digits_domains()
    targets = {f"8x8 {name}": study(embedded, name, 20, SHOTS) for name in ("rotated-30", "inverted")}
    if data is not None:
        bundle = load_npz(data)
        targets |= {f"28x28 {name}": study(bundle, name, 5, SHOTS) for name in ("usps", "mnistm", "street")}
    document = {"environment": environment(), "targets": targets, "sweep": study(embedded, "rotated-30", 20, SWEEP)}
    document["seconds"] = time.perf_counter() - start
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "study_heads.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "study_heads.md").write_text(markdown(document))
    plot(document, RESULTS / "study_heads.png")
    print(markdown(document))


if __name__ == "__main__":
    main()
