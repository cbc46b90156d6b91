"""Makes one HTML file of what was measured: opens from disk, and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import __version__, figures, report
from pipeline.preview import Preview, Previews, Wanted
from pipeline.quantities import counted
from pipeline.terminal import visible
from student.labels import audioset_ontology

if TYPE_CHECKING:
    from evaluation.scores import Source
    from pipeline.compare import Comparison
    from pipeline.report import LabelFacts, Report

Block = dict[str, Any]
Section = dict[str, Any]

_MATRIX = 16
_PAIRS = 40
_PAIR_CLIPS = 5  # a pair that fewer clips have says little
_SUSPECT_CLIPS = 10
_CHIPS = 5

_DURATIONS = (
    (0.01, "10 ms"), (0.1, "0.1 s"), (1, "1 s"), (10, "10 s"), (60, "1 min"), (600, "10 min"),
    (3_600, "1 h"), (36_000, "10 h"),
)  # fmt: skip
_KINDS = {
    "best": "Best: the highest scores",
    "borderline": "Borderline: nearest to the threshold, on either side",
    "random": "At random, of those that are tagged",
}


class Media:
    """The sounds and pictures of a page, each once, the sounds up to a size."""

    def __init__(self, previews: Previews, max_audio_bytes: int) -> None:
        self._previews = previews
        self._left = max_audio_bytes
        self._numbers: dict[Wanted, int] = {}
        self.data: list[dict[str, str]] = []
        self.audio_bytes = self.sounds = self.silenced = 0

    @property
    def absent(self) -> Counter[str]:
        """Why clips have neither sound nor picture."""
        return Counter(self._previews.absent.values())

    def take(self, wanted: Iterable[Wanted]) -> None:
        """Gives room to previews, the first first."""
        for clip in wanted:
            found = self._previews.found.get(clip)
            if clip in self._numbers or found is None:
                continue
            entry = {"png": base64.b64encode(found.png).decode()}
            if (size := 4 * len(found.mp3) // 3) <= self._left:
                entry["mp3"] = base64.b64encode(found.mp3).decode()
                self._left -= size
                self.audio_bytes += size
                self.sounds += 1
            else:
                self.silenced += 1
            self._numbers[clip] = len(self.data)
            self.data.append(entry)

    def card(self, row: Mapping[str, Any], wanted: Wanted, chips: list[Any]) -> dict[str, Any]:
        """A clip as the page's script draws it."""
        lines = [" · ".join(_facts_of(row))]
        found: Preview | None = self._previews.found.get(wanted)
        number = self._numbers.get(wanted)
        why = None
        piece = "the clip"
        if found is None:
            why = self._previews.absent.get(wanted, "no sound or picture was asked for")
        elif number is not None and "mp3" not in self.data[number]:
            why = "no room left for its sound: --max-audio-mb gives more"
        if found is not None:
            piece = f"{_clock(found.start_s)} to {_clock(found.end_s)}"
            of = row.get("duration_s") or 0.0
            if of > found.end_s - found.start_s + 0.5:
                chosen = "its best chunk" if wanted.best_s is not None else "its loudest part"
                lines.append(f"{piece}, {chosen}")
        lines.append(visible(str(row["clip_id"])))
        error = row.get("error")
        if error:
            lines.append(visible(f"{error['type']}: {error['message']}"))
        return {
            "name": visible(str(row.get("member") or row["clip_id"])),
            "preview": number,
            "piece": piece,
            "why": why and visible(why),
            "chips": chips,
            "lines": [line for line in lines if line],
        }


def render(
    title: str, subtitle: str, sections: Sequence[Section], media: Media, svgs: Sequence[str]
) -> str:
    """The page: everything from data stands in a JSON block, from which the script makes text."""
    here = resources.files("pipeline")
    script = here.joinpath("page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(
        {"sections": sections, "previews": media.data}, ensure_ascii=False, allow_nan=False
    )
    for mark, safe in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        data = data.replace(mark, safe)
    parts = {
        "SCRIPT_HASH": digest,
        "TITLE": html.escape(visible(title)),
        "SUBTITLE": html.escape(visible(subtitle)),
        "FOOTER": html.escape(f"Made by earmark {__version__}. The page holds all that it shows."),
        "FIGURES": "\n".join(
            f'<template id="figure-{number}">{svg}</template>' for number, svg in enumerate(svgs)
        ),
        "DATA": data,
        "SCRIPT": script,
    }
    page = here.joinpath("page.html").read_text("utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda mark: parts[mark[1]], page)


# -------------------------------------------------------------------- a report


def wanted_of(shown: report.Shown, index: int) -> Wanted:
    """What a preview needs to know of a clip that a label shows."""
    chunks = shown.row.get("chunks")
    if not chunks or len(chunks) < 2:
        return wanted_row(shown.row)
    best = max(chunks, key=lambda chunk: chunk["scores"][index])
    return wanted_row(shown.row, best["start_s"], best["end_s"])


def wanted_row(
    row: Mapping[str, Any], best_s: float | None = None, best_end_s: float | None = None
) -> Wanted:
    """What a preview needs to know of a row."""
    part = row.get("start_s"), row.get("end_s")
    member = row["member"] or ""
    return Wanted(row["shard"], member, row.get("audio_xxh128"), *part, best_s, best_end_s)


def wanted_in(measured: Report) -> list[Wanted]:
    """The clips of a report that are to be heard, the most telling first."""
    keyed: list[tuple[int, int, Wanted]] = []
    for index, clips in measured.shown.items():
        seen: Counter[str] = Counter()
        for shown in clips:
            # The first of each kind of every label before the second of any.
            keyed.append(
                (seen[shown.kind], list(_KINDS).index(shown.kind), wanted_of(shown, index))
            )
            seen[shown.kind] += 1
    keyed.sort(key=lambda item: item[:2])
    return list(dict.fromkeys(wanted for *_, wanted in keyed))


def report_page(measured: Report, source: Source, media: Media) -> str:
    """The page of `earmark report`."""
    media.take(wanted_in(measured))
    svgs: list[str] = []
    sections = [
        _section("Overview", _overview(measured, source)),
        _section("Tags", _tags(measured)),
        _section("Listen", _listen(measured, media)),
        _section("Together", _together(measured)),
        _section("Ontology", _ontology(measured)),
        _section("Thresholds", _suspects(measured)),
        _section("Audio", _audio(measured, svgs)),
        _section("Duplicates", _duplicates(measured)),
        _section("Failures", _failures(measured)),
        _section("Clips", _clip_table(measured)),
        _section("Speed", _speed(source)),
        _section("Making", _making(source)),
    ]
    name = PurePosixPath(source.uri.rstrip("/")).name or source.uri
    subtitle = f"{counted(measured.clips, 'clip')}, {_hours(measured.audio_s)} of audio, tagged by {source.name}"
    return render(f"What {name} holds", subtitle, sections, media, svgs)


def _section(title: str, blocks: list[Block]) -> Section:
    return {"id": title.lower().replace(" ", "-"), "title": title, "blocks": blocks}


def _text(text: str, *, warn: bool = False) -> Block:
    return {"type": "text", "text": text, "warn": warn}


def _table(
    caption: str, columns: Sequence[tuple[Any, ...]], rows: Sequence[Sequence[Any]], **more: Any
) -> Block:
    """A table; each column is (name, kind) or (name, "number", digits)."""
    named = [
        {"name": name, "kind": kind} | ({"digits": rest[0]} if rest else {})
        for name, kind, *rest in columns
    ]
    return {"type": "table", "caption": caption, "columns": named, "rows": rows, **more}


def _overview(measured: Report, source: Source) -> list[Block]:
    tagged = measured.scored - measured.untagged
    blocks: list[Block] = [
        {
            "type": "tiles",
            "rows": [
                ["Clips", f"{measured.clips:,}"],
                ["Audio", _hours(measured.audio_s)],
                ["With a tag", _of(tagged, measured.scored)],
                ["Tags a clip", f"{measured.tags / max(1, measured.scored):.2f}"],
                [
                    "Labels seen",
                    f"{sum(f.clips > 0 for f in measured.labels):,} of {len(measured.labels):,}",
                ],
                ["Failed", f"{measured.failed:,}"],
                ["Partly broken", f"{measured.partly:,}"],
                ["Equal copies", f"{measured.equal.clips - measured.equal.groups:,}"],
            ],
        }
    ]
    blocks += [_text(f"Left out: {visible(said)}.", warn=True) for said in measured.unreadable]
    if source.summary.get("clips", measured.clips) != measured.clips:
        blocks.append(
            _text(
                f"summary.json tells of {source.summary['clips']:,} clips: a run has not ended, or was "
                "stopped; the same earmark annotate again goes on and sums up.",
                warn=True,
            )
        )
    return blocks


def _tags(measured: Report) -> list[Block]:
    ranked = sorted(measured.labels, key=lambda facts: (-facts.clips, facts.label.index))
    rows = [
        [
            visible(facts.label.name),
            facts.clips,
            100 * facts.clips / max(1, measured.scored),
            facts.threshold,
            facts.mean,
            facts.highest,
            {
                "counts": facts.counts.tolist(),
                "at": _at(facts.threshold),
                "about": _spread(facts),
            },
        ]
        for facts in ranked
    ]
    columns = [
        ("Label", "text"), ("Clips", "bar"), ("% of clips", "number", 2), ("Threshold", "number", 3),
        ("Mean score", "number", 4), ("Highest", "number", 3), ("Scores from 0 to 1, even in the logit", "spark"),
    ]  # fmt: skip
    return [
        _text(
            "Each small picture is the spread of a label's scores over all clips, from 0.0003 at the left to "
            "0.9997 at the right, 0.5 in the middle, heights by the square root; the line is the threshold."
        ),
        _table("Labels by clips that have them as a tag", columns, rows, search="Find a label"),
        _text(
            "Tags a clip: "
            + ", ".join(
                f"{count} in {_of(int(clips), measured.scored)}"
                for count, clips in enumerate(measured.tags_per_clip[:8])
                if clips
            )
            + (
                f", 8 or more in {_of(int(measured.tags_per_clip[8:].sum()), measured.scored)}."
                if measured.tags_per_clip[8:].sum()
                else "."
            )
        ),
    ]


def _listen(measured: Report, media: Media) -> list[Block]:
    if not measured.shown:
        return [_text("No clip has a tag, so that no label has clips to listen to.")]
    said = (
        f"The {len(measured.shown)} most frequent labels. Equal audio is shown once. A sound is MP3 at 16 kHz "
        "and 32 kbit/s, as much as the student heard of the band and no more; a long clip is cut to "
        + (
            "its best chunk."
            if measured.has_chunks
            else "its loudest 10 s (--chunks of earmark annotate would tell the best)."
        )
        + " Pictures: 0 to 8 kHz in mel, 70 dB."
    )
    groups = []
    for index, clips in measured.shown.items():
        facts = measured.labels[index]
        kinds = []
        for kind, name in _KINDS.items():
            cards = [
                media.card(
                    shown.row, wanted_of(shown, index), _chips(shown.row, facts, shown.score)
                )
                for shown in clips
                if shown.kind == kind
            ]
            if cards:
                kinds.append({"kind": name, "clips": cards})
        limit = "never a tag" if facts.threshold is None else f"threshold {facts.threshold:g}"
        groups.append(
            {
                "name": visible(facts.label.name),
                "note": f"{facts.clips:,} clips, {limit}",
                "kinds": kinds,
            }
        )
    return [
        _text(said),
        {"type": "clips", "groups": groups, "search": "Find a clip by name or tag"},
    ]


def _chips(row: Mapping[str, Any], facts: LabelFacts, score: float) -> list[Any]:
    chips = [[visible(facts.label.name), f"{score:.3f}", True]]
    for tag in (row.get("tags") or ())[:_CHIPS]:
        if tag["index"] != facts.label.index:
            chips.append([visible(tag["name"]), f"{tag['score']:.2f}", False])
    return chips


def _together(measured: Report) -> list[Block]:
    ranked = sorted(measured.labels, key=lambda facts: (-facts.clips, facts.label.index))
    top = [facts for facts in ranked[:_MATRIX] if facts.clips]
    if len(top) < 2:
        return [_text("Fewer than two labels are tags: none are there together.")]
    shares = [
        [round(100 * int(measured.pairs[a.label.index, b.label.index]) / a.clips) for b in top]
        for a in top
    ]
    counts = np.array([facts.clips for facts in measured.labels])
    one, other = np.nonzero(np.triu(measured.pairs, 1) >= _PAIR_CLIPS)
    together = measured.pairs[one, other]
    lift = together * measured.scored / (counts[one] * counts[other]).clip(1)
    best = np.argsort(-together * np.log(np.maximum(lift, 1)), kind="stable")[:_PAIRS]
    names = [visible(facts.label.name) for facts in measured.labels]
    rows = [
        [names[one[i]], names[other[i]], int(together[i]), float(lift[i])] for i in best.tolist()
    ]
    blocks: list[Block] = [
        _text(
            f"Of the clips with the label of a row, how many per cent have the label of a column too. The "
            f"{report.PAIRED_TAGS} highest tags of a clip count."
        ),
        {
            "type": "matrix",
            "caption": f"The {len(top)} most frequent labels",
            "names": [visible(facts.label.name) for facts in top],
            "values": shares,
        },
    ]
    if rows:
        columns = [
            ("Label", "text"),
            ("and", "text"),
            ("Clips", "bar"),
            ("Times as often as by chance", "number", 1),
        ]
        blocks.append(
            _table("Pairs that go together", columns, rows, search="Find a pair", limit=12)
        )
    return blocks


def _ontology(measured: Report) -> list[Block]:
    ontology = audioset_ontology()
    own = {facts.label.mid: facts.clips for facts in measured.labels if facts.label.mid}
    children: dict[str, list[str]] = {}
    for mid, node in ontology.items():
        for parent in node.parent_mids:
            children.setdefault(parent, []).append(mid)

    def tree(mid: str) -> dict[str, Any]:
        below = [tree(child) for child in children.get(mid, ()) if measured.nodes.get(child)]
        below.sort(key=lambda node: (-node["clips"], node["name"]))
        return {
            "name": ontology[mid].name,
            "clips": measured.nodes[mid],
            "own": own.get(mid, 0),
            "below": below,
        }

    roots = [
        tree(mid)
        for mid, node in ontology.items()
        if not node.parent_mids and measured.nodes.get(mid)
    ]
    roots.sort(key=lambda node: (-node["clips"], node["name"]))
    outside = [
        {"name": visible(facts.label.name), "clips": facts.clips, "own": facts.clips, "below": []}
        for facts in measured.labels
        if facts.clips and facts.label.mid not in ontology
    ]
    blocks: list[Block] = []
    if roots:
        blocks += [
            _text(
                "Clips with a tag at or below each node of AudioSet's ontology, each clip once a node; open one "
                "to see what is below. A node with two parents stands under both."
            ),
            {"type": "tree", "nodes": roots, "about": "AudioSet's ontology with counts"},
        ]
    if outside:
        blocks += [
            {"type": "heading", "text": "Labels that are not AudioSet's"},
            {"type": "tree", "nodes": outside, "about": "Labels outside the ontology"},
        ]
    absent = [facts for facts in measured.labels if not facts.clips]
    blocks.append(
        _text(f"{len(absent):,} of {len(measured.labels):,} labels are the tag of no clip.")
    )
    return blocks


def _suspects(measured: Report) -> list[Block]:
    suspects = [
        facts
        for facts in measured.labels
        if facts.threshold is not None and facts.just_below >= max(_SUSPECT_CLIPS, facts.clips)
    ]
    suspects.sort(key=lambda facts: (-facts.just_below / max(1, facts.clips), facts.label.index))
    everywhere = [
        facts
        for facts in measured.labels
        if measured.scored >= 20 and facts.clips > 0.5 * measured.scored
    ]
    blocks = [
        _text(
            "A threshold looks wrong where more clips lie just below it than are tagged: within "
            f"{report.NEAR_LOGIT:g} in the logit (for a threshold of 0.2: from 0.13). Such a label is cut in "
            "the middle of its crowd, and a slightly other threshold gives many more or fewer tags. Listen to "
            "its borderline clips; earmark evaluate --thresholds fits thresholds to a truth, and earmark retag "
            "applies them without a model."
        )
    ]
    if suspects:
        rows = [
            [
                visible(facts.label.name), facts.threshold, facts.clips, facts.just_below,
                facts.just_below / max(1, facts.clips),
                {"counts": facts.counts.tolist(), "at": _at(facts.threshold), "about": _spread(facts)},
            ]
            for facts in suspects
        ]  # fmt: skip
        columns = [
            ("Label", "text"), ("Threshold", "number", 3), ("Tagged", "number"), ("Just below", "bar"),
            ("Below for each tagged", "number", 1), ("Scores", "spark"),
        ]  # fmt: skip
        blocks.append(
            _table(f"{len(suspects):,} labels", columns, rows, search="Find a label", limit=15)
        )
    else:
        blocks.append(_text("No label of this output is so."))
    if everywhere:
        named = ", ".join(visible(facts.label.name) for facts in everywhere[:12])
        blocks.append(_text(f"Tags of more than half of all clips, which may say little: {named}."))
    return blocks


def _audio(measured: Report, svgs: list[str]) -> list[Block]:
    known = max(1, sum(measured.channels.values()))
    blocks: list[Block] = [
        {
            "type": "facts",
            "rows": [
                ["Digital silence", _of(measured.silent, known)],
                [f"Quieter than {report.QUIET_DBFS:g} dBFS", _of(measured.quiet, known)],
                ["Peak at full scale, may be clipped", _of(measured.full_scale, known)],
                ["Longest clip", _clock(measured.longest_s)],
                ["Sample rates", _counts(measured.sample_rates, lambda rate: f"{rate:,} Hz")],
                ["Channels", _counts(measured.channels, str)],
                ["Codecs", _counts(measured.codecs, visible)],
            ],
        }
    ]
    drawn = []
    for (edges, counts), title, caption, more in (
        (measured.durations, "duration", "Durations", {"log": True, "ticks": _DURATIONS}),
        (measured.levels, "level (RMS), dBFS", "Loudness; digital silence is left out", {}),
        (measured.peaks, "peak, dBFS", "Peaks; digital silence is left out", {}),
    ):
        if not len(counts) or not counts.sum():
            continue
        about = f"{caption}: {_quartiles(edges, counts)}"
        drawn.append({"id": f"figure-{len(svgs)}", "caption": f"{about}."})
        svgs.append(figures.histogram(edges, counts, title, about, **more))
    return [*blocks, {"type": "figures", "figures": drawn}] if drawn else blocks


def _duplicates(measured: Report) -> list[Block]:
    equal, similar = measured.equal, measured.similar
    if measured.similar_by == "embedding":
        how = f"embeddings with a cosine of {1 - report.EMBEDDINGS_ALIKE:g} or more"
    else:
        how = (
            "scores whose logits differ by at most "
            f"{report.SCORES_ALIKE:g} (root mean square over all labels)"
        )
    blocks: list[Block] = [
        {"type": "heading", "text": "Equal bytes"},
        _text(
            f"{equal.clips:,} of {equal.looked_at:,} clips are in {equal.groups:,} groups of equal bytes "
            "(audio_xxh128, and the part of the recording where a clip is one)."
        ),
    ]
    blocks += _groups("The largest groups of equal bytes", equal)
    some = (
        f" the first {similar.looked_at:,} clips"
        if similar.looked_at < measured.scored
        else f" {similar.looked_at:,} clips"
    )
    blocks += [
        {"type": "heading", "text": "Nearly the same"},
        _text(
            f"Of{some}, {similar.clips:,} are in {similar.groups:,} groups that sound alike to the student: {how}, "
            f"and durations within about {100 * report.LENGTHS_ALIKE:g} %. Equal bytes are among them. Vectors are "
            f"projected at random onto {report.SIMILAR_DIMENSIONS} dimensions and met in grid cells, not each with "
            "each, so that some pairs are missed and distances are rough: listen before you delete."
        ),
    ]
    return blocks + _groups("The largest groups of clips that sound alike", similar)


def _groups(caption: str, alike: report.Alike) -> list[Block]:
    if not alike.examples:
        return []
    rows = [
        [count, "\n".join([*map(visible, names), *["…"] * (count > len(names))])]
        for count, names in alike.examples
    ]
    return [_table(caption, [("Clips", "number"), ("Of them", "wide")], rows)]


def _failures(measured: Report) -> list[Block]:
    if not measured.reasons:
        return [_text("Every clip has scores, and none an error.")]
    rows = [
        [
            visible(f"{reason.stage}/{reason.type}"),
            reason.clips,
            reason.partly,
            "\n".join(visible(f"{clip}: {message}") for clip, message in reason.examples),
        ]
        for reason in measured.reasons
    ]
    columns = [
        ("Reason", "text"),
        ("Clips", "bar"),
        ("With scores", "number"),
        ("Examples", "wide"),
    ]
    return [
        _text(
            f"{measured.failed:,} of {measured.clips:,} clips have no scores. {measured.partly:,} are partly "
            "broken: what could be decoded has scores and tags, beside an error. docs/schema.md says what each "
            "reason means."
        ),
        _table("Errors by stage and type", columns, rows, search="Find an error"),
    ]


def _clip_table(measured: Report) -> list[Block]:
    rows = [
        [
            visible(str(row["clip_id"])),
            row["duration_s"],
            ", ".join(
                f"{visible(tag['name'])} {tag['score']:.2f}" for tag in (row["tags"] or ())[:_CHIPS]
            ),
            _finite(row["rms_dbfs"]),
            _finite(row["peak_dbfs"]),
            visible(row["error"]["type"]) if row["error"] else "",
        ]
        for row in measured.table
    ]
    columns = [
        ("Clip", "wide"), ("Seconds", "number", 2), ("Tags", "wide"), ("RMS dBFS", "number", 1),
        ("Peak dBFS", "number", 1), ("Error", "text"),
    ]  # fmt: skip
    every = len(rows) == measured.clips
    caption = (
        f"All {len(rows):,} clips"
        if every
        else f"{len(rows):,} of {measured.clips:,} clips, drawn at random"
    )
    return [_table(caption, columns, rows, search="Find a clip by name or tag", limit=20)]


def _speed(source: Source) -> list[Block]:
    summary = source.summary
    if not summary.get("clips_this_run"):
        return [_text("No run that ended tells how fast it was.")]
    rows = [
        ["Clips of the last run", f"{summary['clips_this_run']:,}"],
        ["Time", _clock(summary["wall_s"])],
        ["Clips a second", f"{summary['clips_per_s']:,.1f}"],
    ]
    if source.audio_s_per_s:
        rows.append(["Seconds of audio a second", f"{source.audio_s_per_s:,.0f}"])
    blocks: list[Block] = [{"type": "facts", "rows": rows}]
    profile = summary.get("profile")
    if profile:
        blocks.append(_text(f"Bottleneck: {profile['bottleneck']}. {profile['advice']}."))
        stages = [
            [side, stage, took["s"], 100 * took["share"], took.get("ms_per_clip")]
            for side in profile
            if isinstance(profile[side], dict)
            for stage, took in profile[side].items()
        ]
        columns = [
            ("Side", "text"),
            ("Stage", "text"),
            ("Seconds", "bar", 2),
            ("%", "number", 1),
            ("ms a clip", "number", 2),
        ]
        blocks.append(_table("Where the time of the workers went", columns, stages))
    return blocks


def _making(source: Source) -> list[Block]:
    run = source.run
    scoring = run.get("scoring", {})
    versions = ", ".join(f"{name} {number}" for name, number in run.get("versions", {}).items())
    rows = [
        ["Output", source.uri],
        ["Inputs", ", ".join(run.get("inputs", []))],
        ["Checkpoint", run["checkpoint"]["name"]],
        ["Weights, SHA-256", run["checkpoint"].get("weights_sha256") or ""],
        ["Fingerprint", run.get("fingerprint", "")],
        ["Thresholds from", run["checkpoint"].get("thresholds", "")],
        ["Computed by", ", ".join(f"{k} {v}" for k, v in run.get("computed_by", {}).items())],
        ["Earmark", run.get("earmark", "")],
        ["Versions", versions],
    ]
    if "retagged" in run:
        rows.append(["Retagged from", json.dumps(run["retagged"].get("from", {}))])
    # As asked for, `auto` and all; what it came to is in `scoring`.
    others = [(k, v) for k, v in run.get("options", {}).items() if k not in scoring]
    settings = [[name, _json(value)] for name, value in [*scoring.items(), *others]]
    return [
        {"type": "facts", "rows": [[name, visible(str(value))] for name, value in rows]},
        _table(
            "Options, those that change scores first",
            [("Option", "text"), ("Value", "wide")],
            settings,
            search="Find an option",
            limit=40,
        ),
    ]


# ---------------------------------------------------------------- a comparison


def comparison_page(comparison: Comparison, media: Media) -> str:
    """The page of `earmark compare`."""
    from pipeline import compare

    media.take(wanted_row(change.row) for change in comparison.changes)
    svgs: list[str] = []
    labels = [
        [
            visible(one.name), one.tags_a, one.tags_b, one.tags_b - one.tags_a, one.gained, one.lost,
            one.agreement, one.mean_a, one.mean_b, one.mean_b - one.mean_a, one.mean_change,
        ]
        for one in comparison.by_change()
    ]  # fmt: skip
    columns = [
        ("Label", "text"), ("Tags in A", "number"), ("in B", "number"), ("B - A", "number"), ("Gained", "number"),
        ("Lost", "number"), ("Jaccard", "number", 3), ("Mean score in A", "number", 4), ("in B", "number", 4),
        ("B - A", "number", 4), ("Mean change", "number", 4),
    ]  # fmt: skip
    counts = [one for one in comparison.labels if one.tags_a or one.tags_b]
    blocks: list[Block] = [{"type": "tiles", "rows": compare.headline(comparison)}]
    blocks += [_text(visible(note), warn=True) for note in comparison.notes]
    if counts:
        clips = max(1, comparison.clips)
        about = "Share of clips with each label as a tag: A to the right, B upward"
        svgs.append(
            figures.scatter(
                np.array([one.tags_a / clips for one in counts]),
                np.array([one.tags_b / clips for one in counts]),
                "share of clips tagged in A",
                "share in B",
                about,
            )
        )
        blocks.append(
            {
                "type": "figures",
                "figures": [{"id": "figure-0", "caption": f"{about}; a point is a label."}],
            }
        )
    cards = [
        media.card(
            change.row,
            wanted_row(change.row),
            [[visible(change.label), f"{change.a:.3f} → {change.b:.3f}", True]]
            + [[f"+ {visible(name)}", "", False] for name in change.gained[:_CHIPS]]
            + [[f"− {visible(name)}", "", False] for name in change.lost[:_CHIPS]],
        )
        for change in comparison.changes
    ]
    making = [[name, visible(_json(a)), visible(_json(b))] for name, a, b in comparison.differences]
    sections = [
        _section("Agreement", blocks),
        _section("Labels", [
            _text("Clips that both outputs have scored. Gained: a tag in B and not in A. Mean change is of the absolute difference."),
            _table("Labels, most changed tags first", columns, labels, search="Find a label"),
        ]),
        _section("Listen", [
            _text("The clips that gained or lost most tags, then those whose score of any one label changed most; a long one is cut to its loudest 10 s."),
            {"type": "clips", "search": "Find a clip by name or tag", "groups": [
                {"name": "Largest changes", "note": counted(len(cards), "clip"), "kinds": [{"kind": "Score in A → in B; + a tag gained, − lost", "clips": cards}]}
            ]},
        ] if cards else [_text("No score and no tag changed.")]),
        _section("Making", [
            {"type": "facts", "rows": [["A", visible(comparison.a)], ["B", visible(comparison.b)]]},
            _table("What differs in how they were made", [("Of run.json", "text"), ("A", "wide"), ("B", "wide")], making),
        ]),
    ]  # fmt: skip
    title = f"{_last(comparison.a)} and {_last(comparison.b)}"
    subtitle = f"A is {comparison.a}, B is {comparison.b}; {comparison.clips:,} clips are in both"
    return render(title, subtitle, sections, media, svgs)


# ----------------------------------------------------------------------- words


def _last(uri: str) -> str:
    return PurePosixPath(uri.rstrip("/")).name or uri


def _at(threshold: float | None) -> float | None:
    """Where a threshold stands in a picture of scores, from 0 to 1."""
    if threshold is None:
        return None
    inside = min(max(threshold, 1e-6), 1 - 1e-6)
    return min(1.0, max(0.0, (math.log(inside / (1 - inside)) + 8) / 16))


def _spread(facts: LabelFacts) -> str:
    return (
        f"Scores of {visible(facts.label.name)}: mean {facts.mean:.3f}, highest {facts.highest:.3f}, "
        f"{facts.just_below:,} clips just below the threshold"
    )


def _facts_of(row: Mapping[str, Any]) -> list[str]:
    facts = []
    if row.get("duration_s") is not None:
        facts.append(f"{row['duration_s']:.1f} s")
    if row.get("sample_rate"):
        facts.append(f"{row['sample_rate'] / 1000:g} kHz")
    if row.get("channels"):
        facts.append({1: "mono", 2: "stereo"}.get(row["channels"], f"{row['channels']} channels"))
    if row.get("codec"):
        facts.append(visible(row["codec"]))
    if (level := _finite(row.get("rms_dbfs"))) is not None:
        facts.append(f"{level:.0f} dBFS")
    return facts


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _of(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0
    return f"{part:,} ({share:.1f}\u00a0%)" if part else "0"


def _counts(counter: Counter[Any], shown: Callable[[Any], str]) -> str:
    most = counter.most_common(8)
    more = len(counter) - len(most)
    said = ", ".join(f"{shown(value)}: {count:,}" for value, count in most)
    return said + (f", and {more} more" if more else "")


def _quartiles(edges: Any, counts: Any) -> str:
    """The quarters of a histogram, as exact as its bins."""
    shares = np.cumsum(counts) / counts.sum()
    low, middle, high = (
        edges[1 + int(np.searchsorted(shares, share))] for share in (0.25, 0.5, 0.75)
    )
    return f"half lie between {low:.3g} and {high:.3g}, the median is {middle:.3g}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else _clock(seconds)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _json(value: Any) -> str:
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
