"""`python -m pipeline` is `earmark`."""

from pipeline.cli import main

main()
