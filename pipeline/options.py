"""What a user can ask of `earmark annotate`, and Beam's own options beside it."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from student import BUNDLED

if TYPE_CHECKING:  # heavy to import, and only types here
    from student.model import Pad
    from transforms.score import Pool
    from transforms.write import ScoreType

# Beam's `DirectRunner` is another engine online (Prism, which it downloads) than
# offline. This is the in-process one by name, the same everywhere.
DEFAULT_RUNNER = "FnApiRunner"


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why and what to do instead."""


@dataclass(frozen=True)
class AnnotateOptions:
    """The options of `earmark annotate`; `--help` describes them."""

    inputs: tuple[str, ...]
    output: str
    checkpoint: str = BUNDLED
    device: str = "auto"
    devices: str | None = None  # `all`, or how many: a worker process for each
    processes_per_gpu: int | None = None  # None: of `pipeline.devices`
    decode_processes: int | None = None  # of each worker thread; None: of `pipeline.devices`
    dtype: str = "auto"
    threshold: float | None = None  # None: the checkpoint's own
    thresholds: str | None = None  # a file of them
    top_k: int | None = None
    pool: Pool = "max"
    chunk_hop_s: float | None = None  # None: the chunk's own length
    pad: Pad = "zero"
    score_type: ScoreType = "float32"
    chunks: bool = False
    segments: bool = False
    embeddings: bool = False
    limit: int | None = None
    files_per_shard: int = 256
    overwrite: bool = False
    refresh: bool = False
    max_failure_ratio: float = 0.5
    max_clip_mb: float = 4_096.0  # as `transforms.decode.Limits` has them; a test compares
    max_duration_s: float = 86_400.0
    clip_timeout_s: float = 600.0
    inputs_from: tuple[str, ...] = ()  # files that name more inputs
    lists_start_in: str | None = None  # what their relative lines begin at; None: where we are
    path_column: str | None = None  # of manifests, as the next four; None: found
    id_column: str | None = None
    start_column: str | None = None
    end_column: str | None = None
    audio_root: str | None = None
    billing_project: str | None = None
    kms_key: str | None = None
    gpu: str | None = None
    dry_run: bool = False
    job_file: str | None = None
    detach: bool = False
    profile: bool = False
    beam: tuple[str, ...] = ()


def refuse_missing(inputs: Iterable[str]) -> None:
    """Refuses a misspelt local path at once, not after the seconds that Beam and torch take to load.

    Patterns, URLs and what else is no plain path are left to `pipeline.plan`.
    """
    for name in inputs:
        if re.match(r"~|[a-z][a-z0-9+]*:", name) or re.search(r"[*?\[{]", name):
            continue
        try:
            os.lstat(name)
        except FileNotFoundError:
            raise UsageError(f"{name!r} does not exist") from None
        except (OSError, ValueError):  # which the listing has words for
            pass


def split_beam_options(
    arguments: Sequence[str], own_options: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tells inputs from Beam's options: `(inputs, beam_options)`.

    Args:
        arguments: what is left of the command line once earmark's own options are
            taken, in order, values of unknown options among them.
        own_options: earmark's option names, to suggest for a mistyped one.

    Raises:
        UsageError: an option is neither earmark's nor Beam's, or lacks its value.
    """
    if not any(argument.startswith("-") for argument in arguments):
        return tuple(arguments), ()  # spares the import of Beam
    parser = _beam_parser()
    known = parser._option_string_actions
    inputs: list[str] = []
    beam: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            inputs.append(argument)
            continue
        name, has_value, _ = argument.partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, [*own_options, *known], n=1, cutoff=0.6)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(f"No such option: {name}.{hint}")
        beam.append(argument)
        if known[name].nargs != 0 and not has_value:
            if not rest:
                raise UsageError(f"Option {name} needs a value.")
            beam.append(rest.pop(0))
    parser.parse_args(beam)
    return tuple(inputs), tuple(beam)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"Beam does not take this: {message}")


def _beam_parser() -> argparse.ArgumentParser:
    """A parser of all of Beam's pipeline options, those of its cloud runners included."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for group in PipelineOptions.__subclasses__():
        if "_add_argparse_args" in vars(group):
            group._add_argparse_args(parser)
    for action in parser._actions:
        action.required = False  # whether a runner needs it is for the runner to say
    return parser
