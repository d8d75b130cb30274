"""Checks that the sdist holds every tracked source, and the wheel the package with its compiled module only.

Usage: python scripts/check_dist.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

NOT_SHIPPED = (".ci/", ".gitignore")


def main(folder: Path) -> int:
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = {name for name in tracked if name and not name.startswith(NOT_SHIPPED)}
    with tarfile.open(sdist) as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = sorted(wanted - shipped)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    strangers = [name for name in names if not name.startswith(("transferops/", "transferops-"))]
    modules = [name for name in names if name.startswith("transferops/_C.") and not name.endswith(".pyi")]
    print(f"{sdist.name}: {len(shipped)} files; {wheel.name}: {len(names)} files, extension {modules}")
    if missing or strangers or len(modules) != 1:
        print(f"missing from the sdist: {missing}; unexpected in the wheel: {strangers}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
