"""Options that several commands take, in the same words."""

from __future__ import annotations

import click


def examples(*commands: str) -> str:
    """An epilog of a command's help: commands to copy, one a line."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


billing_project = click.option(
    "--billing-project",
    metavar="P",
    help="Google Cloud project that pays for requests to requester-pays buckets.",
)

kms_key = click.option(
    "--kms-key",
    metavar="K",
    help="Cloud KMS key to encrypt the output with, by its full resource name.",
)

thresholds = click.option(
    "--thresholds",
    metavar="FILE",
    help="JSON of label name or mid to the score from which it is a tag, or what earmark evaluate --thresholds wrote.",
)

inputs_from = click.option(
    "--inputs-from",
    multiple=True,
    metavar="FILE",
    help="A file that names one INPUT a line.",
)

tags = click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="LABEL[>S]",
    help="Clips that have this tag, or whose score of this label is above (>, >=) or below (<, <=) S. May be repeated.",
)

under = click.option(
    "--under",
    multiple=True,
    metavar="LABEL",
    help="Clips with a tag of this label or of any below it in AudioSet's ontology. May be repeated.",
)

any_of = click.option(
    "--any/--all",
    "any_of",
    default=False,
    help="Whether any of --tag and --under is enough, or all must hold. [default: all]",
)
