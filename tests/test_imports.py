"""Imports point one way: student <- transforms <- evaluation <- training <- pipeline."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each package may import of the project.
ALLOWED = {
    "student": {"student"},
    "transforms": {"student", "transforms"},
    # Where scores lie, and what is in a row.
    "evaluation": {"student", "transforms", "evaluation"},
    # The readers and decoders of `transforms`, for the same clips in training as in use.
    "training": {"student", "transforms", "evaluation", "training"},
    "pipeline": {"student", "transforms", "evaluation", "training", "pipeline"},
}
FILES = sorted(file for package in ALLOWED for file in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    package = file.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imported(file)} & set(ALLOWED)
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize("package", ["student", "evaluation", "training"])
def test_the_model_and_its_training_never_load_beam(package):
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if file.relative_to(ROOT).parts[0] == package
        and ("triton" not in imported(file) or importlib.util.find_spec("triton"))
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('apache_beam' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_the_joints_import_beam():
    users = {
        str(file.relative_to(ROOT))
        for file in FILES
        if any(module.split(".")[0] == "apache_beam" for module in imported(file))
    }
    assert users == {
        "pipeline/dataflow.py",
        "pipeline/options.py",
        "pipeline/run.py",
        "transforms/annotate.py",
        "transforms/tag.py",
    }


def test_help_loads_neither_torch_nor_beam():
    heavy = {"torch", "apache_beam", "transformers", "datasets", "pyarrow", "matplotlib", "sklearn"}
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli; "
        "commands = [[], *([name] for name in cli.commands)]; "
        "assert all(CliRunner().invoke(cli, [*c, '--help']).exit_code == 0 for c in commands); "
        f"sys.exit(bool({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_annotate_loads_nothing_of_the_other_commands():
    """Each costs the first row of a local run a part of a second, or more."""
    heavy = {"training", "evaluation", "matplotlib", "sklearn", "datasets", "duckdb"}
    code = (
        "import sys, pipeline.cli, pipeline.display, pipeline.run; "
        f"loaded = {heavy} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scoring_loads_torch_and_no_more():
    """transformers and what comes with it take as long to import as all the rest."""
    heavy = {"transformers", "scipy", "sympy", "pandas", "sklearn", "torch._dynamo"}
    code = (
        "import sys, numpy as np; from student import Student; "
        "student = Student.load('bundled', device='cpu'); "
        "assert student.score([np.zeros(16_000, np.float32)]).shape == (1, 527); "
        f"loaded = {heavy} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_the_packages_are_this_projects(package):
    """`pipeline` and `transforms` are common names: another distribution could shadow them."""
    code = f"import {package}; print({package}.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert Path(found.stdout.strip()) == ROOT / package / "__init__.py"


def imported(file):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
