"""An output of `earmark annotate` as tables of DuckDB, read where it lies and never written."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from fsspec import AbstractFileSystem

from pipeline.options import UsageError
from student.labels import audioset_ontology
from transforms.output import LocalOutput, Output, open_output
from transforms.storage import DEFAULT_ACCESS, Access
from transforms.write import CLIPS_FOLDER, RUN_FILE, finished_shards

_LABELS_FILE = "labels.parquet"
_SCHEME = "earmark"
_SUGGESTIONS = 3

_ALIAS = r"(?:\w+|\"[^\"]*\")\."

# Views that need a column which not every output has: what to say where it is missing.
_OF_OPTIONS = {"chunks": "--chunks", "segments": "--segments"}


@dataclass(frozen=True)
class LabelRow:
    """A row of `labels.parquet`."""

    index: int
    mid: str | None
    name: str
    threshold: float | None  # the score from which it is a tag; None: it never is one
    ancestors: tuple[str, ...]  # names above it


class Labels:
    """What labels an output has, by name or mid."""

    def __init__(self, rows: Sequence[LabelRow]) -> None:
        self.rows = tuple(rows)
        self._index = {row.mid: row.index for row in rows if row.mid}
        self._index |= {row.name: row.index for row in rows}
        self._below: dict[str, list[int]] = {}
        for row in rows:
            for name in (row.name, *row.ancestors):
                self._below.setdefault(name, []).append(row.index)
        for mid, node in audioset_ontology().items():
            if node.name in self._below:
                self._below[mid] = self._below[node.name]

    def __contains__(self, label: str) -> bool:
        return label in self._index

    def find(self, label: str) -> LabelRow:
        """The label of a name or mid.

        Raises:
            UsageError: there is none; the message names the nearest.
        """
        if label in self._index:
            return self.rows[self._index[label]]
        if label in self._below:
            raise UsageError(
                f"{label!r} is a group of labels in the ontology and has no score of its own; "
                "ask with has() or --under for the labels below it"
            )
        raise UsageError(f"there is no label {label!r}{self._hint(label, self._index)}")

    def below(self, label: str) -> list[int]:
        """The indices of a label, or of a group of the ontology, and of all labels below it.

        Raises:
            UsageError: there is none; the message names the nearest.
        """
        if label in self._below:
            return self._below[label]
        if label in self._index:  # a mid that is not AudioSet's
            return [self._index[label]]
        raise UsageError(f"there is no label {label!r}{self._hint(label, self._below)}")

    def _hint(self, label: str, known: Any) -> str:
        folded = {name.casefold(): name for name in known}
        wanted = label.casefold().strip()
        close = difflib.get_close_matches(wanted, folded, n=_SUGGESTIONS, cutoff=0.6)
        # `Speech` for `male speech`: words in common count where the spelling is far.
        close += [name for name in folded if wanted and wanted in name and name not in close]
        names = [repr(folded[name]) for name in close[:_SUGGESTIONS]]
        if not names:
            return "; SELECT name FROM labels lists them"
        return f"; did you mean {' or '.join(names)}?"


@dataclass
class Views:
    """A connection with the views `clips`, `failures`, `tags`, `chunks`, `segments`, `labels`."""

    connection: duckdb.DuckDBPyConnection
    output: Output
    run: dict[str, Any]
    labels: Labels
    columns: tuple[str, ...]  # of the files
    _files: OutputFiles
    _headers: dict[str, str] = field(default_factory=dict)  # pattern of DuckDB's name -> as asked
    _macros: dict[tuple[int, ...], str] = field(default_factory=dict)  # of `has_macro`

    def execute(self, sql: str, parameters: Any = None) -> duckdb.DuckDBPyConnection:
        """Runs one query that only reads.

        Raises:
            UsageError: it is none, is wrong, or asks for what the output has not.
            OSError: a file cannot be read.
            KeyboardInterrupt: it was interrupted.
        """
        with self.errors_explained():
            return self.connection.execute(self.checked(sql), parameters)

    def checked(self, sql: str) -> str:
        """`sql` with `score()` and `has()` put into DuckDB's terms, if it only reads.

        Raises:
            UsageError: it does more, or names an unknown label.
        """
        with self.errors_explained():
            sql = with_functions(sql, self._scores_of, self._has_of)
            statements = self.connection.extract_statements(sql)
        if len(statements) != 1:
            raise UsageError(f"one query at a time is run, this holds {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = str(statements[0].type).rpartition(".")[2]
            raise UsageError(
                f"an output is only read: a SELECT is run, this is {kind}; --to FILE writes the "
                "result of one"
            )
        return sql

    def interruptible(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, which Ctrl-C stops in the middle of a query too.

        DuckDB runs a query in C++, where Python sees no signal before it is done.
        """
        with ThreadPoolExecutor(1, "earmark-query") as pool:
            future = pool.submit(action)
            try:
                return future.result()
            except KeyboardInterrupt:
                while not future.done():  # it may be between two queries at this moment
                    self.connection.interrupt()
                    wait([future], timeout=0.05)
                raise

    def header(self, name: str) -> str:
        """The name of a column of a result, with `score('Dog')` as it was asked for."""
        for found, asked in self._headers.items():
            name = re.sub(found, lambda _, asked=asked: asked, name)
        return name

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turns DuckDB's errors into those of `execute`."""
        try:
            yield
        except duckdb.InterruptException as error:
            raise KeyboardInterrupt from error
        except duckdb.Error as error:
            if self._files.fault is not None:
                raise self._files.fault from error
            text = str(error).strip()
            absent = re.search(r"Table with name (\w+) does not exist", text)
            name = absent and absent.group(1).lower()
            if name in _OF_OPTIONS:
                raise UsageError(
                    f"{self.output.uri} has no {name}: annotate with {_OF_OPTIONS[name]} into a new output"
                ) from error
            if "file system operations are disabled" in text:
                raise UsageError("a query reads OUTPUT and no other file") from error
            first = text.splitlines()[0]
            if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException) or re.search(
                rf"{CLIPS_FOLDER}/.*\.parquet", first
            ):
                raise OSError(first) from error
            if re.search(r'column "(scores|tags)" not found', text) and self._headers:
                text += "\nscore() is for clips and chunks, has() for clips"
            raise UsageError(text) from error

    def _scores_of(self, label: str) -> str:
        row = self.labels.find(label)
        expression = f"scores[{row.index + 1}]"
        self._headers[rf"({_ALIAS})?{re.escape(expression)}"] = f"score({quoted(label)})"
        return expression

    def _has_of(self, label: str) -> tuple[str, str]:
        macro = self.has_macro(self.labels.below(label))
        self._headers[rf"{macro}\(({_ALIAS})?tags\)"] = f"has({quoted(label)})"
        return f"{macro}(", "tags)"

    def has_macro(self, indices: Sequence[int]) -> str:
        """The name of a macro of `tags`: whether one of the labels is among them."""
        macro = self._macros.get(tuple(indices))
        if macro is None:
            macro = self._macros[tuple(indices)] = f"has_{len(self._macros)}"
            among = ", ".join(map(str, indices))
            self.connection.execute(
                f"CREATE MACRO {macro}(tags) AS "
                f"len(list_filter(tags, lambda t: t.index IN ({among}))) > 0"
            )
        return macro


@contextlib.contextmanager
def open_views(name: str, access: Access = DEFAULT_ACCESS) -> Iterator[Views]:
    """The views of an output; nothing of its clips is read before a query asks for it.

    Only files that are finished are seen, and only those of this moment.

    Args:
        name: the folder that `earmark annotate` wrote, a local path or a URL.
        access: how remote storage is used.

    Raises:
        UsageError: it is no such folder.
        OSError: it cannot be read.
    """
    output, run = _opened(name, access)
    shards = sorted(f"{shard_id}.parquet" for shard_id in finished_shards(output))
    with tempfile.TemporaryDirectory(prefix="earmark-query-") as spill:
        connection = duckdb.connect(
            config={
                # DuckDB would fetch an extension from the network for what it does not know.
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "temp_directory": spill,
            }
        )
        files = OutputFiles(output)
        try:
            connection.register_filesystem(files)
            views = Views(connection, output, run, Labels([]), (), files)
            with views.errors_explained():
                places = _make_views(views, [f"{CLIPS_FOLDER}/{file}" for file in shards])
                # What a query names beside the views is neither read nor written.
                connection.execute(f"SET allowed_paths = {_list(places)}")
                connection.execute("SET allowed_directories = ['earmark://']")
                connection.execute("SET enable_external_access = false")
                connection.execute("SET lock_configuration = true")
            yield views
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.unregister_filesystem(_SCHEME)
            connection.close()


def quoted(text: str) -> str:
    """A string as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def name_quoted(text: str) -> str:
    """The name of a column as SQL has it."""
    return '"' + text.replace('"', '""') + '"'


def with_functions(
    sql: str, scores_of: Callable[[str], str], has_of: Callable[[str], tuple[str, str]]
) -> str:
    """`sql` with each `score('label')` and `has('label')` replaced, strings and comments left alone.

    They are no functions of DuckDB's, because those cannot see the columns of the query
    they stand in; as a place in a list a score costs no search for its label.

    Args:
        sql: as the user wrote it.
        scores_of: gives what stands for `score(label)` after an alias such as `c.`.
        has_of: gives what stands for `has(label)` before such an alias and after it.
    """
    content = sql.encode("utf-8", "surrogateescape")  # DuckDB counts in bytes
    tokens = duckdb.tokenize(sql)
    if not tokens:
        return sql
    starts = [start for start, _ in tokens]
    texts = [
        content[start:end].decode("utf-8", "surrogateescape").strip()
        for start, end in zip(starts, [*starts[1:], len(content)], strict=True)
    ]
    pieces, done = [], 0
    for at, text in enumerate(texts):
        function = text.lower()
        if function not in ("score", "has") or texts[at + 1 : at + 2] != ["("]:
            continue
        if (
            len(texts) < at + 4
            or texts[at + 3] not in (")", ");")
            or not _is_literal(texts[at + 2])
        ):
            raise UsageError(
                f"{function}() takes one label in quotes, by name or mid, such as {function}('Dog')"
            )
        mark, label = texts[at + 2][0], texts[at + 2][1:-1]
        label = label.replace(mark * 2, mark)
        begin = at
        while begin >= 2 and texts[begin - 1] == ".":
            begin -= 2
        alias = "".join(texts[begin:at])
        if function == "score":
            replaced = alias + scores_of(label)
        else:
            before, after = has_of(label)
            replaced = before + alias + after
        pieces += [content[done : starts[begin]], replaced.encode()]
        done = starts[at + 3] + 1
    return b"".join([*pieces, content[done:]]).decode("utf-8", "surrogateescape")


def _is_literal(text: str) -> bool:
    return len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0]


class OutputFiles(AbstractFileSystem):  # type: ignore[misc]
    """The files of an output as DuckDB reads them: with our retries, and nothing but reading."""

    protocol = _SCHEME
    cachable = False

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._sizes: dict[str, int] = {}
        self.fault: OSError | None = None  # DuckDB gives only the text of an error

    def glob(self, path: str, **_: Any) -> list[str]:
        """The one file: its name is no pattern."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether it can be read is found out by reading."""
        return True

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size."""
        name = path.removeprefix(f"{_SCHEME}://")
        if name not in self._sizes:
            self._open(name).close()
        return {"name": path, "size": self._sizes[name], "type": "file"}

    def modified(self, path: str) -> datetime.datetime:
        """The same for all: a file that is published never changes."""
        return datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        name = path.removeprefix(f"{_SCHEME}://")
        if mode != "rb":
            raise PermissionError("an output is only read")
        try:
            stream = self._output.open(name)
            if name not in self._sizes:
                self._sizes[name] = stream.seek(0, io.SEEK_END)
                stream.seek(0)
            return _Told(stream, self)
        except OSError as error:
            self.fault = error
            raise


class _Told:
    """A file that keeps the error of a read for `OutputFiles.fault`."""

    def __init__(self, stream: Any, files: OutputFiles) -> None:
        self._stream, self._files = stream, files

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)  # type: ignore[no-any-return]
        except OSError as error:
            self._files.fault = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _opened(name: str, access: Access) -> tuple[Output, dict[str, Any]]:
    if not name:
        raise UsageError("OUTPUT is empty; is a shell variable unset?")
    try:
        output = open_output(name, access)
    except (ImportError, ValueError) as error:
        raise UsageError(f"OUTPUT {name!r} cannot be used: {error}") from error
    try:
        content = output.read(RUN_FILE)
    except OSError as error:
        raise UsageError(f"OUTPUT {name!r} cannot be read: {error.strerror or error}") from error
    if content is None:
        raise UsageError(
            f"OUTPUT {name!r} holds no {RUN_FILE}; give the folder that earmark annotate wrote"
        )
    try:
        run = json.loads(content)
        _ = run["scoring"]["top_k"], run["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{output.uri}/{RUN_FILE} is damaged or no earmark annotate's ({type(error).__name__}: "
            f"{error}); give the folder that earmark annotate wrote"
        ) from error
    return output, run


def _make_views(views: Views, names: list[str]) -> list[str]:
    """Makes the views over the files; gives the local paths that DuckDB reads itself."""
    connection, output = views.connection, views.output
    content = output.read(_LABELS_FILE)
    if content is None:
        raise UsageError(
            f"{output.uri}/{_LABELS_FILE} is not there, so what the scores mean is not known; the same "
            "earmark annotate again writes it"
        )
    try:
        connection.execute(
            f"CREATE TABLE labels AS FROM read_parquet('{_SCHEME}://{_LABELS_FILE}') ORDER BY index"
        )
    except duckdb.Error as error:
        raise UsageError(
            f"{output.uri}/{_LABELS_FILE} is damaged: remove it, and the same earmark annotate again "
            "writes it"
        ) from error
    rows = connection.execute(
        "SELECT index, mid, name, threshold, ancestors FROM labels"
    ).fetchall()
    views.labels = Labels([LabelRow(*row[:4], tuple(row[4])) for row in rows])

    # Local files DuckDB reads itself, in threads. A name with a mark of its patterns would be
    # one, and goes through Python.
    local = isinstance(output, LocalOutput) and not re.search(r"[*?\[\]]", str(output.uri))
    folder = str(Path(output.uri).resolve()) if local else f"{_SCHEME}:/"
    places = [f"{folder}/{name}" for name in names]
    if places:
        source = f"read_parquet({_list(places)}, hive_partitioning = false)"
    else:
        from pipeline.schema import clips_schema_of

        connection.register("no_rows", clips_schema_of(views.run).empty_table())
        source = "no_rows"
    connection.execute(f"CREATE VIEW all_rows AS FROM {source}")
    described = connection.execute("DESCRIBE all_rows").fetchall()
    views.columns = tuple(row[0] for row in described)
    # An error beside tags says that these are of a part of the clip.
    connection.execute("CREATE VIEW clips AS FROM all_rows WHERE tags IS NOT NULL")
    scores = [
        c for c in ("scores", "tags", "chunks", "segments", "embedding") if c in views.columns
    ]
    connection.execute(
        "CREATE VIEW failures AS SELECT error.stage AS stage, error.type AS type, "
        f"error.message AS message, * EXCLUDE (error, {', '.join(scores)}) "
        "FROM all_rows WHERE error IS NOT NULL"
    )
    for view, members in {
        "tags": "index, mid, name, score",
        "chunks": "start_s, end_s, scores",
        "segments": "index, mid, name, start_s, end_s, score",
    }.items():
        if view in views.columns:
            one = ", ".join(f"one.{member} AS {member}" for member in members.split(", "))
            connection.execute(
                f"CREATE VIEW {view} AS SELECT clip_id, {one} "
                f"FROM (SELECT clip_id, unnest({view}) AS one FROM all_rows)"
            )
    return places if local else []


def _list(texts: Sequence[str]) -> str:
    return "[" + ", ".join(map(quoted, texts)) + "]"
