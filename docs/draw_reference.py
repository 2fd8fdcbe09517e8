"""Generate the reference of the plugin contract from its hookspecs: python docs/draw_reference.py"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from plugframe import base, checkpoint, launch, testing
from plugframe.hooks import API, KINDS, Axis, Context, Dtypes, Job, Kind, MeshLayout, Option, Plugin, SaveHandle, World
from plugframe.hooks.context import Inner
from plugframe.hooks.markers import deprecated_of

TARGET = Path(__file__).parent / "plugins" / "reference.md"
_HEAD = f"""# The plugin contract

Generated from the hookspecs by `python docs/draw_reference.py`. API version: {API}; the previous one is accepted too.
`plugframe.base` has one base class per kind; hooks that it implements are optional. The data classes that hooks take
and return follow the kinds, and then the helpers of `plugframe.base`, `plugframe.checkpoint`, `plugframe.launch` and
`plugframe.testing`.

"""


def reference() -> str:
    """Return the page."""
    parts = [_HEAD, _descriptor(Plugin), _descriptor(Option), _descriptor(Axis)]
    parts += [_kind(kind) for kind in KINDS.values()]
    parts += [_descriptor(cls) for cls in (Context, World, MeshLayout, Dtypes, Job)]
    parts += [_members(cls) for cls in (SaveHandle, Inner)]
    parts += [_module(module) for module in (base, checkpoint, launch, testing)]
    return "\n".join(parts).rstrip() + "\n"


def _members(cls: Any) -> str:
    """Return a class with its own methods."""
    methods = [name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")]
    texts = [f"### `{cls.__name__}.{name}`\n\n{_prose(getattr(cls, name))}\n" for name in methods]
    return "\n".join([f"## `{cls.__name__}`\n\n{_prose(cls)}\n", *texts])


def _module(module: Any) -> str:
    """Return the public names of a module of helpers, base classes aside, which stand with their kinds."""
    texts = [f"## `{module.__name__}`\n\n{_prose(module)}\n"]
    kinds = {kind.name.title() for kind in KINDS.values()}
    for name in module.__all__:
        thing = getattr(module, name)
        if name in kinds or not callable(thing) or thing in (Job,):
            continue
        try:
            signature = str(inspect.signature(thing)).replace("'", "")
        except ValueError:  # a class of C
            signature = "(…)"
        kind = "class " if inspect.isclass(thing) else ""
        signature = re.sub(r" at 0x[0-9a-f]+", "", signature)
        texts.append(f"### `{name}`\n\n```python\n{kind}{name}{signature}\n```\n\n{_prose(thing)}\n")
    return "\n".join(texts)


def _descriptor(cls: Any) -> str:
    fields = dataclasses.fields(cls)
    lines = [f"    {field.name}: {field.type}{_default(field)}" for field in fields]
    return f"## `{cls.__name__}`\n\n{_prose(cls)}\n\n```python\n{cls.__name__}(\n" + ",\n".join(lines) + ",\n)\n```\n"


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}" if not callable(field.default) else " = …"
    return " = {}" if field.default_factory is not dataclasses.MISSING else ""


def _kind(kind: Kind) -> str:
    name = kind.name.title()
    has_base = hasattr(base, name)
    group = f"Entry-point group `{kind.group}`, setting `{kind.setting}`"
    lines = [f"## Kind `{kind.name}`", "", f"{group}{f', base class `plugframe.base.{name}`' if has_base else ''}.", ""]
    lines += [_prose(kind.spec), ""]
    for hook in kind.hooks:
        lines += [_hook(kind, hook), ""]
    return "\n".join(lines)


def _hook(kind: Kind, name: str) -> str:
    function = getattr(kind.spec, name)
    signature = str(inspect.signature(function)).replace("'", "").replace("(self, ", "(").replace("(self)", "()")
    deprecated = deprecated_of(function)
    note = f"\n\n**Deprecated:** {deprecated}" if deprecated.hook or deprecated.arguments else ""
    return f"### `{name}`\n\n```python\n{name}{signature}\n```\n\n{_prose(function)}{note}"


def _prose(thing: Any) -> str:
    """Return a docstring as Markdown: bold section names, single backquotes."""
    text = (inspect.getdoc(thing) or "").replace("``", "`")
    text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(Args|Returns|Raises|Attributes|Example):$", r"**\1**\n", text, flags=re.MULTILINE)
    lines = []
    for line in text.splitlines():
        inner = line.strip()
        if line.startswith("    ") and not line.startswith("        ") and re.match(r"\*?\w+: ", inner):
            lines.append(f"- `{inner.partition(':')[0]}`:{inner.partition(':')[2]}")
        else:
            lines.append(line if not line.startswith("    ") else f"  {inner}")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
