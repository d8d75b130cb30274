"""Domains: labelled sets of samples that share one task and differ in where the samples come from.

A :class:`Domain` is a tensor of inputs with integer labels; a :class:`DomainBundle` is several of
them over one set of classes. Readers turn ``.npz`` bundles and image-folder trees into bundles,
:func:`load_digits_domains` is a small real one that needs no download, and :func:`few_shot_split`
cuts the target into training, validation and test parts.
"""

from transferops.data.digits import DEFAULT_TARGET, load_digits_domains
from transferops.data.domains import Domain, DomainBundle
from transferops.data.folder import load_folder
from transferops.data.npz import load_npz
from transferops.data.readers import load_bundle
from transferops.data.split import FewShotSplit, few_shot_split

__all__ = [
    "DEFAULT_TARGET",
    "Domain",
    "DomainBundle",
    "FewShotSplit",
    "few_shot_split",
    "load_bundle",
    "load_digits_domains",
    "load_folder",
    "load_npz",
]
