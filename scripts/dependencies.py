"""What the package depends on, from pyproject.toml and the metadata of what is installed.

Usage: python scripts/dependencies.py page          Markdown: declared requirements, by extra, with licences
       python scripts/dependencies.py constraints   pip constraints: the installed versions of all that the extras need
       python scripts/dependencies.py sbom          CycloneDX 1.5 JSON: the same, with licences and who needs whom
       python scripts/dependencies.py minimum       the oldest versions declared, as requirements for pip

docs/dependencies.md holds the first and constraints.txt the second, written by ``make dependencies``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OWN = "transferops"
MINIMUM = ("", "otqms", "cli", "scores", "sklearn", "test")  # extras whose oldest versions are tested

_PAGE = """\
# Dependencies

Installed with the package are torch and NumPy; everything else belongs to an extra, is imported when it is first
needed, and is named in the error that its absence gives. `transferops doctor` lists what is missing.

A wheel holds no code of others: torch's libraries stay where torch has them. The licences are those that the packages'
metadata state. `python scripts/dependencies.py sbom` writes what is installed, with exact versions and who needs whom,
as a CycloneDX document.

The compiled module uses torch's stable ABI of release 2.11: it runs with that release and all later ones, whichever of
them it was built with, and needs to be built again for another minor version of Python only. With an older torch the
import fails with the command that upgrades it. `make test-minimum` runs the tests with the oldest versions of the
table; `constraints.txt` has the versions that were last used (`make test CONSTRAINTS=constraints.txt`).

"""


def declared() -> dict[str, list[Requirement]]:
    """Requirements by extra, "" those of the package itself, references to other extras left out."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    parsed = {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}
    return {extra: [r for r in requirements if r.name != OWN] for extra, requirements in parsed.items()}


def page() -> str:
    """The page of the documentation."""
    return _PAGE + table()


def table() -> str:
    """Markdown: a row for each package, with its bounds, the extras that need it and, if installed, its licence."""
    bounds: dict[str, set[str]] = defaultdict(set)
    extras: dict[str, list[str]] = defaultdict(list)
    for extra, requirements in declared().items():
        for requirement in requirements:
            bounds[requirement.name].add(str(requirement.specifier))
            extras[requirement.name].append(extra)
    lines = ["| package | versions | needed by | licence |", "|---|---|---|---|"]
    order = sorted(bounds, key=lambda name: ("" not in extras[name], name.lower()))
    for name in order:
        wanted = ", ".join("the package" if extra == "" else f"`{extra}`" for extra in extras[name])
        lines.append(f"| {name} | {' / '.join(sorted(bounds[name]))} | {wanted} | {_licence(name) or '-'} |")
    return "\n".join(lines) + "\n"


def closure() -> dict[str, metadata.Distribution]:
    """All installed packages that the extras need, directly or not, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [requirement for requirements in declared().values() for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name == OWN:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        waiting += _needed(found[name], requirement.extras)
    return dict(sorted(found.items()))


def constraints() -> str:
    """A line for each package of :func:`closure`; local version labels such as +cpu are left out."""
    lines = [f"{name}=={found.version.partition('+')[0]}" for name, found in closure().items()]
    return "\n".join(["# Written by `make dependencies`: what development and CI last ran with.", *lines]) + "\n"


def sbom() -> str:
    """The CycloneDX document."""
    packages = closure()
    own = next((d for d in metadata.distributions(name=OWN)), None)
    version = own.version if own is not None else "0"
    components = [
        {
            "type": "library",
            "bom-ref": name,
            "name": name,
            "version": found.version,
            "purl": f"pkg:pypi/{name}@{found.version}",
            "licenses": [{"license": {"name": _licence(name)}}] if _licence(name) else [],
        }
        for name, found in packages.items()
    ]
    edges = {name: sorted({canonicalize_name(r.name) for r in _needed(d, set())}) for name, d in packages.items()}
    edges[OWN] = sorted({canonicalize_name(r.name) for r in declared()[""]})
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "library", "bom-ref": OWN, "name": OWN, "version": version}},
        "components": components,
        "dependencies": [
            {"ref": name, "dependsOn": [other for other in others if other in packages]}
            for name, others in edges.items()
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def minimum() -> str:
    """``name==version`` of the oldest version that every one of the tested extras allows."""
    oldest: dict[str, tuple[tuple[int, ...], str]] = {}
    for extra, requirements in declared().items():
        for requirement in requirements if extra in MINIMUM else []:
            for part in requirement.specifier:
                if part.operator in (">=", "=="):
                    key = tuple(int(number) for number in re.findall(r"\d+", part.version))
                    oldest[requirement.name] = max(oldest.get(requirement.name, ((), "")), (key, part.version))
    return "\n".join(f"{name}=={version}" for name, (_, version) in sorted(oldest.items())) + "\n"


def _needed(found: metadata.Distribution, extras: Any) -> Iterator[Requirement]:
    for line in found.requires or []:
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            yield requirement


def _licence(name: str) -> str:
    """The licence as the package states it, by an expression, a name or a classifier; empty if it is not installed."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ""
    short = facts.get("License", "").strip()
    classified = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
    stated = facts.get("License-Expression") or (short if short and len(short) < 60 else "; ".join(classified))
    return str(stated or short.partition("\n")[0])


if __name__ == "__main__":
    commands = {"page": page, "constraints": constraints, "sbom": sbom, "minimum": minimum}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.stdout.write(commands[sys.argv[1]]())
