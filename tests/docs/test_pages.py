"""The blocks of the documentation run as they are, and print what the pages show."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pages import Block, as_script, blocks, changed, pages, run_each, run_one, shown
from paths import DOCS, ROOT
from plugframe.cli import cli
from plugframe_builtins.convert.convert import convert
from ranks import run_ranks

#: Executed elsewhere: in a checkout of their own, as the guide of plugin authors, and by tests/docs/test_loop_page.py.
ELSEWHERE = ("README.md", "docs/loop.md", "docs/loop-lines.md", "docs/plugins/", "docs/decisions/")


def page_scripts() -> Iterator[tuple[str, str, str]]:
    """Yield the place, the code and the shown output of every script: of each page one, of the pitfalls each block."""
    for page in pages():
        found = blocks(page)
        if page.parent.name == "pitfalls":
            yield from _each(found)
            continue
        python = [block for block in found if block.language == "python"]
        if python and not python[0].page.startswith(ELSEWHERE):
            pairs = itertools.pairwise(found)
            texts = [text.text for code, text in pairs if code in python and text.language == "text"]
            yield python[0].page, as_script(python), "\n".join(texts)


def _each(found: list[Block]) -> Iterator[tuple[str, str, str]]:
    """Yield the scripts of a pitfall, and the changed ones: what each prints is below it."""
    script = ""
    for block in found:
        if block.language == "python":
            script = block.text
        elif block.language == "diff":
            script = changed(script, block.text)
        else:
            yield block.name, script, block.text


def converted(folder: Path) -> tuple[str, str, str]:
    """Return the loop of the first page, converted, and what it prints as it is, on one rank."""
    (raw,) = blocks(DOCS / "index.md", "python")
    return f"{raw.name}, converted", convert(raw.text).text, run_one(raw.text, folder)


def combined() -> tuple[str, str, str]:
    """Return the script of the page on n-D parallel, under two strategies."""
    (script,) = blocks(DOCS / "nd-parallel.md", "python")
    options = "# variable: PLUGFRAME_STRATEGY=fsdp+tensor_parallel\n# variable: PLUGFRAME_MESH=data=1,tensor=2\n"
    return f"{script.name}, fsdp+tensor_parallel", options + script.text, "trained on 2 ranks"


def test_the_blocks_print_what_the_pages_show(tmp_path: Path) -> None:
    """Every block of Python runs on two ranks; where one is shown below it, its output or error is that."""
    scripts = [*page_scripts(), converted(tmp_path), combined()]
    assert len(scripts) > 20
    code = [text for _, text, _ in scripts]
    outputs = run_ranks(2, run_each, code, str(tmp_path), timeout_s=240, env={"PLUGFRAME_ACCELERATOR": "cpu"})
    for (name, _, expected), *ranks in zip(scripts, *outputs, strict=True):
        if expected:
            printed = [*ranks, "\n".join(ranks)]
            assert any(shown(expected, text) for text in printed), f"{name} shows\n{expected}\nnot\n{printed[-1]}"
        else:
            assert not [text for text in ranks if re.search(r"^\w+(Error|Exception): ", text, re.M)], f"{name}: {ranks}"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each command of plugframe in the pages, comments removed."""
    for page in pages():
        # The names of the guide are those of the packages that it makes.
        found = [] if page.parent.name == "plugins" else blocks(page, "sh")
        for block in found:
            for line in block.text.splitlines():
                words = shlex.split(line, comments=True)
                if words and Path(words[0]).name == "plugframe" and "[" not in line:
                    yield f"{block.name}: {line.strip()}", words[1:]


def test_the_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has options that exist, with values that are allowed; `plugframe run` makes a plan of it."""
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, words in commands():
        if words[0] == "run":
            code, output = _planned(words[1:], tmp_path)
            # Of a package that is not here, the name is known.
            code = (
                0 if "pip install 'plugframe[" in output or "launcher='submitit' is not installed" in output else code
            )
        else:
            code, output = _parsed(words)
        if code:
            wrong.append(f"{name}\n    {output.strip()[-300:]}")
    assert not wrong, "\n".join(wrong)


def _planned(words: list[str], folder: Path) -> tuple[int, str]:
    """Return the exit code and the output of ``plugframe run --dry-run``, on the CPU."""
    words = [word.replace("cuda", "cpu").replace("gpu", "cpu") for word in words]
    for word in [each for each in words if each.endswith(".py")] + ["package/train.py", "package/__init__.py"]:
        (folder / word).parent.mkdir(parents=True, exist_ok=True)
        (folder / word).write_text("import plugframe\n")
    result = CliRunner(env={"PLUGFRAME_ACCELERATOR": None}).invoke(cli, ["run", "--dry-run", *words])
    return result.exit_code, result.output


def _parsed(words: list[str]) -> tuple[int, str]:
    """Return 0, or 2 and the message, of a command that is parsed and not run."""
    context = cli.make_context("plugframe", ["--help"], resilient_parsing=True)
    command = cli.get_command(context, words[0])
    try:
        if command is None:
            return 2, "no such command"
        rest = words[1:]
        while isinstance(command, click.Group):
            _, inner, rest = command.resolve_command(context, rest)
            assert inner is not None
            command = inner
        command.make_context(words[0], list(rest), parent=context)
    except click.ClickException as error:
        return 2, error.format_message()
    except click.exceptions.Exit:
        return 0, ""
    return 0, ""


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site both make them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).strip().lower()
        words = re.sub(r"[^\w\s-]", "", plain)
        github, site = re.sub(r"\s", "-", words), re.sub(r"[-\s]+", "-", words)
        found |= {github} & {site}
    return found


def test_links_and_anchors_lead_somewhere() -> None:
    """Every file and every anchor that a page links to is there, on GitHub and on the site."""
    dead = []
    for page in [*pages(), *ROOT.glob("*.md")]:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            path = (page.parent / target) if target else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in headings(path)):
                dead.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert not dead, "\n".join(dead)


def test_every_page_is_in_the_navigation() -> None:
    """`mkdocs.yml` lists every page of docs/, or its folder."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(\S+(?:\.md|/))$", text[text.index("\nnav:") :], re.M))
    names = [page.relative_to(DOCS).as_posix() for page in pages() if DOCS in page.parents]
    assert not [name for name in names if name not in listed and f"{Path(name).parent.as_posix()}/" not in listed]
    assert not [name for name in listed if not (DOCS / name).exists()]


def test_the_first_page_has_the_diff_of_the_readme() -> None:
    """The five lines are shown once, in two places."""
    (first,), (second,) = blocks(DOCS / "index.md", "diff"), blocks(ROOT / "README.md", "diff")
    assert first.text == second.text
