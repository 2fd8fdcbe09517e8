"""What starting costs: listing plugins, asking for help, importing. Whole processes, CPU seconds.

python benchmarks/startup.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import shutil

from rounds import cpu_seconds, installed, interleave, machine, python, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(machine())
    commands = {
        "python -c pass": python("pass"),
        "plugframe list-plugins": ["plugframe", "list-plugins"],
        "plugframe --help": ["plugframe", "--help"],
    }
    for name in ("fabric", "accelerate"):
        if shutil.which(name):
            commands[f"{name} --help"] = [name, "--help"]
    measures = {name: cpu_seconds(command) for name, command in commands.items()}
    report("Commands", interleave(measures, rounds=rounds), unit="s CPU", base="python -c pass", digits=3)

    imports = {
        "import torch": python("import torch"),
        "from plugframe import Lite": python("import torch; from plugframe import Lite"),
    }
    if installed("lightning.fabric"):
        imports["from lightning.fabric import Fabric"] = python("import torch; from lightning.fabric import Fabric")
    if installed("accelerate"):
        imports["from accelerate import Accelerator"] = python("import torch; from accelerate import Accelerator")
    measures = {name: cpu_seconds(command) for name, command in imports.items()}
    report("Imports", interleave(measures, rounds=rounds), unit="s CPU", base="import torch", digits=3)


if __name__ == "__main__":
    main()
