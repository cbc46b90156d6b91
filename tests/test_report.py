"""`earmark report`: what is measured, the page, and the page in a browser."""

import io
import json
import math
import re
import shutil
import tarfile

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage, Faults
from evaluation.scores import open_source
from pipeline import page, report
from pipeline.cli import cli
from pipeline.figures import histogram
from pipeline.preview import PIECE_S, SAMPLE_RATE, Wanted, as_mp3, previews, spectrogram
from pipeline.terminal import visible
from student.labels import ancestors, audioset_labels
from transforms.find import find_clips
from transforms.records import as_text

SCRIPT = "<script>document.title='owned'</script>.wav"
MARKUP = "\"'><img src=x onerror=\"document.title='owned'\">&amp;.wav"
BIDI = "a\u202egnp\u2066.wav"


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def data_of(html):
    """What the page's script is given."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(block[1])


def section(html, name):
    return next(part for part in data_of(html)["sections"] if part["id"] == name)["blocks"]


def tone(seconds, hertz, rate=16_000):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("f4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    folder = tmp_path_factory.mktemp("shards")
    members = [(f"a/{n}.wav", encoded(noise(9_000 + 4_000 * n, seed=n))) for n in range(12)]
    members += [
        (SCRIPT, encoded(noise(30_000, seed=50))),
        (MARKUP, encoded(noise(31_000, seed=51))),
        (BIDI, encoded(noise(32_000, seed=52))),
        ("copy.wav", members[3][1]),
        ("silent.wav", encoded(np.zeros(16_000, np.float32))),
        ("broken.ogg", b"OggS, but no more than that"),
    ]
    make_tar(folder / "s-0.tar", members)
    make_tar(folder / "s-1.tar", [(f"b/{n}.wav", encoded(tone(2, 300 + n))) for n in range(4)])
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory, shards, tiny_checkpoint):
    """An output with chunks. Do not change it."""
    folder = tmp_path_factory.mktemp("output") / "out"
    done = earmark(
        "annotate", shards, "-o", folder, "--checkpoint", tiny_checkpoint, "--chunks",
        "--threshold", "0.9",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, output):
    """The page of `output`, by the command."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    done = earmark("report", output, "--to", file, "--clips", "6", "--labels", "4")
    assert done.exit_code == 0, done.output
    return file


def changed(output, folder, change):
    """A copy of an output with each file's table changed."""
    shutil.copytree(output, folder)
    for file in (folder / "clips").glob("*.parquet"):
        table = pq.read_table(file)
        kept = pq.read_metadata(file).metadata
        table = change(table)
        with pq.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({k: v for k, v in kept.items() if k != b"ARROW:schema"})
    return folder


# ------------------------------------------------------------------ what is measured


def test_everything_is_counted_as_a_slow_reading_counts_it(output):
    measured = report.measure(open_source(str(output)))
    rows = pq.read_table(output / "clips").to_pylist()
    scored = [row for row in rows if row["error"] is None]
    labels = audioset_labels()
    assert (measured.clips, measured.scored, measured.failed, measured.partly) == (22, 21, 1, 0)
    assert measured.audio_s == pytest.approx(sum(row["duration_s"] or 0 for row in rows))
    scores = np.array([row["scores"] for row in scored], np.float32)
    tags = [[tag["index"] for tag in row["tags"]] for row in scored]
    low = 1 / (1 + math.exp(report.NEAR_LOGIT - math.log(0.9 / 0.1)))
    for index in range(0, 527, 13):
        facts = measured.labels[index]
        assert facts.clips == sum(index in of for of in tags)
        assert facts.mean == pytest.approx(scores[:, index].mean(), abs=1e-6)
        assert facts.highest == scores[:, index].max()
        assert facts.counts.sum() == 21
        assert facts.just_below == ((scores[:, index] >= low) & (scores[:, index] < 0.9)).sum()
        expected = np.clip(np.searchsorted(report._EDGES[1:-1], scores[:, index], "right"), 0, 47)
        assert facts.counts.tolist() == np.bincount(expected, minlength=48).tolist()
    first = [of[: report.PAIRED_TAGS] for of in tags]
    assert any(len(of) > report.PAIRED_TAGS for of in tags), "the test wants many tags"
    ranked = np.argsort([-facts.clips for facts in measured.labels], kind="stable")[:20]
    for one in ranked:
        for other in ranked:
            together = sum(one in of and other in of for of in first) if one != other else 0
            assert measured.pairs[one, other] == together
    of_clips = [
        {mid for i in of for mid in (labels[i].mid, *ancestors(labels[i].mid))} for of in tags
    ]
    nodes = {mid for of in of_clips for mid in of}
    assert measured.nodes == {mid: sum(mid in of for of in of_clips) for mid in nodes}
    assert measured.tags == sum(map(len, tags))
    assert measured.untagged == sum(not of for of in tags)
    assert (measured.silent, measured.full_scale) == (1, 0)
    assert [(r.stage, r.type, r.clips, r.partly) for r in measured.reasons] == [
        ("decode", "InvalidDataError", 1, 0)
    ]
    (clip, message), = measured.reasons[0].examples  # fmt: skip
    assert clip.endswith("broken.ogg") and message
    assert (measured.equal.groups, measured.equal.clips) == (1, 2)
    ((count, names),) = measured.equal.examples
    assert count == 2 and {name.partition("/")[2] for name in names} == {"a/3.wav", "copy.wav"}
    assert measured.similar_by == "scores"
    assert any(
        {"a/3.wav", "copy.wav"} <= {n.partition("/")[2] for n in names}
        for _, names in measured.similar.examples
    )


def test_labels_show_their_best_their_borderline_and_some_at_random(output):
    measured = report.measure(open_source(str(output)), labels=3, each=2, seed=1)
    again = report.measure(open_source(str(output)), labels=3, each=2, seed=1)
    assert list(measured.shown) == list(again.shown) and len(measured.shown) == 3
    rows = [r for r in pq.read_table(output / "clips").to_pylist() if r["error"] is None]
    for index, clips in measured.shown.items():
        assert [c.row["clip_id"] for c in clips] == [c.row["clip_id"] for c in again.shown[index]]
        audio = [clip.row["audio_xxh128"] for clip in clips]
        assert len(audio) == len(set(audio)), "equal audio is shown once"
        best = [clip.score for clip in clips if clip.kind == "best"]
        by_audio = {row["audio_xxh128"]: row["scores"][index] for row in rows}
        assert best == sorted(by_audio.values(), reverse=True)[:2]
        for clip in clips:
            assert clip.score == by_audio[clip.row["audio_xxh128"]]
            assert clip.kind == "borderline" or clip.score >= np.float32(0.9)


def test_partly_broken_clips_are_counted_apart(output, tmp_path):
    error = {"stage": "decode", "type": "Truncated", "message": "it ends early"}

    def truncate(table):
        errors = table["error"].to_pylist()
        errors[0] = error
        at = table.schema.get_field_index("error")
        return table.set_column(at, "error", pa.array(errors, table.schema.field("error").type))

    folder = changed(output, tmp_path / "out", truncate)
    measured = report.measure(open_source(str(folder)))
    assert (measured.clips, measured.scored, measured.failed, measured.partly) == (22, 21, 1, 2)
    found = {reason.type: (reason.clips, reason.partly) for reason in measured.reasons}
    assert found == {"Truncated": (2, 2), "InvalidDataError": (1, 0)}


def test_parts_of_one_recording_are_no_copies(output, tmp_path):
    def part(table):
        rows = table.num_rows
        table = table.set_column(
            table.schema.get_field_index("audio_xxh128"), "audio_xxh128",
            pa.array(["0" * 32] * rows),
        )  # fmt: skip
        for name, first in (("start_s", 0.0), ("end_s", 2.0)):
            values = pa.array([2.0 * n + first for n in range(rows)])
            table = table.set_column(table.schema.get_field_index(name), name, values)
        return table

    folder = changed(output, tmp_path / "out", part)
    measured = report.measure(open_source(str(folder)))
    # The shards have 18 and 4 rows; the first parts of both are the same part of the same bytes.
    assert (measured.equal.groups, measured.equal.clips) == (4, 8)


def test_embeddings_are_compared_where_there_are_some(output, tmp_path):
    random = np.random.default_rng(0)

    def embed(table):
        vectors = random.standard_normal((table.num_rows, 32)).astype(np.float32)
        if table.num_rows > 4:
            vectors[5] = 2 * vectors[6] + 0.001  # one direction
        array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 32)
        durations = pa.array([3.0] * table.num_rows)
        at = table.schema.get_field_index("duration_s")
        return table.set_column(at, "duration_s", durations).append_column("embedding", array)

    folder = changed(output, tmp_path / "out", embed)
    measured = report.measure(open_source(str(folder)))
    assert measured.similar_by == "embedding"
    assert (measured.similar.groups, measured.similar.clips) == (1, 2)


def test_without_chunks_the_loudest_part_is_heard(output, tmp_path):
    folder = changed(output, tmp_path / "out", lambda table: table.drop_columns(["chunks"]))
    done = earmark("report", folder, "--labels", "1")
    assert done.exit_code == 0, done.output
    text = (folder / "report.html").read_text("utf-8")
    assert "--chunks" in section(text, "listen")[0]["text"]
    assert not report.measure(open_source(str(folder))).has_chunks


def test_close_points_are_found_and_far_ones_are_not():
    random = np.random.default_rng(3)
    points = random.standard_normal((20_000, 33)).astype(np.float32)
    near = 0.08
    close = random.standard_normal((200, 33)).astype(np.float32)
    close *= 0.3 * near / np.linalg.norm(close, axis=1, keepdims=True)
    points[1_000:1_200] = points[:200] + close
    group = report.similar_groups(points, near)
    found = int((group[:200] == group[1_000:1_200]).sum())
    assert found >= 190, f"{found} of 200 pairs"
    _, counts = np.unique(group, return_counts=True)
    assert counts.max() == 2 and (counts == 2).sum() == found, "nothing else is close"
    # Many that are equal are one group, whatever their number.
    assert len(np.unique(report.similar_groups(np.ones((5_000, 33), np.float32), near))) == 1


def test_a_damaged_file_is_told_and_the_others_are_reported(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    damaged = next((tmp_path / "out" / "clips").glob("s-1*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    done = earmark("report", tmp_path / "out", "--no-audio")
    assert done.exit_code == 0 and "Left out: clips/s-1" in done.output
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert any("s-1" in block.get("text", "") for block in section(text, "overview"))


# ------------------------------------------------------------------------- previews


def test_a_tar_is_read_as_tarfile_reads_it(tmp_path):
    """Every kind of header: long names, other types, bytes that are no UTF-8."""
    names = [
        "plain.wav", "d" * 90 + "/" + "e" * 90 + ".wav", "f" * 140 + ".wav", "g" * 300 + ".wav",
        "ä.wav", "b\udcff.wav", "empty.wav", "./dot.wav",
    ]  # fmt: skip
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        held = {}
        with tarfile.open(tmp_path / "x.tar", "w", format=format, errors="surrogateescape") as tar:
            for number, name in enumerate(names):
                folder, link = tarfile.TarInfo(f"dir{number}"), tarfile.TarInfo(f"link{number}.wav")
                folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "x"
                info = tarfile.TarInfo(name)
                content = b"" if name == "empty.wav" else bytes([number]) * (500 + 7 * number)
                info.size = len(content)
                try:
                    info.tobuf(format, "utf-8", "surrogateescape")
                except ValueError:
                    continue  # USTAR has no room for so long a name
                for member, file in ((folder, None), (info, io.BytesIO(content)), (link, None)):
                    tar.addfile(member, file)
                held[as_text(name)] = content
        found = {
            clip.member: clip.audio.read()
            for clip in find_clips(str(tmp_path / "x.tar"), {*held, "link1.wav", "dir1"})
        }
        assert found == held and len(held) >= 6


def test_a_preview_is_the_piece_that_was_asked_for(tmp_path, make_tar, encoded):
    sound = np.concatenate([0.05 * tone(15, 400), tone(10, 2_000), 0.05 * tone(10, 400)])
    content = encoded(sound, format="flac")
    shard = str(make_tar(tmp_path / "s.tar", [("x.flac", content), ("y.flac", b"no audio")]))
    loudest = Wanted(shard, "x.flac", None)
    best = Wanted(shard, "x.flac", None, None, None, 2.0, 7.0)
    part = Wanted(shard, "x.flac", None, 14.0, 18.0)
    changed = Wanted(shard, "x.flac", "0" * 32)
    broken, gone = Wanted(shard, "y.flac", None), Wanted(shard, "z.flac", None)
    elsewhere = Wanted(str(tmp_path / "gone.tar"), "x.flac", None)
    made = previews([loudest, best, part, changed, broken, gone, elsewhere])
    where = {clip: (p.start_s, p.end_s) for clip, p in made.found.items()}
    assert where == {loudest: (15.0, 15.0 + PIECE_S), best: (2.0, 7.0), part: (0.0, 4.0)}
    assert set(made.absent) == {changed, broken, gone, elsewhere}
    assert "other audio" in made.absent[changed] and "not decoded" in made.absent[broken]
    assert "no longer" in made.absent[gone] and "cannot be read" in made.absent[elsewhere]
    late = previews([loudest, elsewhere], limit_s=-1)
    assert not late.found and all("not fetched" in why for why in late.absent.values())


def test_sounds_and_pictures_are_those_of_the_samples():
    mp3 = as_mp3(tone(3, 1_000))
    assert len(mp3) < 3 * 32_000 / 8 * 1.2
    with av.open(io.BytesIO(mp3)) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
        assert container.streams.audio[0].rate == SAMPLE_RATE
    assert abs(len(heard) / SAMPLE_RATE - 3) < 0.1
    spectrum = np.abs(np.fft.rfft(heard[8_000:24_000]))
    assert abs(int(spectrum.argmax()) - 1_000) <= 1

    from PIL import Image

    low, high = (
        np.asarray(Image.open(io.BytesIO(spectrogram(tone(2, hertz)))))[:, 100].argmax()
        for hertz in (200, 6_000)
    )
    assert 50 < low < 64 and 0 < high < 12, "low sounds are at the bottom"
    assert Image.open(io.BytesIO(spectrogram(np.zeros(400, np.float32)))).size[1] == 64


# ----------------------------------------------------------------------------- the page


def test_the_page_asks_for_nothing_and_names_stay_data(written):
    html = written.read_text("utf-8")
    assert "default-src 'none'" in html and "connect-src" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html.partition("<script")[0])
    for hostile in (SCRIPT, MARKUP, BIDI):
        assert hostile not in html
    assert html.count("<script") == 2, "the data, and the page's own"
    texts = json.dumps(data_of(html), ensure_ascii=False)
    assert "\u202e" not in texts and "\\\\u202e" in texts
    assert any(SCRIPT in row[0] for row in section(html, "clips")[0]["rows"])


def test_a_label_or_place_cannot_end_the_data():
    media = page.Media(page.Previews(), 0)
    hostile = "</script><!--<script>\u2028@DATA@ $& \\"
    blocks = [{"type": "text", "text": hostile}]
    made = page.render(hostile, hostile, [page._section("One", blocks)], media, [])
    assert section(made, "one")[0]["text"] == hostile
    assert made.count("</script>") == 2 and made.count("<!--") == 0
    assert "&lt;/script&gt;&lt;!--" in made


def test_names_are_shown_as_what_they_are():
    assert visible("a\u202eb\x1b[2Jc\nd\ud800é") == "a\\u202eb\\x1b[2Jc\\nd\\ud800é"


def test_pictures_take_the_colours_of_the_page():
    svg = histogram(np.arange(5.0), np.array([1, 0, 7, 2]), "x", 'a "b" <c>')
    assert svg.startswith('<svg role="img" aria-label="a &quot;b&quot; &lt;c>"')
    assert "currentColor" in svg and "var(--accent)" in svg and "<style" not in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert svg == histogram(np.arange(5.0), np.array([1, 0, 7, 2]), "x", 'a "b" <c>')


def test_the_report_lies_in_the_output_and_overwrite_removes_it(
    output, shards, tiny_checkpoint, tmp_path
):
    folder = shutil.copytree(output, tmp_path / "out")
    done = earmark("report", folder, "--labels", "2")
    assert done.exit_code == 0, done.output
    assert "22 clips, 1 of them failed" in done.output and (folder / "report.html").exists()
    again = ("annotate", shards, "-o", folder, "--checkpoint", tiny_checkpoint, "--limit", "1")
    assert earmark(*again, "--overwrite").exit_code == 0
    assert not (folder / "report.html").exists()


def test_sound_has_its_limit_and_a_source_that_is_gone_is_told(output, shards, tmp_path):
    to = tmp_path / "r.html"
    done = earmark("report", output, "--to", to, "--max-audio-mb", "0.03")
    previewed = data_of(to.read_text("utf-8"))["previews"]
    sound = sum(len(preview.get("mp3", "")) for preview in previewed)
    assert 0 < sum("mp3" in preview for preview in previewed) < len(previewed)
    assert sound <= 30_100 and "no room" in done.output
    moved = shards.rename(shards.with_name("moved"))
    try:
        done = earmark("report", output, "--to", to)
    finally:
        moved.rename(shards)
    assert done.exit_code == 0 and "cannot be read: " in done.output
    assert "cannot be read" in to.read_text("utf-8")
    done = earmark("report", output, "--to", to, "--no-audio")
    assert done.exit_code == 0 and not data_of(to.read_text("utf-8"))["previews"]


def test_what_cannot_be_reported_is_said(output, tmp_path):
    (tmp_path / "empty").mkdir()
    parquet = next((output / "clips").glob("*.parquet"))
    for arguments, said in (
        ((tmp_path / "none",), "run.json"),
        ((tmp_path / "empty",), "run.json"),
        ((parquet,), "is a Parquet file"),
        ((output, "--to", tmp_path / "no" / "r.html"), "there is no folder"),
        ((output, "--to", tmp_path), "it is a folder"),
    ):
        done = earmark("report", *arguments)
        assert done.exit_code == 2 and said in done.output, done.output
        assert "Traceback" not in done.output
    nothing = shutil.copytree(output, tmp_path / "nothing")
    shutil.rmtree(nothing / "clips")
    done = earmark("report", nothing)
    assert done.exit_code == 2 and "nothing to report" in done.output


def test_matplotlib_is_asked_for_before_the_work(output, monkeypatch):
    find = page.report  # the modules stay as they are
    monkeypatch.setattr(
        "pipeline.look.importlib.util.find_spec",
        lambda name: None if name == "matplotlib" else find,
    )
    done = earmark("report", output)
    assert done.exit_code == 2 and "'.[report]'" in done.output


# ---------------------------------------------------------------------- in a browser


def problems(browser):
    """What the console, the log and the network said, beyond the file and its own data."""
    said = [m for m in browser.said if m["method"] in (
        "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
    )]  # fmt: skip
    urls = [
        message["params"]["request"]["url"]
        for message in browser.said
        if message["method"] == "Network.requestWillBeSent"
    ]
    return said + [url for url in urls[1:] if not url.startswith(("data:", "blob:"))]


def test_the_page_works_in_a_browser(chromium, written):
    chromium.open(written)
    assert chromium.run("document.title").startswith("What out holds")
    assert chromium.run("document.querySelectorAll('h2').length") == 12
    # Sound plays.
    chromium.run("document.querySelector('audio').play()")
    chromium.until("document.querySelector('audio').currentTime > 0.1")
    assert chromium.run("document.querySelector('audio').duration") > 0.5
    chromium.run("document.querySelectorAll('audio')[1].play()")
    chromium.until("document.querySelector('audio').paused")
    chromium.until("document.querySelector('.card img').naturalHeight === 64")

    # A search leaves what it finds, in a table and among the cards.
    def look_for(label, text):
        chromium.run(
            f"(() => {{ const field = [...document.querySelectorAll('label')].find((l) => "
            f"l.textContent === {label!r}).control; field.value = {text!r}; "
            "field.dispatchEvent(new Event('input')); })()"
        )

    look_for("Find a label", "violin")
    rows = (
        "[...document.querySelectorAll('#tags ~ div tbody tr')].map((r) => r.cells[0].textContent)"
    )
    assert chromium.run(rows) == ["Violin, fiddle"]
    look_for("Find a clip by name or tag", "title='owned'")
    cards = "[...document.querySelectorAll('.card:not([hidden]) .name')].map((n) => n.textContent)"
    names = set(chromium.run(cards))
    assert names and names <= {SCRIPT, MARKUP}, names
    assert chromium.run("document.querySelectorAll('.card script, .card img[onerror]').length") == 0
    look_for("Find a clip by name or tag", "")

    # A head sorts, and says how.
    chromium.run("document.querySelectorAll('#tags ~ div thead button')[4].click()")
    assert (
        chromium.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        == "descending"
    )
    chromium.run("document.querySelectorAll('#tags ~ div thead button')[4].click()")
    assert (
        chromium.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        == "ascending"
    )
    assert chromium.run("document.title").startswith("What out holds"), "a name was run"
    assert problems(chromium) == []


def test_the_page_can_be_used_by_keyboard_and_screen_reader(chromium, written):
    chromium.open(written)
    for key in (1, 2):
        chromium.call(
            "Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9
        )
        chromium.call(
            "Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9
        )
        if key == 1:
            assert chromium.run("document.activeElement.className") == "skip"
    assert chromium.run("document.activeElement.getAttribute('href')") == "#overview"
    chromium.call("Accessibility.enable")
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    unnamed = [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node["role"]["value"]
        in ("button", "link", "image", "img", "searchbox", "region", "table", "Audio")
        and not node.get("name", {}).get("value")
    ]
    assert unnamed == []
    assert chromium.run("document.documentElement.lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(chromium, written, dark):
    chromium.open(written, dark=dark)
    contrast = """(() => {
      const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
        .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('p, dt, dd, td, th, a, figcaption, h4, .meta')].map((e) => {
        const ink = light(getComputedStyle(e).color);
        return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05); })
        .reduce((a, b) => Math.min(a, b)); })()"""
    assert chromium.run(contrast) > 4.5
    assert problems(chromium) == []


def test_nothing_is_wider_than_a_phone(chromium, written):
    chromium.open(written, width=360, height=740)
    assert chromium.run("document.documentElement.scrollWidth") <= 360
    assert problems(chromium) == []


# ------------------------------------------------------------------------ in a bucket


def test_from_bucket_and_into_it(tmp_path, lead_to, tiny_checkpoint, make_tar, encoded, noise):
    """A tar, a Parquet file and loose files in Cloud Storage, some requests failing."""
    sounds = {f"{n}.wav": encoded(noise(20_000, seed=n)) for n in range(6)}
    names = sorted(sounds)
    make_tar(tmp_path / "t.tar", [(name, sounds[name]) for name in names[:2]])
    cells = [{"bytes": sounds[name], "path": name} for name in names[2:4]]
    pq.write_table(pa.table({"audio": cells}), tmp_path / "p.parquet")
    with CloudStorage("in", "out") as cloud:
        lead_to(cloud.env)
        for file in ("t.tar", "p.parquet"):
            cloud.put("in", f"data/{file}", (tmp_path / file).read_bytes())
        for name in names[4:]:
            cloud.put("in", f"data/loose/{name}", sounds[name])
        done = earmark(
            "annotate", "gs://in/data", "-o", "gs://out/tags", "--checkpoint", tiny_checkpoint
        )
        assert done.exit_code == 0, done.output
        cloud.faults = Faults(rate=0.1, kinds=("503", "reset", "short"), seed=1)
        done = earmark("report", "gs://out/tags", "--labels", "2")
        assert done.exit_code == 0, done.output
        assert cloud.faults.counts
        text = cloud.get("out", "tags/report.html").decode()
    groups = section(text, "listen")[1]["groups"]
    cards = [card for g in groups for kind in g["kinds"] for card in kind["clips"]]
    assert {card["name"].rpartition("/")[2] for card in cards} >= set(names[:2])
    assert all(card["why"] is None for card in cards), [card["why"] for card in cards]
