"""Writes `requirements.lock`: every package of the image, pinned, with the hash of its file.

    python3.11 deploy/lock.py

asks pip to resolve `earmark-audio[cloud]` with the versions of `constraints.txt`, for the
Python and platform that runs this (which must be the image's: Linux x86_64, Python 3.11), and
writes down what pip would install. pip reads metadata only: the gigabytes of CUDA libraries are
not downloaded. Its configuration files and PIP_FIND_LINKS do not count, so that a wheel that
lies on the machine cannot get into the lock.

`--torch 2.13.0+cu126`, with PIP_EXTRA_INDEX_URL set to the index that PyTorch names for it,
pins another build of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parent
ROOT = DEPLOY.parent
LOCK = DEPLOY / "requirements.lock"
PYTHON = (3, 11)

# What of a user's pip settings may speak: how to reach an index, not what lies beside it.
_KEPT_SETTINGS = {
    "PIP_CERT", "PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL",
    "PIP_PROXY",
}  # fmt: skip

_HEADER = """\
# The image's packages: `earmark-audio[cloud]` on Linux x86_64, Python {python}.
# Made by `python{python} deploy/lock.py` from pyproject.toml and constraints.txt; do not edit.
# One hash a package: that of the file for this platform, so another file is refused.
"""


def main() -> None:
    """Writes the lock file, or says why not."""
    parser = argparse.ArgumentParser(description="Write deploy/requirements.lock anew.")
    parser.add_argument("--torch", metavar="VERSION", help="pin this torch, not constraints.txt's")
    parser.add_argument(
        "--output", type=Path, default=LOCK, metavar="FILE", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    here = (sys.version_info[:2], sys.platform, platform.machine())
    if here != (PYTHON, "linux", "x86_64"):
        sys.exit(
            f"this is Python {here[0][0]}.{here[0][1]} on {here[1]} {here[2]}, but the image has "
            f"Python {PYTHON[0]}.{PYTHON[1]} on linux x86_64: run this there, for instance in "
            "python:3.11-slim-bookworm"
        )
    text = lock_text(resolve(requirements(), constraints(arguments.torch)))
    arguments.output.write_text(text, "utf-8")
    print(f"{arguments.output}: {text.count('==')} packages")


def requirements() -> list[str]:
    """What the image installs: the package's dependencies and those of its extra `cloud`."""
    import tomllib  # not there before Python 3.11, which `main` says better

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["cloud"]]


def constraints(torch: str | None = None) -> list[str]:
    """The pins of constraints.txt, with `torch` in the place of its torch."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    if torch is None:
        return pins
    return [f"torch=={torch}", *(pin for pin in pins if not pin.startswith("torch=="))]


def resolve(wanted: list[str], pins: list[str]) -> list[dict[str, Any]]:
    """What pip would install: the `install` list of its installation report.

    Raises:
        SystemExit: pip cannot resolve it; pip has said why.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PIP_") or name in _KEPT_SETTINGS
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, pinned, report = (Path(folder, name) for name in ("asked", "pinned", "report"))
        asked.write_text("\n".join(wanted), "utf-8")
        pinned.write_text("\n".join(pins), "utf-8")
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
            "--prefer-binary", "--requirement", asked, "--constraint", pinned, "--report", report,
        ]  # fmt: skip
        environment = kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            sys.exit(f"pip could not resolve the requirements (exit code {code})")
        return json.loads(report.read_text("utf-8"))["install"]


def lock_text(installed: list[dict[str, Any]]) -> str:
    """The lock file: one `name==version` and its hash per package, sorted by name."""
    pins = {}
    for package in installed:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
        pins[name] = f"{name}=={package['metadata']['version']} \\\n    --hash=sha256:{sha256}\n"
    header = _HEADER.format(python=".".join(map(str, PYTHON)))
    return header + "".join(pins[name] for name in sorted(pins))


if __name__ == "__main__":
    main()
