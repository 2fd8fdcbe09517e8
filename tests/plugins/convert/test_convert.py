"""``plugframe convert``: converted scripts give the losses of before, and what is unsure is marked."""

from __future__ import annotations

import functools
import importlib.util
import os
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from convert_cases import Case, cases, numbers, run, run_all, run_before
from plugframe import Lite
from plugframe.cli import cli
from plugframe.utils.environment import environment
from ranks import run_ranks

pytest.importorskip("libcst")

from plugframe_builtins.convert.convert import Converted, convert

#: On several ranks sums are added up in another order.
SUMMED_ELSEWHERE = 2e-5


def runnable() -> list[Case]:
    """Return the scripts that this version can run."""
    return [case for case in cases() if hasattr(Lite, "gather_for_metrics") or case.name != "accelerate_classifier"]


@functools.cache
def result_of(case: Case) -> Converted:
    return convert(case.path.read_text(encoding="utf-8"))


def converted(source: str) -> str:
    return convert(textwrap.dedent(source)).text


def plug(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["convert", *words], prog_name="plugframe")
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.parametrize("case", runnable(), ids=lambda case: case.name)
def test_a_converted_script_gives_the_losses_of_before(case: Case, tmp_path: Path) -> None:
    """On one rank, to the digit; and converting it again changes nothing."""
    result = result_of(case)
    (tmp_path / "before").mkdir()
    before = numbers(run_before(case, tmp_path / "before"))
    with environment({"PLUGFRAME_ACCELERATOR": "cpu", "PLUGFRAME_DEVICES": "1"}):
        after = numbers(run(result.text, str(case.path), tmp_path))
    assert before
    assert after == pytest.approx(before, rel=case.tolerance, abs=case.tolerance)
    assert not any(mark.by_hand for mark in result.marks)
    again = convert(result.text)
    assert (again.text, again.marks) == (result.text, result.marks)


def test_converted_scripts_give_the_losses_of_before_on_two_ranks(tmp_path: Path) -> None:
    """Those whose numbers on the whole batch are defined, in one start."""
    chosen = [case for case in runnable() if case.ranks == 2]
    assert len(chosen) >= 35
    scripts = [(str(case.path), result_of(case).text) for case in chosen]
    env = {"PLUGFRAME_ACCELERATOR": "cpu", "PLUGFRAME_TIMEOUT_S": "60"}
    outputs, _ = run_ranks(2, run_all, scripts, str(tmp_path), timeout_s=300, env=env)
    (tmp_path / "before").mkdir()
    for case, output in zip(chosen, outputs, strict=False):
        assert not output.startswith("failed"), f"{case.name}: {output}"
        tolerance = max(case.tolerance, SUMMED_ELSEWHERE)
        expected = pytest.approx(numbers(run_before(case, tmp_path / "before")), rel=tolerance, abs=tolerance)
        assert numbers(output) == expected, case.name
    assert len(outputs) == len(chosen)


def test_the_corpus_is_varied() -> None:
    """At least forty scripts, of every library that is converted."""
    kinds = [result_of(case).kind for case in cases()]
    assert len(kinds) >= 40
    assert set(kinds) == {"raw", "fabric", "lite", "accelerate"}


README = """
import torch
from torch.utils.data import DataLoader

def train(args, device):
    model = MyModel(3)  # ours
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    dataloader = DataLoader( MyDataset(), shuffle=True )   # kept: as it is
    model.train()
    for epoch in range(args.num_epochs):
        for batch in dataloader:
            batch = batch.to(device)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()

train(parse(), "cpu")
"""


def test_the_five_steps_keep_formatting_and_comments() -> None:
    """The diff of the README, and no other line changes."""
    result = convert(README)
    before, after = README.splitlines(), result.text.splitlines()
    assert [line.strip() for line in after if line not in before] == [
        "from plugframe import Lite",
        "lite = Lite()",
        "model, optimizer = lite.setup(model, optimizer)",
        "# plugframe: one sample a rank: on N ranks a step takes N samples.",
        "dataloader = lite.setup_dataloaders(dataloader)",
        "lite.backward(loss)",
    ]
    assert [line.strip() for line in before if line not in after] == ["batch = batch.to(device)", "loss.backward()"]


def test_marks_carry_the_line_they_are_about() -> None:
    """The line is that of the code below the comment, in the converted script."""
    result = convert(README)
    (mark,) = result.marks
    assert result.text.splitlines()[mark.line - 1].strip().startswith("dataloader = DataLoader(")


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nprint(np.zeros(3))\n",
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x.to('cpu')\n",
        "import torch\nfrom plugframe import Lite\nlite = Lite()\nloss.backward()\n",
        "from lightning.pytorch import Trainer\nTrainer().fit(model)\n",
        "x = 1",
        "",
    ],
    ids=["no torch", "no loop", "plugframe", "Trainer", "no newline", "empty"],
)
def test_a_script_without_a_loop_that_is_known_stays_as_it_is(source: str) -> None:
    """Not a character changes."""
    assert convert(source).text == source


def test_a_backward_that_is_not_of_a_loss_stays() -> None:
    """A class of the script with a method of that name is not a tensor."""
    source = """
    import torch
    class Tape:
        def backward(self):
            pass
    tape = Tape()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tape.backward()
    """
    assert "\ntape.backward()" in converted(source)


DDP = """
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

def main():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = DDP(Net().cuda(), device_ids=[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        model(x).sum().backward()
        optimizer.step()
    if rank == 0:
        os.makedirs("out", exist_ok=True)
        torch.save({"model": model.module.state_dict()}, "out/last.pt")
        print("saved")
    dist.destroy_process_group()

main()
"""


def test_what_all_ranks_must_call_leaves_the_block_of_rank_zero() -> None:
    """Only what is done by one rank stays in it."""
    assert """    if lite.is_global_zero:
        os.makedirs("out", exist_ok=True)
    lite.save({"model": model.state_dict()}, "out/last.pt")
    lite.print("saved")
""" in converted(DDP)


def test_nothing_of_the_process_group_is_left() -> None:
    """Imports that nothing uses any more go too."""
    text = converted(DDP)
    for word in ("dist", "DDP", "set_device", "cuda", "LOCAL_RANK"):
        assert word not in text


def test_a_library_asks_its_callers_for_the_object() -> None:
    """A function with a loop, in a file that neither makes the model nor calls it, takes the object."""
    result = convert("import torch\n\ndef step(loss, optimizer):\n    loss.backward()\n    optimizer.step()\n")
    assert "def step(lite, loss, optimizer):\n    " in result.text
    assert [mark.by_hand for mark in result.marks] == [True, False]


HABITS = """
import torch
import wandb
from model import Net
from torch.utils.data import DataLoader
from tqdm import tqdm

def main():
    wandb.init(project="x")
    device = torch.device("cuda")
    model = Net().to(device)
    if fast:
        optimizer = torch.optim.Adam(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters())
    loader = DataLoader(data, 4 * n, True)
    for batch in tqdm(loader):
        x = batch["x"].to(device)
        optimizer.zero_grad(); model(x).backward(); optimizer.step()
        torch.save(model, "model.pt")

main()
"""


def test_branches_bars_and_files_of_every_rank() -> None:
    """An optimizer of two branches is set up after them, a bar shows once, files are marked where they are written."""
    lines = [line.strip() for line in convert(HABITS).text.splitlines()]
    for line in (
        "model = Net()",
        "loader = DataLoader(data, (4 * n) // lite.world_size, True)",
        "for batch in tqdm(loader, disable=not lite.is_global_zero):",
        "optimizer.zero_grad(); lite.backward(model(x)); optimizer.step()",
    ):
        assert line in lines
    assert lines[lines.index("model, optimizer = lite.setup(model, optimizer)") - 1].endswith("SGD(model.parameters())")
    assert [lines[mark.line - 1] for mark in convert(HABITS).marks] == [
        'wandb.init(project="x")',
        'torch.save(model, "model.pt")',
    ]


def test_mixed_precision_is_that_of_the_script() -> None:
    """``autocast`` names the precision, and a scaler goes."""
    source = """
    import torch
    from torch.amp import GradScaler, autocast
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler()
    with autocast("cuda"):
        loss = model(x).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    """
    text = converted(source)
    assert 'Lite(precision="16-mixed")' in text
    assert "scaler" not in text.lower()


EVALUATION = """
import torch
from torch.utils.data import DataLoader
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8)
kept, total = [], 0
for {target} in loader:
    {body}
"""


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("x, y", "y"),
        ("x, y", "model(x)"),
        ("x, y", "model(x).argmax(dim=1).cpu().numpy()"),
        ("x, y", "torch.softmax(model(x), dim=1)"),
        ("x, y", "model(x).argmax(-1) == y"),
        ("batch", 'batch["label"]'),
        ("step, batch", 'batch["label"]'),
        ("step, (x, y)", "model(x)"),
    ],
)
def test_predictions_that_are_kept_are_those_of_all_ranks(target: str, value: str) -> None:
    """Values with a row for each sample are gathered, by ``append`` and by ``extend``."""
    for word in ("append", "extend"):
        source = EVALUATION.format(target=target, body=f"kept.{word}({value})")
        result = convert(source.replace(" in loader", " in enumerate(loader)") if "step" in target else source)
        assert f"kept.{word}(lite.gather_for_metrics({value}))" in result.text
        assert not result.marks


@pytest.mark.parametrize(
    "body",
    [
        "kept.append(model(x).mean())",
        "kept.append(model(x).argmax(0))",
        "kept.append(score(x))",
        "kept.append(y.sum().item())",
        "y = y.view(-1); kept.append(y)",
        "kept.append(y); total += len(y)",
        "kept.append(y); kept.append(score(x))",
    ],
)
def test_values_that_may_not_be_of_samples_are_marked(body: str) -> None:
    """Nothing is gathered in a loop that also keeps something else, or counts: the ranks fill up their last step."""
    result = convert(EVALUATION.format(target="x, y", body=body))
    assert "gather_for_metrics(" not in result.text.replace("see lite.gather_for_metrics()", "")
    assert result.marks


ACCUMULATION = """
from accelerate import Accelerator
accelerator = Accelerator(gradient_accumulation_steps=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for step, batch in enumerate(tqdm(loader)):
    # a comment
    with accelerator.accumulate(model):
        loss = model(batch)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and step > 3:
        progress.update(1)
"""


def test_an_accumulating_context_becomes_its_loop() -> None:
    """The loop accumulates, the block is gone, and what steps is under one condition; a difference is marked."""
    result = convert(ACCUMULATION)
    assert result.text.endswith("""\
# plugframe: a last step of fewer batches is their mean: Accelerate divides by 4 there too.
for step, batch in enumerate(tqdm(accelerator.accumulate(loader, model, steps=4))):
    # a comment
    loss = model(batch)
    accelerator.backward(loss)
    if not accelerator.accumulating:
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if not accelerator.accumulating and step > 3:
        progress.update(1)
""")


def test_an_accumulating_context_elsewhere_is_changed_by_hand() -> None:
    """In a function of its own, or beside another one, its loop is not known."""
    source = """
    from accelerate import Accelerator
    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        if batch is not None:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
    """
    result = convert(textwrap.dedent(source))
    assert any(mark.by_hand and "accumulate(loader, model, steps=4)" in mark.text for mark in result.marks)


@pytest.mark.parametrize(
    ("size", "body", "marked"),
    [
        ("5", "model(x).mean().backward()", True),
        ("4", "model(x).mean().backward()", False),
        ("5", "kept.append(model(x))", False),
    ],
)
def test_a_batch_size_that_ranks_cannot_divide_is_marked_where_it_counts(size: str, body: str, marked: bool) -> None:
    """In a training, not in an evaluation."""
    source = EVALUATION.replace("batch_size=8", f"batch_size={size}").format(target="x, y", body=body)
    marks = convert(source).marks
    assert [mark.text for mark in marks if "divides" in mark.text] == [
        f"no even number of ranks divides {size}: a step takes fewer samples there than on one."
    ] * marked


def test_the_script_is_printed_and_its_marks_listed(tmp_path: Path) -> None:
    """On stdout the script, on stderr what to look at, with lines."""
    script = tmp_path / "train.py"
    script.write_text(README, encoding="utf-8")
    code, out, err = plug(str(script))
    assert (code, out) == (0, convert(README).text)
    assert f"{script}:13: one sample a rank" in err
    assert err.endswith("converted from plain PyTorch. 1 to check.")
    assert script.read_text(encoding="utf-8") == README


def test_diff_write_and_output(tmp_path: Path) -> None:
    """Each in its way; a second ``--write`` changes nothing."""
    script, other = tmp_path / "train.py", tmp_path / "other.py"
    script.write_text(README, encoding="utf-8")
    os.chmod(script, 0o750)
    _, out, _ = plug(str(script), "--diff")
    assert "-            loss.backward()\n+            lite.backward(loss)\n" in out
    assert plug(str(script), "-o", str(other))[:2] == (0, "")
    assert plug(str(script), "--write")[:2] == (0, "")
    assert script.read_text(encoding="utf-8") == other.read_text(encoding="utf-8") == convert(README).text
    assert script.stat().st_mode & 0o777 == 0o750
    code, _, err = plug(str(script), "--write")
    assert code == 0
    assert "uses plugframe already: nothing changed." in err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other.py", "train.py"]


def test_newlines_and_encoding_stay(tmp_path: Path) -> None:
    """A script with Windows newlines in Latin-1 keeps both."""
    script = tmp_path / "train.py"
    text = "# -*- coding: latin-1 -*-\n# ä" + README
    script.write_bytes(text.replace("\n", "\r\n").encode("latin-1"))
    assert plug(str(script), "--write")[0] == 0
    written = script.read_bytes()
    assert b"lite.backward(loss)\r\n" in written
    assert "# ä\r\n".encode("latin-1") in written
    assert written.count(b"\n") == written.count(b"\r\n")


def test_what_is_left_to_do_by_hand_is_the_exit_code(tmp_path: Path) -> None:
    """1, so that a program that converts many files knows."""
    script = tmp_path / "train.py"
    script.write_text("import torch\ndef step(loss):\n    loss.backward()\n", encoding="utf-8")
    code, _, err = plug(str(script))
    assert code == 1
    assert "1 to change by hand" in err


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.py", None, [], "none.py does not exist."),
        ("bad.py", "def f(:\n", [], "bad.py:1 is not Python: 'def f(:'"),
        ("n.ipynb", "{}", [], "n.ipynb is a notebook: export its code with 'jupyter nbconvert --to script"),
        ("a.py", "", ["--diff", "--write"], "Use one of --diff, --write and --output."),
        ("b.py", b"\xff\xfe", [], "b.py cannot be read:"),
        ("c.py", "", ["-o", "no/where.py"], "where.py cannot be written:"),
        (".", None, [], "cannot be read:"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, options: list[str], message: str
) -> None:
    """With exit code 2."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    result = CliRunner().invoke(cli, ["convert", str(path), *options], prog_name="plugframe")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_libcst_the_command_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = plug("train.py")
    assert code == 2
    assert err == "plugframe: plugframe convert needs libcst: pip install 'plugframe[convert]'"


def test_results_are_values() -> None:
    """Two conversions of one script are equal."""
    assert convert(README) == convert(README)
    assert isinstance(convert(README), Converted)
