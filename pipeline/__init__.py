"""The program: command line, options, and the wiring of the steps."""

__version__ = "0.1.0"
