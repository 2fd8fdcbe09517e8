"""The laws about the code itself: the core names no plugin, plugins use what is public, nothing is without effect."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest

import plugframe
import plugframe.base
from paths import ROOT
from plugframe import Plugin
from plugframe.core.config.request import FIELDS
from plugframe.core.registry.registry import Registry
from plugframe.hooks import KINDS

CORE = ROOT / "plugframe"
PLUGINS = ROOT / "plugins" / "plugframe_builtins"

#: Built-in names that are words of the language, of Python or of torch as well, so that the core may say them.
COMMON = {
    "16",
    "32",
    "64",
    "context",
    "cpu",
    "throughput",
    "torch",
    "single",
    "local",
    "manual",
    "profiler",
    "fork",
    "spawn",
    "elastic",
    "remote",
}

#: What only a plugin may know: makers, kinds of devices, libraries of communication and of training.
OTHERS = {
    *("nvidia", "amd", "intel", "rocm", "hip", "habana", "neuron", "tpu", "xla", "xpu", "hpu", "npu", "mlu", "musa"),
    *("nccl", "gloo", "xccl", "hccl", "ucc", "rccl", "torchrun", "kubernetes", "horovod", "pbs"),
    *("fsdp", "fsdp2", "zero1", "zero2", "zero3", "deepspeed", "megatron", "apex", "float16", "bfloat16", "fp8"),
    *("wandb", "mlflow", "comet"),
}

#: What a plugin may import of plugframe, and packages in which every module is public.
PUBLIC = ("plugframe", "plugframe.errors")
PACKAGES = ("plugframe.base", "plugframe.hooks", "plugframe.utils", "plugframe.deferred", "plugframe.diagnostics")
TOOLS = ("plugframe.launch", "plugframe.checkpoint")


@functools.cache
def trees(folder: Path) -> list[tuple[Path, ast.Module]]:
    """Return every module under a folder, parsed."""
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("*.py"))]


def told(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes whose text is for people: docstrings, help, and what errors and warnings say."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg in ("help", "epilog"):
            found.update(map(id, ast.walk(node.value)))
        elif isinstance(node, ast.Call) and re.search(r"(Error|Warning|\bwarn|\bwarn_caller)$", ast.unparse(node.func)):
            found.update(id(part) for argument in node.args for part in ast.walk(argument))
    return found


def names_in(tree: ast.Module, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string, attribute and import that `pattern` finds, outside of what is told."""
    spared = told(tree)
    for node in ast.walk(tree):
        texts: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spared:
            texts = [node.value]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            texts = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        for text in texts:
            if pattern.search(text):
                yield getattr(node, "lineno", 0), text


def words(*given: str, flags: int = 0) -> re.Pattern[str]:
    """Return what finds one of the words, as a word."""
    longest_first = "|".join(re.escape(word) for word in sorted(given, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])({longest_first})(?![A-Za-z0-9])", flags)


def built_in_names() -> set[str]:
    """Return every name plugframe's own distribution publishes, and the package in which these plugins lie."""
    points = [p for p in metadata.distribution("plugframe").entry_points if p.group.startswith("plugframe.")]
    plugins = [p for p in points if p.group != "plugframe.command"]
    return {p.name for p in plugins} | {p.module.partition(".")[0] for p in plugins}


# ---------------------------------------------------------------------- law 1

TESTING = CORE / "testing"

#: What editors complete: nothing imports it while a script runs, and so nothing is decided by it.
FOR_EDITORS = CORE / "lite" / "_names.py"


def test_the_core_names_no_plugin() -> None:
    """No string, attribute or import of the core names a built-in plugin, a device's maker or a backend (law 1)."""
    own, others = words(*(built_in_names() - COMMON)), words(*OTHERS, flags=re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:80]!r}"
        for path, tree in trees(CORE)
        if path != FOR_EDITORS
        # What is for tests alone simulates devices and schedulers: it speaks of those, not of plugins.
        for pattern in ((own,) if TESTING in path.parents else (own, others))
        for line, text in names_in(tree, pattern)
    ]
    assert not found, "the core names a plugin:\n" + "\n".join(found)


def test_the_names_for_editors_are_not_imported() -> None:
    """What is spared by the law about names is there for type checkers alone (law 1)."""
    code = "import sys; from plugframe import Lite; Lite().teardown(); print('plugframe.lite._names' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ('if name == "ddp": pass', True),
        ('x = f"{y}_ddp"', True),
        ("torch.cuda.synchronize()", True),
        ("from plugframe_builtins import ddp", True),
        ('frames = ("plugframe_builtins", "pluggy")', True),
        ('backend = "cpu:gloo,cuda:NCCL"', True),
        ('"""About ddp."""', False),
        ('option("--strategy", help="auto, ddp")', False),
        ("raise SettingError(\"use strategy='ddp'\")", False),
        ('x = "added"', False),
        ('x = "torch"', False),
    ],
)
def test_the_scan_sees_what_it_must(code: str, caught: bool) -> None:
    """The scan finds a name wherever it decides something, and spares what is for people."""
    tree = ast.parse(code)
    pattern = words(*(built_in_names() - COMMON), *OTHERS, flags=re.IGNORECASE)
    assert bool(list(names_in(tree, pattern))) == caught


def test_the_core_asks_no_plugin_for_its_class() -> None:
    """No isinstance or issubclass of the core is about a plugin's class, a base's included (law 1)."""
    registry = Registry.discover()
    descriptors = [registry.describe(entry) for entry in registry.entries() if entry.builtin]
    classes = {descriptor.factory.rpartition(":")[2] for descriptor in descriptors} | set(plugframe.base.__all__)
    found = []
    for path, tree in trees(CORE):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                asked |= {part.attr for part in ast.walk(node.args[1]) if isinstance(part, ast.Attribute)}
                if asked & classes:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------- law 2


def test_the_import_contracts_are_kept() -> None:
    """The core never imports a built-in, and the contract nothing of the machinery (law 2)."""
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_a_built_in_uses_only_what_a_third_party_can() -> None:
    """Built-ins import public modules and public names of plugframe alone (law 2)."""
    found = []
    for path, tree in trees(PLUGINS):
        for node in ast.walk(tree):
            imported: list[tuple[str, str]] = []
            if isinstance(node, ast.Import):
                imported = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [(node.module or "", alias.name) for alias in node.names]
            for module, name in imported:
                if module.split(".")[0] == "plugframe" and not _public(module, name):
                    found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {module} {name}")
    assert not found, "\n".join(found)


def _public(module: str, name: str) -> bool:
    if any(part.startswith("_") for part in (*module.split("."), name)):
        return False
    if module in (*PUBLIC, *PACKAGES, *TOOLS):
        exported = getattr(importlib.import_module(module), "__all__", None)
        return exported is None or name in exported
    return module.startswith(tuple(f"{package}." for package in PACKAGES))


def test_descriptors_are_light() -> None:
    """A built-in's descriptor module imports nothing but the descriptor, in at most a screenful (law 2)."""
    registry = Registry.discover()
    modules = {entry.value.partition(":")[0] for entry in registry.entries() if entry.builtin}
    for name in sorted(modules):
        path = PLUGINS.parent / Path(*name.split("."), "__init__.py")
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 32, f"{path} has {len(lines)} lines: a descriptor is about 20"
        _check_light(path, lines, "__future__", "plugframe")


def _check_light(path: Path, lines: list[str], *allowed: str) -> None:
    for node in ast.walk(ast.parse("\n".join(lines))):
        assert not isinstance(node, ast.Import), f"{path}: {ast.unparse(node)}"
        if not isinstance(node, ast.ImportFrom) or node.module in allowed:
            continue
        # Declared options may lie beside the descriptor, as light as it is.
        assert [name.name for name in node.names] == ["OPTIONS"], f"{path}: {ast.unparse(node)}"
        beside = PLUGINS.parent / Path(*str(node.module).split(".")).with_suffix(".py")
        _check_light(beside, beside.read_text(encoding="utf-8").splitlines(), *allowed)


# ---------------------------------------------------------------------- law 10


def attributes_read(*folders: Path) -> set[str]:
    """Return the name of every attribute that any module of the folders reads, and every string it holds."""
    found: set[str] = set()
    for folder in folders:
        for path, tree in trees(folder):
            if path.name in ("descriptor.py", "request.py"):
                continue  # where what is looked for is defined
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_every_key_of_a_descriptor_has_an_effect() -> None:
    """What a plugin says of itself is read by the core (law 10)."""
    read = attributes_read(CORE) | {"for_options"}  # read by Plugin.with_options, which the core calls
    assert "with_options" in read
    assert [field.name for field in fields(Plugin) if field.name not in read] == []


def test_every_setting_has_an_effect() -> None:
    """What can be asked for is read by the core (law 10)."""
    read = attributes_read(CORE)
    kinds = set(KINDS)  # the settings that name a plugin are looped over
    assert [field for field in FIELDS if field not in read | kinds] == []


#: Hooks for extensions and strategies of others: nothing that comes with plugframe calls them.
FOR_OTHERS = {"accelerator_memory_stats", "collective_new_group", "precision_dtypes"}


def test_every_hook_is_called() -> None:
    """Every hook is called (law 10) and has a docstring."""
    read = attributes_read(CORE, PLUGINS)
    looped = {f"{kind}_{step}" for kind in KINDS for step in ("setup", "teardown", "state", "load_state")}
    hooks = {name: getattr(kind.spec, name) for kind in KINDS.values() for name in kind.hooks}
    assert {name for name in hooks if name not in read | looped} <= FOR_OTHERS
    assert [name for name, hook in hooks.items() if not (hook.__doc__ or "").strip()] == []
