"""Run the commands of the plugin authors' guide and update their output: python docs/draw_pages.py [KIND …]

A ``console`` block holds commands (``$ …``), each followed by its output; a comment ``<!-- file: PATH -->`` is
followed by the contents of that file. Output that varies between runs is replaced by ``…``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

GUIDE = Path(__file__).parent / "plugins"
_BLOCK = re.compile(r"```console\n(.*?)```\n", re.DOTALL)
_FILE = re.compile(r"<!-- file: (\S+) -->\n(?:\n```python\n.*?```\n)?", re.DOTALL)
#: Commands replaced by an equivalent that uses the installed packages and no network.
_OFFLINE = {
    "pip install -e '.[test]'": "{python} -m pip install -q --no-deps --no-index --no-build-isolation -t {site} .",
    "python -m build --wheel": "{python} -m build --wheel --no-isolation",
}
#: Patterns of output that varies between runs, and their replacements.
_VARYING = (
    (r"\d+ passed(, \d+ skipped)?( in .*)?", "… passed …"),
    (r"(?s)^[.s\sx%\[\]\d]*(?=… passed)", ""),
    (r"(?m)^SKIPPED .*\n|^=+ short test summary.*\n", ""),
    (r"(?m)^plugframe: \d rank.*\n", ""),
    (r"\d+\.\d\d ms", "… ms"),
    (r"(?s)\* .*(?=Successfully built)", ""),
)


def drawn(page: str) -> str:
    """Run the commands of a page, and return it with their output and files."""
    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        shell = _Shell(Path(folder))
        page = _BLOCK.sub(lambda block: f"```console\n{shell.run(block[1])}```\n", page)
        return _FILE.sub(lambda found: f"{found[0].splitlines()[0]}\n\n```python\n{shell.read(found[1])}```\n", page)


class _Shell:
    def __init__(self, folder: Path) -> None:
        self.folder = self.start = folder
        self.site = folder / "site"
        self.site.mkdir()

    def run(self, block: str) -> str:
        lines = []
        for command in re.findall(r"(?m)^\$ (.*)$", block):
            lines.append(f"$ {command}\n{self._output(command)}")
        return "".join(lines)

    def read(self, path: str) -> str:
        return (self.folder / path).read_text(encoding="utf-8")

    def _output(self, command: str) -> str:
        if command.startswith("cd "):
            self.folder = self.folder / command[3:]
            return ""
        line = _OFFLINE.get(command, command).format(
            python=shlex.quote(sys.executable), site=shlex.quote(str(self.site))
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PLUGFRAME_"))}
        paths = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.site),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.folder,
            env={**inherited, **paths},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        text = done.stdout
        for pattern, replacement in _VARYING:
            text = re.sub(pattern, replacement, text)
        text = text.strip("\n")
        return f"{text}\n" if text else ""


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(
        path.stem for path in GUIDE.glob("*.md") if path.stem not in ("README", "reference")
    ):
        path = GUIDE / f"{name}.md"
        path.write_text(drawn(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(name)
