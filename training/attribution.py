"""Whose sounds the bundled student learned from, as the corpus states it clip by clip."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def attributions(facts: list[dict[str, Any]]) -> str:
    """Authors by repository and licence."""
    authors: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for clip in facts:
        author = clip.get("author") or "not named"
        if author.startswith("["):  # a link inside its repository
            author = "others, listed in the repository"
        authors[clip["repo"]][clip["licence"]].add(author)
    lines = [
        "# Whose sounds the bundled student learned from",
        "",
        "All clips were cut, mixed to mono and resampled: modified from their sources.",
        "Repositories are on GitHub.",
    ]
    for repo in sorted(authors):
        lines += ["", f"## {repo}", ""]
        for licence in sorted(authors[repo]):
            lines.append(f"- {licence}: {'; '.join(sorted(authors[repo][licence]))}")
    return "\n".join(lines) + "\n"
