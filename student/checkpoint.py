"""Finds a checkpoint and reads the facts that travel with it.

A checkpoint is a directory in Hugging Face's format: `config.json`,
`preprocessor_config.json`, the weights, and optionally `thresholds.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from student import BUNDLED
from student.labels import Label, checkpoint_labels

if TYPE_CHECKING:  # loads torch, which who only wants thresholds does not need
    from student.feature_spec import FeatureSpec

BUNDLED_DIRECTORY = Path(__file__).parent / "bundled"
MODEL_TYPE = "audio-spectrogram-transformer"
DEFAULT_THRESHOLD = 0.2  # where a checkpoint states none; bookbot's own choice for Distil-AST
THRESHOLDS_FORMAT = "earmark.thresholds/1"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CONFIG_FILES = ("config.json", "preprocessor_config.json")
# With these, and `trust_remote_code`, transformers would import files of the checkpoint, or
# take weights from a file of another name.
_CODE_ENTRIES = {"auto_map", "custom_pipelines", "transformers_weights"}
_HUB_FILES = ["*.json", "*.safetensors", "README.md"]

# What a copy of a checkpoint has to hold.
CHECKPOINT_SUFFIXES = (".json", ".safetensors")


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or used; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights."""

    name: str  # as it was asked for
    directory: Path
    labels: tuple[Label, ...]
    features: FeatureSpec
    thresholds: tuple[float | None, ...]  # one a label; None: never a tag
    has_own_thresholds: bool
    weights_sha256: str
    config_sha256: str  # of config.json and preprocessor_config.json: the same weights in
    # another architecture, or with other features, give other scores
    warnings: tuple[str, ...] = ()  # what is to be said about `thresholds`

    @property
    def hidden_size(self) -> int:
        """Width of its layers: 768 for AST, and where `config.json` does not say."""
        return int(read_json(self.directory / "config.json").get("hidden_size", 768))

    @property
    def is_bundled(self) -> bool:
        """Whether this is the demonstration student that comes with the package."""
        return self.directory == BUNDLED_DIRECTORY


def read_checkpoint(checkpoint: str) -> Checkpoint:
    """Finds `checkpoint` and reads its facts; loads no weights.

    Args:
        checkpoint: `bundled`, a local directory, or a Hugging Face id, optionally
            with a revision: `owner/name@revision`.

    Raises:
        CheckpointError: it is not there, or not an AST classifier's.
    """
    from student.feature_spec import FeatureSpec

    directory = find_checkpoint(checkpoint)
    config = read_json(directory / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{directory / 'config.json'} is of model_type {config.get('model_type')!r}; "
            f"earmark runs {MODEL_TYPE!r} (ASTForAudioClassification)"
        )
    preprocessor = read_json(directory / "preprocessor_config.json")
    _refuse_code(directory, config, preprocessor)
    try:
        features = FeatureSpec.from_preprocessor_config(preprocessor)
        stated = config.get("id2label")
        if not isinstance(stated, dict):
            raise ValueError(f"id2label of config.json is {stated!r}, expected index to name")
        id2label = {int(index): str(name) for index, name in stated.items()}
        labels = checkpoint_labels(id2label, config.get("label_mids"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint!r}: {error}") from error
    for name, ours in (("num_mel_bins", 128), ("max_length", 1024)):
        model_value, feature_value = config.get(name, ours), getattr(features, name)
        if model_value != feature_value:
            raise CheckpointError(
                f"checkpoint {checkpoint!r}: {name} is {model_value} in config.json but "
                f"{feature_value} in preprocessor_config.json; they must agree"
            )
    thresholds_file = directory / "thresholds.json"
    thresholds: tuple[float | None, ...] = (DEFAULT_THRESHOLD,) * len(labels)
    warnings: tuple[str, ...] = ()
    has_own_thresholds = thresholds_file.exists()
    weights_sha256 = _sha256_once(_weight_files(directory))
    if has_own_thresholds:
        stated_thresholds = read_json(thresholds_file)
        thresholds = parse_thresholds(stated_thresholds, labels, thresholds_file)
        warnings = thresholds_warnings(
            stated_thresholds, thresholds, weights_sha256, thresholds_file
        )
    return Checkpoint(
        name=checkpoint,
        directory=directory,
        labels=labels,
        features=features,
        thresholds=thresholds,
        has_own_thresholds=has_own_thresholds,
        weights_sha256=weights_sha256,
        config_sha256=_sha256([directory / name for name in _CONFIG_FILES]),
        warnings=warnings,
    )


def find_checkpoint(checkpoint: str) -> Path:
    """The local directory of a checkpoint, fetched from the Hugging Face Hub if need be.

    Raises:
        CheckpointError: no such directory, no such id, or no network.
    """
    if checkpoint == BUNDLED:
        return BUNDLED_DIRECTORY
    if checkpoint and Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()
    if not _HUB_ID.fullmatch(checkpoint) or checkpoint.startswith("."):
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is neither {BUNDLED!r}, nor an existing directory, nor a "
            "Hugging Face id such as 'bookbot/distil-ast-audioset'"
        )

    import huggingface_hub
    from huggingface_hub import errors

    repo_id, _, revision = checkpoint.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision or None, allow_patterns=_HUB_FILES
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no Hugging Face id: {error}"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is gated: accept its terms on the Hugging Face Hub, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"checkpoint {repo_id!r} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hugging Face Hub has no checkpoint {checkpoint!r}, or it is private: check the "
            "spelling, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the hub's HTTP library, and so its errors, change with versions
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is not in the local cache and the Hugging Face Hub cannot be "
            f"reached: connect to the network once, or give a local directory (`hf download {repo_id} "
            f"--local-dir DIR` elsewhere, then --checkpoint DIR), or use --checkpoint {BUNDLED}"
        ) from error


def _refuse_code(
    directory: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    """Refuses a checkpoint that brings code of its own, which earmark would not run.

    Its scores, without that code, would not be what its makers mean.
    """
    for name, entries in zip(_CONFIG_FILES, (config, preprocessor), strict=True):
        for entry in _CODE_ENTRIES & entries.keys():
            raise CheckpointError(
                f"{directory / name} has an entry {entry!r}: the checkpoint brings code of its own, and "
                "earmark runs none; where the plain model will do, remove the entry"
            )
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json): merge it into the weights first "
            "(peft's merge_and_unload, then save_pretrained)"
        )


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} holds no model.safetensors; convert older weights with transformers' "
            "save_pretrained (earmark does not open pickled weights)"
        )
    for file in files:
        try:
            with safe_open(file, "numpy"):  # reads the header: a damaged file is told at once
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or cut short: {error}") from error
    return files


def parse_thresholds(
    stated: Mapping[str, Any], labels: Sequence[Label], file: str | Path
) -> tuple[float | None, ...]:
    """Per-label thresholds of a parsed JSON object; docs/thresholds.md describes both forms.

    Args:
        stated: label mid or name to a number in [0, 1], or to null for a label that never
            is a tag; or the full form, `{"format": "earmark.thresholds/1", "labels": ...}`.
        labels: of the checkpoint. One that `stated` leaves out has the file's `default`,
            which is `DEFAULT_THRESHOLD` where there is none.
        file: how errors call it.

    Returns:
        One a label, in the order of `labels`; None: never a tag.

    Raises:
        CheckpointError: it names an unknown label, states no such number, or states two
            for one label.
    """
    default: Any = DEFAULT_THRESHOLD
    by_label: Any = stated
    if isinstance(stated.get("format"), str):
        if stated["format"] != THRESHOLDS_FORMAT:
            raise CheckpointError(
                f"{file} is of format {stated['format']!r}, expected {THRESHOLDS_FORMAT!r}: another "
                "version of earmark wrote it; fit the thresholds again with this one"
            )
        default = stated.get("default", DEFAULT_THRESHOLD)
        entries = stated.get("labels")
        if not isinstance(entries, dict):
            raise CheckpointError(
                f"{file}: 'labels' is {entries!r}, expected an object of label mid to what was fitted"
            )
        for key, entry in entries.items():
            if not isinstance(entry, dict) or "threshold" not in entry:
                raise CheckpointError(
                    f"{file}: label {key!r} is {entry!r}, expected an object with a 'threshold' "
                    "(0 to 1, or null for never)"
                )
        by_label = {key: entry["threshold"] for key, entry in entries.items()}
        _check_threshold(default, "default", file)
    known = {label.name for label in labels} | {label.mid for label in labels if label.mid}
    for key, value in by_label.items():
        if key not in known:
            raise CheckpointError(
                f"{file} states a threshold for {key!r}, which is no label of the checkpoint: correct "
                "the name, or remove it"
            )
        _check_threshold(value, key, file)
    for label in labels:
        if {label.mid, label.name} <= by_label.keys():
            of_mid, of_name = by_label[label.mid], by_label[label.name]
            if of_mid != of_name:
                raise CheckpointError(
                    f"{file} states two thresholds for one label: {json.dumps(of_mid)} for "
                    f"{label.mid!r} and {json.dumps(of_name)} for {label.name!r}; remove one"
                )
    found = (by_label.get(label.mid, by_label.get(label.name, default)) for label in labels)
    return tuple(None if value is None else float(value) for value in found)


def thresholds_warnings(
    stated: Mapping[str, Any],
    thresholds: Sequence[float | None],
    weights_sha256: str,
    file: str | Path,
) -> tuple[str, ...]:
    """What is to be said about a file of thresholds that can be used, a sentence each.

    Args:
        stated: as in `parse_thresholds`.
        thresholds: what that made of it.
        weights_sha256: of the weights whose scores the thresholds are for.
        file: how the sentences call it.
    """
    fitted_on = stated.get("fitted_on") if isinstance(stated.get("format"), str) else None
    fitted = fitted_on.get("weights_sha256") if isinstance(fitted_on, dict) else None
    warnings = []
    if isinstance(fitted, str) and fitted != weights_sha256:
        warnings.append(
            f"{file} was fitted on scores of other weights (SHA-256 {fitted[:12]}..., these are "
            f"{weights_sha256[:12]}...): its thresholds may not suit; fit them again for this "
            "checkpoint"
        )
    never = sum(threshold is None for threshold in thresholds)
    if never:
        warnings.append(
            f"{never:,} of {len(thresholds):,} labels have no threshold and never become tags"
        )
    return tuple(warnings)


def _check_threshold(value: Any, key: str, file: str | Path) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value <= 1):
        raise CheckpointError(
            f"{file}: the threshold of {key!r} is {value!r}, expected 0 to 1, or null for never"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files.

    Raises:
        CheckpointError: it is not there, or holds something else.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; a checkpoint is a directory written by transformers' "
            "save_pretrained, of the model and of its feature extractor"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def _sha256_once(files: Sequence[Path]) -> str:
    """`_sha256`, which takes a second for a large student, once for files that stay as they are."""
    stats = [(file, file.stat()) for file in files]
    return _sha256_of(tuple((f, s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats))


@functools.lru_cache(maxsize=8)
def _sha256_of(versions: tuple[tuple[Path, int, int, int], ...]) -> str:
    return _sha256([file for file, *_ in versions])


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
