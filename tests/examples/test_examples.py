"""The examples run, print what they promise, and their diff in the README is the true one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import warm
from paths import EXAMPLES

TWO_RANKS = ("-m", "plugframe", "run", "--devices", "2")  # and then the script, a bare --, its options
SHORT = ("--steps", "4", "--warm-up", "1", "--batch-size", "8", "--block", "16", "--validate-every", "4")

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs DeepSpeed")
needs_digits = pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="needs scikit-learn")


def run(folder: str, *command: str, cwd: Path) -> str:
    """Run python with `command`, in which train_lite.py is the one in `folder`, and return what it printed."""
    started_by = re.compile("PLUGFRAME_|TORCHELASTIC_|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")
    environment = {name: value for name, value in os.environ.items() if not started_by.match(name)}
    script = str(EXAMPLES / folder / "train_lite.py")
    result = warm.run(
        [sys.executable, *(script if part == "train_lite.py" else part for part in command)],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


@pytest.fixture
def run_twin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., str]]:
    """Run an example's train_torch.py in this process, and return what it printed."""
    modules, variables, state = set(sys.modules), set(os.environ), torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))

    def run(folder: str, *options: str) -> str:
        monkeypatch.syspath_prepend(EXAMPLES / folder)
        monkeypatch.setattr(sys, "argv", ["train_torch.py", *options])
        runpy.run_path(str(EXAMPLES / folder / "train_torch.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_rng_state(state)
    for name in set(os.environ) - variables:
        del os.environ[name]  # scikit-learn sets some when it is imported
    for name in set(sys.modules) - modules:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def losses_of(path: Path) -> list[float]:
    """Return the losses an image classifier wrote, in the order of its steps."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def accuracies_of(output: str) -> list[float]:
    """Return the accuracies an image classifier printed: after every epoch, and at the end."""
    return [float(accuracy) for accuracy in re.findall(r"test accuracy:? ([\d.]+) %$", output, re.MULTILINE)]


def validation_of(output: str) -> list[float]:
    """Return the validation losses a language model printed."""
    return [float(loss) for loss in re.findall(r"^step +\d+: validation loss ([\d.]+)", output, re.MULTILINE)]


@pytest.mark.ranks
@needs_digits
def test_image_classifier_in_plain_torch_goes_on_from_its_checkpoint(
    tmp_path: Path, run_twin: Callable[..., str]
) -> None:
    """The torch twin, stopped and resumed, has the losses of the twin that was not."""
    saved, resumed, straight = (str(tmp_path / name) for name in ("saved.pt", "resumed", "straight"))
    run_twin("image_classifier", "--epochs", "1", "--checkpoint", saved)
    output = run_twin("image_classifier", "--epochs", "2", "--checkpoint", saved, "--losses", resumed)
    assert output.startswith("epoch  2: loss ")
    run_twin("image_classifier", "--epochs", "2", "--losses", straight)
    losses = losses_of(Path(resumed))
    assert losses == losses_of(Path(straight))
    assert len(losses) == 90
    assert losses[-1] < 1 < losses[0]


@needs_digits
@pytest.mark.slow
def test_image_classifier_is_the_same_on_two_ranks_as_on_one_that_was_stopped(tmp_path: Path) -> None:
    """One process, stopped and resumed, reads 97 % of the digits; two ranks have its loss in every step."""
    options = ("--checkpoint", "saved", "--losses", "one.jsonl")
    first = run("image_classifier", "train_lite.py", "--epochs", "1", *options, cwd=tmp_path)
    one = run("image_classifier", "train_lite.py", *options, cwd=tmp_path)
    assert one.startswith("epoch  2: loss ")
    assert accuracies_of(one)[-1] >= 97
    options = ("--epochs", "3", "--losses", "two.jsonl")
    two = run("image_classifier", *TWO_RANKS, "train_lite.py", "--", *options, cwd=tmp_path)
    assert accuracies_of(two)[:3] == accuracies_of(first)[:1] + accuracies_of(one)[:2]
    losses = losses_of(tmp_path / "two.jsonl")
    assert losses == pytest.approx(losses_of(tmp_path / "one.jsonl")[: len(losses)], abs=1e-5)
    assert len(losses) == 135


@pytest.mark.ranks
def test_language_model_in_plain_torch_learns(tmp_path: Path, run_twin: Callable[..., str]) -> None:
    """The torch twin's validation loss falls; it writes some text and draws its losses."""
    output = run_twin("language_model", *SHORT, "--plot", str(tmp_path / "losses.png"))
    first, last = validation_of(output)
    assert last < first
    assert "\ndef " in output
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_language_model_learns_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    """Accumulated, clipped and validated on two ranks, the losses are those of one process."""
    one = run("language_model", "train_lite.py", *SHORT, cwd=tmp_path)
    two = run("language_model", *TWO_RANKS, "train_lite.py", "--", *SHORT, cwd=tmp_path)
    assert len(validation_of(one)) == 2
    assert validation_of(one)[-1] < validation_of(one)[0]
    assert validation_of(two) == pytest.approx(validation_of(one), abs=2e-3)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("deepspeed_stage_3", "fsdp")])
def test_language_model_goes_on_under_another_strategy(first: str, second: str, tmp_path: Path) -> None:
    """Unchanged, in parts on two ranks from the command line; its checkpoint goes on as if nothing had changed."""
    losses = []
    for strategies in ((first, second), ("ddp", "ddp")):
        options = ("--checkpoint", f"{strategies[0]}.ckpt", *SHORT)
        for strategy, steps in zip(strategies, ("4", "8"), strict=True):
            command = (*TWO_RANKS, "--strategy", strategy, "--accelerator=cpu", "train_lite.py", "--", *options)
            output = run("language_model", *command, "--steps", steps, cwd=tmp_path)
            losses.append(validation_of(output))
    assert [len(each) for each in losses] == [2, 2, 2, 2]
    assert losses[1][0] == losses[0][-1]
    assert losses[0] == pytest.approx(losses[2], abs=2e-3)
    assert losses[1] == pytest.approx(losses[3], abs=2e-3)


@pytest.mark.parametrize("folder", ["image_classifier", "language_model"])
def test_readme_shows_the_true_diff(folder: str) -> None:
    """The diff in the examples' README is a patch that turns the one twin into the other."""
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    head = rf"--- {folder}/train_torch.py\n\+\+\+ {folder}/train_lite.py\n"
    [shown] = re.findall(rf"```diff\n{head}(.*?)```", readme, re.DOTALL)
    twins = [EXAMPLES / folder / name for name in ("train_torch.py", "train_lite.py")]
    old, new = (twin.read_text(encoding="utf-8").splitlines() for twin in twins)
    assert patched(old, shown.splitlines()) == new


def patched(old: list[str], diff: list[str]) -> list[str]:
    """Return `old` with the hunks of a unified diff applied; what they say of `old` must be so."""
    new: list[str] = []
    position = 0
    for line in diff:
        if line.startswith("@@"):
            start = int(line.split()[1].split(",")[0].lstrip("-")) - 1
            new += old[position:start]
            position = start
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            assert old[position] == line[1:]
            new += [line[1:]] if line[:1] != "-" else []
            position += 1
    return new + old[position:]
