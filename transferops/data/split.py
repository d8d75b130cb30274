"""Few labelled target samples for training, a part of them for validation, the rest for the test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transferops._validate import check_positive_int, describe, fail
from transferops.data.domains import Domain


@dataclass(frozen=True, eq=False)
class FewShotSplit:
    """Disjoint parts of a target domain.

    Attributes:
        train: Labelled samples to train on.
        validation: Labelled samples for early stopping; ``None`` where the shots do not suffice for any.
        test: Everything else; its labels are for the final accuracy only.
    """

    train: Domain
    validation: Domain | None
    test: Domain


def validation_shots(shots: int, validation_fraction: float) -> int:
    """How many of a class's ``shots`` are validation samples.

    ``round(shots * validation_fraction)``, but at least one where ``shots >= 2`` (and at least one stays for
    training); none for one shot or a fraction of 0.
    """
    if shots < 2 or validation_fraction == 0:
        return 0
    return min(max(round(shots * validation_fraction), 1), shots - 1)


def few_shot_split(domain: Domain, shots: int, validation_fraction: float = 0.2, seed: int = 0) -> FewShotSplit:
    """Split a target domain class by class, at random.

    Of each class that the domain has, ``shots`` samples are labelled: :func:`validation_shots` of them for
    validation, the others for training. All further samples are the test part.

    Args:
        domain: The target.
        shots: Labelled samples per class, at least 1.
        validation_fraction: Share of the shots used for validation, in [0, 1).
        seed: Of the random choice; the same seed gives the same split.

    Raises:
        ValueError: If an argument is out of range or a class has fewer than ``shots + 1`` samples.
    """
    check_positive_int("shots", shots)
    check_positive_int("seed", seed, minimum=0)
    if not 0 <= validation_fraction < 1:
        fail("validation_fraction", "a number in [0, 1)", describe(validation_fraction))
    held_out = validation_shots(shots, validation_fraction)
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for label in torch.unique(domain.labels).tolist():
        members = (domain.labels == label).nonzero()[:, 0]
        if len(members) <= shots:
            expected = f"at most {len(members) - 1} for {domain.name} (class {label} has {len(members)} samples"
            fail("shots", f"{expected}, one stays for the test)", str(shots))
        members = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(parts, members.split([shots - held_out, held_out, len(members) - shots]), strict=True):
            part.append(chosen)
    train, validation, test = (torch.cat(part) for part in parts)
    return FewShotSplit(domain.subset(train), domain.subset(validation) if held_out else None, domain.subset(test))
