"""The card of a dataset: what `load_dataset` needs to know, and how it was made."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.terminal import printable

if TYPE_CHECKING:  # it imports this module
    from pipeline.dataset import DatasetOptions, Written
    from pipeline.views import Views

_LABELS = 20  # the most frequent that are shown


def card(done: Written, features: Any, views: Views, suffix: str) -> str:
    """`README.md`: YAML with features and files, then Markdown.

    Args:
        done: what was written.
        features: of `datasets`.
        views: of the output.
        suffix: of the files.
    """
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    options, run = done.options, views.run
    name = re.split(r"[\\/]", options.to.rstrip("/"))[-1] or "dataset"
    head = DatasetCardData(
        pretty_name=printable(name),
        task_categories=["audio-classification"],
        annotations_creators=["machine-generated"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*{suffix}"} for split in done.splits
                ],
            }
        ],
    )
    DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(head)

    clips = sum(totals.clips for totals in done.splits.values())
    partial = sum((totals.partial for totals in done.splits.values()), Counter[str]())
    thresholds = set(run.get("thresholds", {}).values())
    threshold = (
        f"{next(iter(thresholds)):g} for every label" if len(thresholds) == 1 and None not in thresholds
        else f"one for each label ({run['checkpoint'].get('thresholds', 'own')})"
    )  # fmt: skip
    lines = [
        f"# {_plain(name)}",
        "",
        f"{clips:,} clips of {_code(str(views.output.uri))}, tagged by a machine and looked at by nobody. "
        "The audio is that of its sources, and so is its licence.",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        f"| clips | {_asked(options)} |",
        f"| splits | {_splits(options)} |",
        f"| checkpoint | {_code(str(run['checkpoint'].get('name', '')))}, weights SHA-256 "
        f"`{run['checkpoint'].get('weights_sha256', '')}` |",
        f"| thresholds | {threshold} |",
        f"| pooling, precision | {_code(str(run['scoring'].get('pool')))}, {_code(str(run['scoring'].get('dtype')))} |",
        f"| fingerprint | `{run.get('fingerprint', '')}` |",
        f"| run | `{run.get('id', '')}` |",
        f"| earmark | {__version__} |",
        "",
        "## What is in it",
        "",
        "| split | clips | hours | files | MiB |",
        "|---|---|---|---|---|",
        *(
            f"| {split} | {t.clips:,} | {t.audio_s / 3600:.2f} | {len(t.files):,} | {t.size_bytes / 2**20:,.1f} |"
            for split, t in done.splits.items()
        ),
        "",
        f"{len(done.left_out):,} clips that were asked for are left out because their audio was not found"
        + ("; `left_out.csv` names them." if done.left_out else "."),
    ]
    failed = _failures(views)
    if failed:
        kinds = ", ".join(f"{_plain(kind)} {count:,}" for kind, count in failed)
        lines += [
            "",
            f"{sum(count for _, count in failed):,} clips of the output failed when they were tagged, and are "
            f"never here ({kinds}).",
        ]
    if partial:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in partial.most_common())
        lines += [
            "",
            f"{partial.total():,} clips are tagged by a part of their audio ({kinds}); `error` says which.",
        ]
    lines += [
        "",
        "| tag | clips |",
        "|---|---|",
        *(f"| {_plain(tag)} | {count:,} |" for tag, count in done.tags.most_common(_LABELS)),
    ]
    if len(done.tags) > _LABELS:
        lines.append(f"| and {len(done.tags) - _LABELS:,} more | |")
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _failures(views: Views) -> list[tuple[str, int]]:
    """(type of error, clips) of the output's clips without scores, most frequent first."""
    with views.errors_explained():
        return views.connection.execute(
            "SELECT error.type, count(*) FROM all_rows WHERE tags IS NULL GROUP BY ALL ORDER BY 2 DESC, 1"
        ).fetchall()


def _asked(options: DatasetOptions) -> str:
    said = []
    if options.where:
        said.append(f"--where {json.dumps(options.where, ensure_ascii=False)}")
    said += [f"--tag {json.dumps(tag, ensure_ascii=False)}" for tag in options.tags]
    said += [f"--under {json.dumps(label, ensure_ascii=False)}" for label in options.under]
    said += ["--any"] * options.any_of
    said += [f"--limit {options.limit}"] * (options.limit is not None)
    return _code(" ".join(said)) if said else "all that have scores"


def _splits(options: DatasetOptions) -> str:
    if options.split is None:
        return "one"
    return f"`{options.split}`, seed {options.seed}; clips with equal bytes, or of one recording, are in one"


def _code(text: str) -> str:
    """Text of anybody as code in a cell of a table: it ends neither the code nor the cell."""
    text = printable(text).replace("\n", " ").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * text.startswith("`") or " " * text.endswith("`")
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def _plain(text: str) -> str:
    """Text of anybody in a line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", printable(text).replace("\n", " "))
