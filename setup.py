"""A stub: pyproject.toml says everything. Beam's `--setup_file` wants a file of this name."""

import setuptools

setuptools.setup()
