"""Run the blocks of the documentation: one after the other as one script, or each as a script of its own."""

from __future__ import annotations

import io
import linecache
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert_cases import run
from paths import DOCS
from plugframe.hooks.world import World
from plugframe.utils.environment import environment

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

#: What the pieces of a loop on a page refer to; a page may ask for other settings, and for more.
NAMES = """\
import os, random, sys, torch, types
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from plugframe import Lite, Option, Plugin
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint
lite = Lite({settings})
torch.manual_seed(0)
class GPT(nn.Sequential):
    def __init__(self, *sizes):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 3))
model = GPT()
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
data = TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
loader, test_loader = lite.setup_dataloaders(DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
loss_fn = nn.CrossEntropyLoss()
loss, accuracy, steps, epochs = torch.tensor(1.0), 0.5, 2, 2
state = {"model": model, "optimizer": optimizer}
{more}
"""

#: The constructor of a page that shows settings which the object of its other blocks has too.
_SAME = "Lite = lambda **settings: lite\n"
#: What pages need besides: settings of their `Lite`, and code.
NEEDS = {
    "docs/extensions.md": (
        "plugins=['early-stopping', 'best-model', 'ema', 'throughput']",
        _SAME + "manager = lite.checkpoints('run')\nevaluate = lambda model: None",
    ),
    "docs/large-models.md": (
        "checkpoint=ShardedCheckpoint(layout='torch')",
        _SAME + "class Block(nn.Module): ...\nclass AutoModelForCausalLM(GPT):\n"
        "    from_pretrained = classmethod(lambda cls, folder: cls())\n    save_pretrained = lambda self, folder: None",
    ),
    "docs/libraries.md": (
        "",
        "class Adapted(GPT):\n    save_pretrained = generate = lambda self, *args, **kwargs: None\n"
        "tokens, base, LoraConfig = {}, model, lambda **settings: None\n"
        "get_peft_model = lambda base, config: Adapted()\n"
        "get_peft_model_state_dict = lambda model, state_dict: state_dict",
    ),
    "docs/logging.md": (
        "",
        "wrong = {'a': 1}\nfor name in ('lightning', 'lightning.fabric', 'lightning.fabric.loggers'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "class CSVLogger:\n    experiment = log_metrics = lambda *args, **kwargs: None\n"
        "    def __init__(self, folder): ...\nsys.modules[name].CSVLogger = CSVLogger",
    ),
    "docs/out-of-memory.md": (
        "plugins='oom-retry'",
        _SAME + "path = 'last.ckpt'\nclass Graphs(list):\n    def __getitem__(self, part):\n"
        "        return [torch.cat(each) for each in zip(*super().__getitem__(part))]\n"
        "graphs = Graphs(zip(torch.randn(4, 1, 4), torch.zeros(4, 1).long()))",
    ),
    "docs/uneven-batches.md": (
        "",
        "dataset = 'shards'\nclass WebLoader(DataLoader):\n"
        "    def __init__(self, dataset, **settings):\n        super().__init__(data, 2)",
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: its path below docs/.
        line: of its first line of text.
        language: of the fence.
        text: without the fence.
        mark: the comment before it.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the blocks of a page in some languages; of all without any."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if not languages or match["language"] in languages:
            line = text.count("\n", 0, match.start("text")) + 1
            name = page.relative_to(DOCS.parent).as_posix()
            found.append(Block(name, line, match["language"], match["text"], match["mark"] or ""))
    return found


def pages() -> list[Path]:
    """Return all pages, the README included."""
    return [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]


def as_script(chosen: Sequence[Block]) -> str:
    """Return the blocks of a page as one script, at their lines, after the definition of what they refer to."""
    settings, more = NEEDS.get(chosen[0].page, ("", ""))
    names = NAMES.replace("{settings}", settings).replace("{more}", more)
    # A page that begins with a complete script defines everything by itself.
    lines = [f"exec({names!r})"] if "\nlite = Lite(" not in chosen[0].text or chosen[0].page in NEEDS else []
    for block in chosen:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


def changed(text: str, diff: str) -> str:
    """Return the source with a difference applied: what is removed is there once."""
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("+"))
    after = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-"))
    assert text.count(before) == 1, f"the script has {text.count(before)} times\n{before}"
    return text.replace(before, after)


def run_each(world: World, scripts: list[str], folder: str) -> list[str]:
    """Run scripts one after the other on this rank, all ranks in one folder; return what each prints, and its error."""
    outputs = []
    for number, text in enumerate(scripts):
        own = Path(folder) / str(number)
        own.mkdir(exist_ok=True)
        outputs.append(run_one(text, own))
    return outputs


def run_one(text: str, folder: Path) -> str:
    """Run a script in a folder as ``train.py``; return what it prints, and its error in the last line.

    A comment ``# variable: NAME=VALUE`` sets a variable, as options of the command line do.
    """
    out, error = io.StringIO(), ""
    before = Path.cwd()
    os.chdir(folder)
    variables = dict(re.findall(r"^# variable: (\w+)=(.*)$", text, re.M))
    try:
        # Messages quote the lines of a script.
        Path("train.py").write_text(text, encoding="utf-8")
        linecache.checkcache("train.py")
        with environment(variables):
            run(text, "train.py", folder, out)
    except Exception as raised:  # noqa: BLE001 - the test compares it with what the page shows
        error = f"{type(raised).__name__}: {raised}"
    finally:
        os.chdir(before)
    return f"{out.getvalue()}{error}".strip()


def shown(text: str, found: str) -> bool:
    """Return whether a page shows what was printed, with ``…`` for what varies, however its lines are broken."""
    pattern = ".*?".join(re.escape(part.strip()) for part in " ".join(text.split()).split("…"))
    return re.fullmatch(pattern.replace(r"\ ", " "), " ".join(found.split()), re.S) is not None
