"""Write plugframe/lite/_names.py: the names an editor completes in the arguments of `Lite`.

python .ci/names.py
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "plugframe" / "lite" / "_names.py"
HEAD = '''"""The names of the built-in plugins, for editors alone: nothing imports this module while a script runs.

Written by .ci/names.py from the entry points in pyproject.toml.
"""

from typing import Literal

'''
WIDTH = 120


def text() -> str:
    """Return what the module must hold."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    kinds = {group.removeprefix("plugframe."): names for group, names in groups.items() if "plugframe." in group}
    del kinds["command"]
    return HEAD + "".join(map(_alias, kinds, kinds.values()))


def _alias(kind: str, names: dict[str, str]) -> str:
    words = [f'"{name}"' for name in (["auto"] if kind not in ("logger", "extension") else []) + list(names)]
    line = f"{kind.title()}Name = Literal[{', '.join(words)}]\n"
    if len(line) <= WIDTH:
        return line
    return f"{kind.title()}Name = Literal[\n" + "".join(f"    {word},\n" for word in words) + "]\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
