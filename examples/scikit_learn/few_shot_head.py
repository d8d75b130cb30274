"""A head for few samples of a new domain, kept near one from another domain, in scikit-learn's own terms.

    python examples/scikit_learn/few_shot_head.py

Digits as they are have plenty of samples; digits turned by 15 degrees have three of each class. Compared on the other
turned digits: the old head as it is, ridge regression on the few samples alone, and the head between the two, whose
penalty is chosen by exact leave-one-out on the few samples.
"""

from __future__ import annotations

import math

from transferops.data import few_shot_split, load_digits_domains
from transferops.integrations.sklearn import HeadClassifier


def main() -> None:
    domains = load_digits_domains().domains
    source, target = domains["plain"], few_shot_split(domains["rotated-15"], 3, validation_fraction=0)
    pixels, labels = target.train.inputs.flatten(1).numpy(), target.train.labels.numpy()

    old = HeadClassifier().fit(source.inputs.flatten(1).numpy(), source.labels.numpy())
    prior = {"prior_weight": old.coef_, "prior_bias": old.intercept_}
    models = {
        "the old head": HeadClassifier(**prior, lam=math.inf),
        "few samples alone": HeadClassifier(),
        "near the old head": HeadClassifier(**prior),
    }
    unseen = target.test.inputs.flatten(1).numpy(), target.test.labels.numpy()
    for name, model in models.items():
        accuracy = model.fit(pixels, labels).score(*unseen)
        print(f"{name:<20}{accuracy:.3f}  penalty {model.lam_:.3g}")


if __name__ == "__main__":
    main()
