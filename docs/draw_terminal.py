"""Run the README's main command and render its output: python docs/draw_terminal.py > docs/terminal.svg"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from rich.console import Console
from rich.text import Text

COMMAND = "plugframe run examples/image_classifier/train_lite.py --strategy=ddp --devices=2 --accelerator=cpu"


def main() -> None:
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        console = Console(record=True, width=110, file=devnull, force_terminal=True)
        done = subprocess.run(COMMAND.split(), capture_output=True, text=True, check=True)
        console.print(Text("$ " + COMMAND, style="bold green"))
        for line in done.stderr.splitlines():
            console.print(Text(line, style="dim"))
        for line in done.stdout.splitlines():
            console.print(Text(line, style="bold" if re.match("test accuracy", line) else ""))
        sys.stdout.write(console.export_svg(title="plugframe"))


if __name__ == "__main__":
    main()
