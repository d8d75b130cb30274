"""What a domain is: inputs, labels, and several of them over one set of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from transferops._validate import check_tensor, describe, fail


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled samples of one origin.

    Args:
        name: What the domain is called in options, tables and files.
        inputs: float32 ``[N, ...]``: images ``[N, C, H, W]`` or features ``[N, D]``; finite, ``N >= 1``.
        labels: int64 ``[N]``, classes counted from 0.

    Raises:
        TypeError: If ``inputs`` or ``labels`` is not a tensor of the stated dtype.
        ValueError: If shapes disagree, an input is not finite, or a label is negative.
    """

    name: str
    inputs: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)

    def __post_init__(self) -> None:
        inputs, labels = f"{self.name}.inputs", f"{self.name}.labels"
        if check_tensor(inputs, self.inputs).dtype != torch.float32:
            fail(inputs, "float32", describe(self.inputs), TypeError)
        if check_tensor(labels, self.labels).dtype != torch.int64:
            fail(labels, "int64", describe(self.labels), TypeError)
        if self.inputs.ndim < 2 or len(self.inputs) == 0:
            fail(inputs, "at least one sample of at least one number", describe(self.inputs))
        if self.labels.shape != self.inputs.shape[:1]:
            fail(labels, f"{len(self.inputs)} labels, one per sample", describe(self.labels))
        bad = (~self.inputs.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            fail(inputs, "finite numbers", f"NaN or infinity in sample {int(bad[0])}")
        if self.labels.min() < 0:
            position = int(self.labels.argmin())
            fail(labels, "classes counted from 0", f"{int(self.labels[position])} at position {position}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> Domain:
        """The samples at ``index`` (int64 ``[M]``, ``M >= 1``), under the same name."""
        return Domain(self.name, self.inputs[index], self.labels[index])

    def class_counts(self, classes: int) -> torch.Tensor:
        """Samples of each class, int64 ``[classes]``."""
        return torch.bincount(self.labels, minlength=classes)


@dataclass(frozen=True, eq=False)
class DomainBundle:
    """Domains over one set of classes, with samples of one shape.

    Args:
        domains: Domain by name, in the order of the file.
        class_names: One name per class, or ``None`` where the data does not say.
        undecodable: Files that were left out because they could not be decoded, as paths within the folder.

    Raises:
        ValueError: If there is no domain, sample shapes differ, or a label is out of range.
    """

    domains: Mapping[str, Domain]
    class_names: tuple[str, ...] | None = None
    undecodable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.domains:
            fail("domains", "at least one domain", "none")
        first = next(iter(self.domains.values()))
        total = sum(len(domain) for domain in self.domains.values())
        limit = total if self.class_names is None else len(self.class_names)
        for domain in self.domains.values():
            if domain.inputs.shape[1:] != first.inputs.shape[1:]:
                fail(
                    f"{domain.name}.inputs",
                    f"samples of shape {list(first.inputs.shape[1:])} as in {first.name}",
                    f"{list(domain.inputs.shape[1:])}",
                )
            highest = int(domain.labels.max())
            if highest >= limit:
                what = "samples in all" if self.class_names is None else "class names"
                fail(f"{domain.name}.labels", f"classes below {limit}, the number of {what}", str(highest))

    @property
    def classes(self) -> int:
        """Number of classes: of names where there are names, else one more than the highest label."""
        if self.class_names is not None:
            return len(self.class_names)
        return 1 + max(int(domain.labels.max()) for domain in self.domains.values())

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(C, H, W)`` for images and ``(D,)`` for features."""
        return tuple(next(iter(self.domains.values())).inputs.shape[1:])

    def missing_classes(self) -> dict[str, list[int]]:
        """Classes without a sample, by domain; domains that have every class are left out."""
        counts = {name: domain.class_counts(self.classes) for name, domain in self.domains.items()}
        return {name: (count == 0).nonzero()[:, 0].tolist() for name, count in counts.items() if (count == 0).any()}

    def choose(self, target: str, sources: Sequence[str] | None = None) -> tuple[Domain, list[Domain]]:
        """The target domain and its sources.

        Args:
            target: Name of the target domain.
            sources: Names of the source domains; ``None`` takes every other domain.

        Raises:
            ValueError: If a name is unknown, repeated or the target's, or no source remains.
        """
        known = ", ".join(self.domains)
        if target not in self.domains:
            fail("target", f"one of {known}", repr(target))
        names = [name for name in self.domains if name != target] if sources is None else list(sources)
        for name in names:
            if name not in self.domains:
                fail("sources", f"names among {known}", repr(name))
            if name == target:
                fail("sources", "domains other than the target", repr(name))
        if len(set(names)) < len(names):
            fail("sources", "each domain once", ", ".join(names))
        if not names:
            fail("sources", "at least one domain beside the target", "none")
        return self.domains[target], [self.domains[name] for name in names]
