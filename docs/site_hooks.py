"""What mkdocs does besides: pages of files outside of docs/, and the list of decisions.

A link to a Markdown file elsewhere in the repository (``../SECURITY.md``) works where the repository is read, and on
the site, where that file becomes a page. A link to a file that is no page leads to `repo_url`, if it is set.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
#: Where files from outside of docs/ are on the site.
FOLDER = "project"
_LINK = re.compile(r"(?<=\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Replace a folder in the navigation by its pages."""
    config.nav = [_expanded(entry) for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each Markdown file outside of docs/ that a page links to."""
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        for target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
            found = _outside(path, target)
            if found is None or found.suffix != ".md" or files.get_file_from_path(_page_of(found)):
                continue
            new = File.generated(config, _page_of(found), abs_src_path=str(found))
            # Pages of the repository are linked to, not listed.
            new.inclusion = new.inclusion.NOT_IN_NAV
            files.append(new)
            waiting.append(found)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links to and from files outside of docs/ lead to their pages."""
    source = Path(page.file.abs_src_path)
    here = posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists() or (DOCS in path.parents and DOCS in source.parents):
            return link[0]
        uri = path.relative_to(DOCS).as_posix() if DOCS in path.parents else _page_of(path)
        if files.get_file_from_path(uri):
            return f"({posixpath.relpath(uri, here or '.')}{anchor})"
        address = config.repo_url or ""
        return f"({address.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()})" if address else "()"

    return _LINK.sub(replaced, markdown).replace("]()", "]")


def _expanded(entry: Any) -> Any:
    """Return an entry of the navigation, a folder as the list of its pages."""
    if isinstance(entry, dict):
        return {name: _expanded(value) for name, value in entry.items()}
    if isinstance(entry, list):
        return [_expanded(each) for each in entry]
    if entry.endswith("/"):
        return [path.relative_to(DOCS).as_posix() for path in sorted((DOCS / entry).glob("*.md"))]
    return entry


def _outside(page: Path, target: str) -> Path | None:
    """Return the file outside of docs/ that a link of a page leads to."""
    path = Path(os.path.normpath(page.parent / target))
    return path if path.is_file() and DOCS not in path.parents and ROOT in path.parents else None


def _page_of(path: Path) -> str:
    return f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
