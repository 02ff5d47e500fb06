"""Say what the running Python lacks of setup.cfg's requirements; standard library only, so that any Python can run it.

`python check_environment.py [EXTRA ...]` exits 0 when everything is there at a usable version, else 1 with one
line per missing requirement. Only package metadata is read: nothing is imported, it takes a fraction of a second.
"""

import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

SETUP_CFG = Path(__file__).resolve().parents[1] / "setup.cfg"


def missing(extras):
    """One sentence per requirement of setup.cfg (with `extras`) that this Python does not meet."""
    config = configparser.ConfigParser()
    config.read(SETUP_CFG, encoding="utf-8")
    needed = config["options"]["python_requires"]
    minimum = tuple(int(part) for part in re.findall(r"\d+", needed))
    if sys.version_info[: len(minimum)] < minimum:
        return [f"Python {needed} is needed, {sys.executable} is {sys.version.split()[0]}"]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed"]
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    problems = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    return problems


if __name__ == "__main__":
    found = missing(sys.argv[1:])
    if found:
        print("\n".join(found))
    sys.exit(1 if found else 0)
