"""What is installed is what is here: packages, data, pins, versions."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pipeline

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def files_of_packages():
    packages = ("evaluation", "pipeline", "student", "training", "transforms")
    kept = [file for package in packages for file in (ROOT / package).rglob("*") if file.is_file()]
    return {str(f.relative_to(ROOT)) for f in kept if "__pycache__" not in f.parts}


def test_the_wheel_holds_every_module_and_the_bundled_student(source, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == files_of_packages()


def test_the_setup_file_that_beam_stages_holds_them_too(source, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert files_of_packages() <= inside


def test_versions_agree():
    assert PROJECT["project"]["version"] == pipeline.__version__


def test_every_dependency_is_pinned_and_torch_first():
    pins = [line for line in CONSTRAINTS if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["cloud"] + extras["test"]
    names = {re.match(r"[\w-]+", requirement).group().lower() for requirement in wanted}
    assert names <= pinned


def test_the_bundled_weights_stay_small():
    assert (ROOT / "student" / "bundled" / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize(
    "command", [["annotate", "nofolder", "-o", "out"], ["estimate", "nofolder"]]
)
def test_a_misspelt_path_does_not_wait_for_beam_and_torch(command, tmp_path):
    code = (
        "import sys; from pipeline.cli import cli\n"
        "try: cli(sys.argv[1:])\n"
        "finally: print(sorted({'apache_beam', 'torch', 'transformers'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == "Error: 'nofolder' does not exist\n"
