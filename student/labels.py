"""AudioSet's labels and their ontology, and the label list of any checkpoint."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Label:
    """One class of a checkpoint.

    `mid` is AudioSet's machine id (such as `/m/0bt9lr`); it is empty for a
    label that is not one of AudioSet's. `index` is the position in the scores.
    """

    index: int
    mid: str
    name: str


@dataclass(frozen=True)
class OntologyNode:
    """A node of the AudioSet ontology; 527 of its 632 nodes are labels."""

    mid: str
    name: str
    parent_mids: tuple[str, ...]
    index: int | None  # position in AudioSet's 527 labels, None for the other nodes


@functools.cache
def audioset_ontology() -> dict[str, OntologyNode]:
    """All 632 nodes by mid, the 527 labels first and in index order.

    The facts (ids, names, order, parents) are those of AudioSet's
    `class_labels_indices.csv` and of github.com/audioset/ontology at d417d32.
    """
    text = resources.files("student").joinpath("audioset.csv").read_text("utf-8")
    return {
        row["mid"]: OntologyNode(
            mid=row["mid"],
            name=row["name"],
            parent_mids=tuple(row["parent_mids"].split()),
            index=int(row["index"]) if row["index"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    }


@functools.cache
def audioset_labels() -> tuple[Label, ...]:
    """AudioSet's 527 labels in model output order."""
    nodes = audioset_ontology().values()
    return tuple(Label(node.index, node.mid, node.name) for node in nodes if node.index is not None)


def ancestors(mid: str) -> tuple[str, ...]:
    """The mids above `mid` in the AudioSet ontology, nearest first, each once.

    A node can have several parents, so this is a breadth-first walk. A mid that
    is not AudioSet's has none.
    """
    ontology = audioset_ontology()
    seen: dict[str, None] = {}
    level = [mid]
    while level:
        level = [
            parent
            for child in level
            if child in ontology
            for parent in ontology[child].parent_mids
            if parent not in seen
        ]
        seen.update(dict.fromkeys(level))
    return tuple(seen)


def checkpoint_labels(
    id2label: Mapping[int, str], mids: Sequence[str] | None = None
) -> tuple[Label, ...]:
    """The labels of a checkpoint, with AudioSet's mids where the names are AudioSet's.

    Args:
        id2label: index to name, as `config.json` has it. A label may be given
            by its display name ("Dog") or by its mid ("/m/0bt9lr").
        mids: one mid a label where the checkpoint states them itself.

    Raises:
        ValueError: the indices have gaps, names are missing or repeated, or the
            stated mids contradict AudioSet's names.
    """
    count = len(id2label)
    if sorted(id2label) != list(range(count)):
        raise ValueError(f"id2label must name the indices 0 to {count - 1} without gaps")
    ontology = audioset_ontology()
    # Some checkpoints write the mid as the name.
    stated_names = [id2label[index] for index in range(count)]
    names = [ontology[name].name if name in ontology else name for name in stated_names]
    if names == [f"LABEL_{index}" for index in range(count)]:
        raise ValueError(
            f"the checkpoint does not name its {count} labels (id2label is LABEL_0, LABEL_1, ...); "
            "write the names into id2label of its config.json"
        )
    if not all(str(name).strip() for name in names):
        empty = next(index for index, name in enumerate(names) if not str(name).strip())
        raise ValueError(f"id2label names label {empty} {names[empty]!r}; every label needs a name")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"id2label names {repeated[0]!r} more than once; names must be unique")
    if mids is not None and len(mids) != count:
        raise ValueError(f"the checkpoint states {len(mids)} mids for {count} labels")

    mid_of_name = {label.name: label.mid for label in audioset_labels()}
    labels = []
    for index, (name, stated_name) in enumerate(zip(names, stated_names, strict=True)):
        known = stated_name if stated_name in ontology else mid_of_name.get(name, "")
        stated = mids[index] if mids is not None else known
        if known and stated and stated != known:
            raise ValueError(
                f"label {index} {name!r} is stated as {stated}, but AudioSet's mid for it is {known}"
            )
        labels.append(Label(index, stated, name))
    return tuple(labels)


def is_audioset(labels: Sequence[Label]) -> bool:
    """Whether `labels` are AudioSet's 527 in AudioSet's order."""
    return tuple(labels) == audioset_labels()
