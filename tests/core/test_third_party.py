"""Other people's packages, installed by pip: a name is all it takes, and a broken one is alone in that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import warm
from plugframe import (
    AmbiguousPluginError,
    Lite,
    MissingDependencyError,
    PlugframeWarning,
    PluginContractError,
    PluginError,
    PluginLoadError,
    UnknownPluginError,
)
from plugframe.cli import cli
from plugframe.core.registry.registry import Registry
from plugframe.hooks.world import World
from ranks import run_ranks

Use = Callable[..., None]

ALL = ("acme", "broken", "slow", "twin")
ACME: dict[str, Any] = {
    "strategy": "acme",
    "accelerator": "acmechip",
    "plugins": "acme-counter",
    "loggers": "acme-logger",
}

#: What each broken strategy says; its distribution and version are in all of them.
SAYINGS: dict[str, tuple[type[PluginError], str]] = {
    "broken-import": (
        PluginLoadError,
        r"with ImportError: libacme.*Fix or uninstall plugframe-broken",
    ),
    "broken-exit": (PluginLoadError, r"SystemExit: This chip needs a licence\. Fix or uninstall plugframe-broken"),
    "broken-type": (PluginLoadError, r"is a dict, not a plugframe\.Plugin\. .* uninstall plugframe-broken"),
    "broken-api": (PluginLoadError, r"version 99 of the plugin contract.*'pip install --upgrade plugframe'"),
    "broken-beside": (
        PluginLoadError,
        r"strategies has the name of the module .* has to rename one of them",
    ),
    "broken-name": (PluginLoadError, r"has no attribute 'nothing_of_that_name'\. Fix or uninstall plugframe-broken"),
    "broken-factory": (PluginLoadError, r"raised OSError: no chip on the bus\. Fix or uninstall plugframe-broken"),
    "broken-needs": (MissingDependencyError, r"needs acme_vendor_sdk: type \"pip install 'plugframe-broken\[sdk\]'\""),
    "broken-hook": (PluginContractError, r"overrides strategy_next_batch without a mark: add @plugframe\.hookimpl"),
    "broken-extra": (PluginContractError, r"strategy_backwards, which is no hook\. Did you mean 'strategy_backward'\?"),
}


def cpu(**settings: Any) -> Lite:
    """Return a Lite whose accelerator and size leave nothing to this machine."""
    return Lite(**{"accelerator": "cpu", "devices": 1, **settings})


def train(lite: Lite) -> tuple[Any, nn.Module]:
    """Take three steps on this rank's part of a fixed batch; return the optimizer and the model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = torch.arange(24, dtype=torch.float32).reshape(8, 3) / 24
    for _ in range(3):
        optimizer.zero_grad()
        mine = data[lite.global_rank :: lite.world_size]
        with lite.no_backward_sync(model):
            lite.backward(model(mine[: len(mine) // 2]).pow(2).mean() / 2)
        loss = model(mine[len(mine) // 2 :]).pow(2).mean() / 2
        lite.backward(loss)
        lite.log("loss", loss.detach())
        optimizer.step()
    return optimizer, model


# ---------------------------------------------------------------------- they are listed


def test_all_of_them_are_listed(packages: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The listing shows every name with its package and what is to be typed for it; it imports none of them."""
    packages(*ALL)
    monkeypatch.setenv("SLOW_TRACE", str(tmp_path / "trace"))
    done = subprocess.run(
        [sys.executable, "-m", "plugframe", "list-plugins", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rows = {f"{row['package']}:{row['name']}": row for row in json.loads(done.stdout)}
    theirs = {name: row for name, row in rows.items() if row["package"] != "plugframe"}
    expected = {
        *(f"plugframe-acme:{name}" for name in ("acme", "acmechip", "acme-counter", "acme-logger")),
        *(f"plugframe-broken:{name}" for name in (*SAYINGS, "ddp", "broken-chip")),
        *("plugframe-slow:slow", "plugframe-slow:slow-logger", "plugframe-twin:acme"),
    }
    assert set(theirs) == expected
    assert theirs["plugframe-acme:acmechip"]["version"] == "1.4.0"
    assert rows["plugframe:ddp"]["status"] == "not checked"
    assert rows["plugframe-broken:ddp"]["status"] == "shadowed by the built-in; use plugframe-broken:ddp"
    for name in ("plugframe-acme:acme", "plugframe-twin:acme"):
        assert theirs[name]["status"] == f"the same name in several packages; use {name}"
    assert not (tmp_path / "trace").exists()


def test_checking_tells_the_broken_from_the_others(
    packages: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each descriptor and class is loaded apart, no plugin is made; the exit code says that something is broken."""
    packages("acme", "broken", "slow")
    monkeypatch.setenv("SLOW_TRACE", str(tmp_path / "trace"))
    result = CliRunner().invoke(cli, ["list-plugins", "--check", "--json"])
    assert result.exit_code == 1
    status = {row["name"]: row["status"] for row in json.loads(result.stdout) if row["package"] != "plugframe"}
    for name in ("broken-import", "broken-exit", "broken-type", "broken-name", "broken-beside"):
        assert status[name].startswith("broken: ")
    assert status["broken-api"].startswith("incompatible: ")
    assert status["broken-needs"].startswith("missing acme_vendor_sdk: type")
    assert {status[name] for name in ("acme", "acmechip", "acme-counter", "acme-logger", "slow")} == {"ok"}
    assert (tmp_path / "trace").read_text() == "descriptors\nimplementations\n"


# ---------------------------------------------------------------------- a name is all it takes


def test_selected_by_name_in_code_on_one_device(packages: Use, capsys: pytest.CaptureFixture[str]) -> None:
    """Strategy, accelerator, extension and logger of a package work together, by their names alone."""
    packages("acme", "broken", "slow")
    with Lite(devices=1, **ACME) as lite:
        assert [type(plugin).__name__ for plugin in (lite.strategy, lite.accelerator)] == ["Acme", "AcmeChip"]
        assert lite.plan.choices["collective"].name == "torch"
        assert lite.plan.line().count("(plugframe-acme 1.4.0)") == 4
        _, ours = train(lite)
    with cpu(strategy="single") as plain, pytest.warns(PlugframeWarning, match=r"log\(\) has no effect"):
        _, theirs = train(plain)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["acme-logger"] * 3 + ["acme-counter"]
    assert lines[-1] == "acme-counter: 6 backwards"


def on_two(world: World) -> list[list[float]]:
    """Train on a rank and return the parameters."""
    with Lite(devices=2, **ACME) as lite:
        _, model = train(lite)
        assert (lite.world_size, lite.global_rank) == (2, world.global_rank)
        return [parameter.flatten().tolist() for parameter in model.parameters()]


def test_selected_by_name_in_code_on_two_devices(packages: Use) -> None:
    """On two ranks the same names train the same model as one process on the whole data."""
    packages("acme", "broken", "slow")
    first, second = run_ranks(2, on_two)
    assert first == second
    with Lite(devices=1, **ACME) as lite:
        _, model = train(lite)
    whole = [parameter.flatten().tolist() for parameter in model.parameters()]
    for ours, theirs in zip(first, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


SCRIPT = """
import torch
from plugframe import Lite

lite = Lite()
model, optimizer = torch.nn.Linear(2, 1), None
model = lite.setup(model)
lite.backward(model(torch.full((4, 2), float(lite.global_rank))).mean())
lite.log("gradient", model.weight.grad.sum())
print(f"rank {lite.global_rank} of {lite.world_size}: {type(lite.strategy).__name__} {model.weight.grad.tolist()}")
lite.teardown()
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_selected_by_name_on_the_command_line(packages: Use, tmp_path: Path, devices: int) -> None:
    """The same names on the command line reach every rank; what is broken beside them is not even mentioned."""
    packages("acme", "broken", "slow")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = [f"--{name}={value}" for name, value in {**ACME, "devices": devices}.items()]
    done = warm.run(
        [sys.executable, "-m", "plugframe", "run", "-v", *options, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    mean = (devices - 1) / 2
    for rank in range(devices):
        assert f"rank {rank} of {devices}: Acme [[{mean}, {mean}]]" in done.stdout
    assert f"acme-logger: step 0: gradient={2 * mean:g}" in done.stdout
    assert done.stdout.count("acme-counter: 1 backwards") == devices
    assert "strategy acme (plugframe-acme 1.4.0)" in done.stderr
    assert "broken" not in done.stderr


def test_two_packages_with_one_name(packages: Use) -> None:
    """The bare name is an error that lists the qualified names, and both of those work."""
    packages("acme", "twin")
    said = "strategy 'acme' is published by 2 packages: write 'plugframe-acme:acme' or 'plugframe-twin:acme'"
    with pytest.raises(AmbiguousPluginError, match=said):
        cpu(strategy="acme")
    assert type(cpu(strategy="plugframe-acme:acme").strategy).__name__ == "Acme"
    assert type(cpu(strategy="plugframe_twin:acme").strategy).__name__ == "Twin"
    result = CliRunner().invoke(cli, ["run", "--strategy=acme", "--devices=1", __file__])
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_a_name_with_a_slip(packages: Use) -> None:
    """The closest installed name is offered, a third party's like any other; one of another kind is named as such."""
    packages("acme")
    with pytest.raises(UnknownPluginError, match=r"strategy='acm' is not installed. Did you mean 'acme'\?"):
        cpu(strategy="acm")
    with pytest.raises(UnknownPluginError, match="strategy='acmechip' is not installed. It is the name of an acc"):
        cpu(strategy="acmechip")


def test_uninstalled_again(packages: Use) -> None:
    """Without the package the name is unknown: nothing was written down anywhere."""
    with pytest.raises(UnknownPluginError, match="strategy='acme' is not installed"):
        cpu(strategy="acme")


# ---------------------------------------------------------------------- the broken ones


@pytest.mark.parametrize("name", SAYINGS)
def test_a_broken_strategy_names_its_package_and_the_way_out(packages: Use, name: str) -> None:
    """Asked for by name, it is one line with distribution, version, what is wrong and what to do."""
    packages("broken")
    error, said = SAYINGS[name]
    whose = re.escape(f"strategy '{name}' (plugframe-broken 0.3.0) ")
    with pytest.raises(error, match=whose + ".*" + said) as caught:
        cpu(strategy=name)
    assert "\n" not in str(caught.value)


def test_a_built_in_is_not_taken_over(packages: Use) -> None:
    """The bare name stays the built-in's; the other is there under its qualified name alone."""
    packages("broken")
    lite = cpu(strategy="ddp")
    assert (type(lite.strategy).__name__, lite.plan.choices["strategy"].qualified) == ("DDP", "plugframe:ddp")
    assert type(cpu(strategy="plugframe-broken:ddp").strategy).__name__ == "Usurper"


def test_a_broken_accelerator_under_auto_is_a_warning(packages: Use) -> None:
    """It is the most eager one, and cannot be imported: that is said, never skipped in silence."""
    packages("broken")
    said = (
        r"accelerator 'broken-chip' \(plugframe-broken 0.3.0\) is broken: .* ImportError: libchip.so.* uninstall "
        r"plugframe-broken\. It was skipped under accelerator='auto'"
    )
    with pytest.warns(PlugframeWarning, match=said):
        lite = Lite(strategy="single", devices=1)
    choice = lite.plan.choices["accelerator"]
    assert choice.entry is not None
    assert choice.entry.builtin
    assert "skipped broken-chip (broken)" in choice.reason
    assert any("broken-chip" in note for note in lite.plan.notes)
    with pytest.raises(PluginLoadError, match=r"'broken-chip' \(plugframe-broken 0.3.0\) .* libchip.so"):
        Lite(accelerator="broken-chip", devices=1)


def test_the_broken_change_nothing_for_the_others(packages: Use) -> None:
    """Whoever asks for something else by name is not even told; under auto each broken one is a warning."""
    packages("acme", "broken")
    with cpu(strategy="single") as lite:
        lite.launch()
    assert cpu(strategy="acme").plan.notes == ()
    with pytest.warns(PlugframeWarning) as caught:
        made = cpu().plan
    assert made.choices["strategy"].qualified == "plugframe:single"
    mentioned = re.findall(r"strategy '([\w-]+)' \(plugframe-broken 0\.3\.0\)", "\n".join(map(str, made.notes)))
    unloadable = [
        "broken-api",
        "broken-beside",
        "broken-exit",
        "broken-import",
        "broken-name",
        "broken-needs",
        "broken-type",
    ]
    assert sorted(mentioned) == unloadable
    assert len(caught) == len(made.notes) == len(unloadable)


def test_a_broken_package_on_the_command_line_is_one_line(packages: Use) -> None:
    """Not the user's mistake: exit code 1, one line, no traceback."""
    packages("broken")
    result = CliRunner().invoke(cli, ["run", "--strategy=broken-exit", "--accelerator=cpu", "--devices=1", __file__])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "strategy 'broken-exit' (plugframe-broken 0.3.0) is broken" in result.stderr


# ---------------------------------------------------------------------- the slow one


def test_an_implementation_is_imported_once_it_is_selected(
    packages: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asking for others touches nothing of a package; "auto" reads its descriptors; its name imports the rest."""
    packages("slow")
    trace = tmp_path / "trace"
    monkeypatch.setenv("SLOW_TRACE", str(trace))
    Registry.discover()
    cpu(strategy="single", loggers="csv")
    assert not trace.exists()
    cpu()
    assert trace.read_text() == "descriptors\n"
    with cpu(strategy="slow") as lite:
        lite.launch()
    assert trace.read_text() == "descriptors\nimplementations\n"
