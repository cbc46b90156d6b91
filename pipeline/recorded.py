"""What an output says of how it was made: its `run.json` and `labels.parquet`, read again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from evaluation.scores import read_table
from pipeline import ledger
from pipeline.options import AnnotateOptions, UsageError
from student.labels import Label
from transforms.output import Output, open_output
from transforms.storage import CLOUD_STORAGE, Access
from transforms.write import RUN_FILE, RowOptions


def open_both(
    source: str, target: str, option: str, others: Iterable[str], access: Access
) -> tuple[Output, Output]:
    """An output that is read, and the place of one that is made of it.

    Args:
        source: what the user calls the first.
        target: what the user calls the second.
        option: that names the second.
        others: more paths that were given, which may be in Cloud Storage.
        access: how remote storage is used.

    Raises:
        UsageError: one is empty or of an unknown kind, or options are for Cloud Storage and
            nothing is there.
    """
    if (access.kms_key or access.billing_project) and not any(
        url.startswith(CLOUD_STORAGE) for url in (source, target, *others)
    ):
        raise UsageError("--kms-key and --billing-project are for gs://, and nothing here is there")
    places = []
    for name, place in (("OUTPUT", source), (option, target)):
        if not place:
            raise UsageError(f"{name} is empty; is a shell variable unset?")
        try:
            places.append(open_output(place, access))
        except (ImportError, ValueError) as error:
            raise UsageError(f"{name} {place!r} cannot be used: {error}") from error
    return places[0], places[1]


def whereabouts(output: Output) -> str:
    """Where an output is, in one spelling."""
    return str(Path(output.uri).resolve()) if "://" not in output.uri else output.uri


def recorded_run(source: Output, name: str) -> dict[str, Any]:
    """The source's `run.json`, with what is needed of it."""
    try:
        content = source.read(RUN_FILE)
    except NotADirectoryError as error:
        raise UsageError(
            f"OUTPUT {name!r} is a file; expected the folder that earmark annotate wrote: audio is "
            "annotated first"
        ) from error
    except OSError as error:
        raise UsageError(f"OUTPUT {name!r} cannot be read: {error.strerror or error}") from error
    if content is None:
        raise UsageError(
            f"OUTPUT {name!r} holds no {RUN_FILE}; give the folder that earmark annotate wrote"
        )
    try:
        made: dict[str, Any] = json.loads(content)
        scoring = made["scoring"]
        _ = made["id"], made["fingerprint"], made["options"], made["checkpoint"]["weights_sha256"]
        _ = scoring["labels"], scoring["thresholds"], scoring["top_k"], scoring["score_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{source.uri}/{RUN_FILE} is damaged or no earmark annotate's ({type(error).__name__}: {error}); "
            "give the folder that earmark annotate wrote"
        ) from error
    return made


def recorded_labels(source: Output, made: dict[str, Any]) -> tuple[Label, ...]:
    """The labels of the source's scores, which `run.json` must know."""
    place = f"{source.uri}/{ledger.LABELS_FILE}"
    content = source.read(ledger.LABELS_FILE)
    if content is None:
        raise UsageError(
            f"{place} is not there, so what the scores mean is not known; the same earmark annotate "
            "again writes it"
        )
    try:
        rows = read_table(io.BytesIO(content), ["index", "mid", "name"]).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"{place} is damaged ({error}): remove it, and the same earmark annotate again writes it"
        ) from error
    labels = tuple(Label(row["index"], row["mid"] or "", row["name"]) for row in rows)
    if ledger.labels_digest(labels) != made["scoring"]["labels"]:
        raise UsageError(
            f"{place} has other labels than the run.json beside it: they are of two outputs; take "
            "the folder as earmark annotate wrote it"
        )
    return labels


def recorded_rows(made: Mapping[str, Any], labels: tuple[Label, ...], place: str) -> RowOptions:
    """What of a scored clip goes into a row of the output.

    Raises:
        UsageError: `run.json` contradicts itself about the thresholds.
    """
    scoring, stated = made["scoring"], made.get("thresholds", {})
    thresholds = tuple(stated.get(label.name) for label in labels)
    if ledger.thresholds_digest(thresholds) != scoring["thresholds"]:
        raise UsageError(
            f"{place}/{RUN_FILE} names other thresholds than its rows were made with: it was changed; "
            "take the one that earmark annotate wrote"
        )
    return RowOptions(
        thresholds,
        scoring["top_k"],
        chunks=bool(scoring.get("chunks")),
        segments=bool(scoring.get("segments")),
        embeddings=bool(scoring.get("embeddings")),
        score_type=scoring["score_type"],
    )


def recorded_options(
    made: Mapping[str, Any], output: str, inputs: tuple[str, ...], inputs_from: tuple[str, ...]
) -> AnnotateOptions:
    """The options of `earmark annotate` that made an output, but for where and on what it runs.

    Args:
        made: its `run.json`.
        output: where it is.
        inputs: to be used in place of those that `run.json` names, as is the next.
        inputs_from: files that name inputs.
    """
    known = {field.name for field in fields(AnnotateOptions)}
    machine = {
        "device",
        "devices",
        "processes_per_gpu",
        "decode_processes",
        "gpu",
        "beam",
        "threshold",
        "thresholds",
    }
    stated = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in made["options"].items()
        if name in known - machine
    }
    options = AnnotateOptions(
        inputs=(), output=output, checkpoint=made["checkpoint"].get("name", "")
    )
    options = replace(options, **stated)
    if inputs or inputs_from:
        given = inputs, inputs_from
    else:
        given = tuple(
            tuple(place_of(made, place) for place in places)
            for places in (made.get("inputs", ()), options.inputs_from)
        )
        options = replace(options, lists_start_in=made.get("started_in"))
    return replace(
        options,
        inputs=given[0],
        inputs_from=given[1],
        audio_root=options.audio_root and place_of(made, options.audio_root),
        dtype=made["scoring"].get("dtype", "auto"),
    )


def place_of(made: Mapping[str, Any], place: str) -> str:
    """A place that a `run.json` names, wherever we are: a relative path from where the run began."""
    return ledger.from_folder(made.get("started_in"), place)
