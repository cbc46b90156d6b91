"""How every command ends: what went wrong in one sentence, and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import click

from pipeline.options import UsageError

EXIT_FAILURES = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


# Control and format characters, lone surrogates, line and paragraph separators; but for the joiners
# of which emoji and some scripts are made.
_OBEYED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """A name from data as it may be shown: what moves a cursor, hides or turns text becomes \\xNN, \\uNNNN.

    Names of clips and files are anybody's: an escape sequence in one must not reach a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _OBEYED and character not in _JOINERS
        else character
        for character in text
    )


def printable(text: str) -> str:
    """`visible`, line by line: for text of several."""
    return "\n".join(map(visible, text.split("\n")))


# Errors whose message says what to do, which is not the same once more.
_SAY_ALL = ("JobRefused", "JobFailed", "DamagedOutput", "NonFiniteScoresError")


@contextlib.contextmanager
def errors_said(
    verbose: bool,
    kept: str | Callable[[], str] = "Finished shards are kept: run the same command again to go on",
) -> Any:
    """Turns what went wrong into one sentence and an exit code.

    `kept` says what is not lost; a function is asked when something went wrong.
    """
    try:
        yield
    except UsageError as error:
        click.echo(printable(f"Error: {error}"), err=True)
        sys.exit(EXIT_USAGE)
    except (KeyboardInterrupt, Exception) as error:
        kept = kept if isinstance(kept, str) else kept()
        if _was_interrupted(error):
            # What was interrupted while it waited for a job elsewhere says so itself.
            said = str(error) if str(error).startswith("Stopped") else f"Stopped. {kept}."
            click.echo(printable(said), err=True)
            sys.exit(EXIT_INTERRUPTED)
        if verbose:
            raise
        if type(error).__name__ in _SAY_ALL:
            said = re.sub(r" \[while running '[^']*'\]$", "", str(error))
            click.echo(printable(f"Error: {said}"), err=True)
            sys.exit(EXIT_FAILURES)
        first = (str(error).strip().splitlines() or [""])[0]
        click.echo(
            printable(f"Error: the run stopped: {type(error).__name__}: {first}\n")
            + f"{kept}, with --verbose to see more.",
            err=True,
        )
        sys.exit(EXIT_FAILURES)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error; Beam wraps it into one of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or str(error).startswith("KeyboardInterrupt"):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def quiet(verbose: bool) -> None:
    """Leaves the terminal to what earmark says, unless `verbose`."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # the terminal, not a test's or a service's
            handler.setFormatter(_Printable(logging.BASIC_FORMAT))
    if not verbose:
        # Beam logs the traceback of what `errors_said` says in a sentence.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL + 1)
    # A progress bar of the hub's own is welcome only where someone watches.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
