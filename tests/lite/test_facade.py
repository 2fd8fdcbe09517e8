"""The names of the package itself."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import plugframe
from plugframe import errors


def test_every_error_is_exported() -> None:
    """Every error of plugframe can be imported from it."""
    names = [n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, (Exception, Warning))]
    assert set(names) <= set(plugframe.__all__)
    assert all(getattr(plugframe, name) is getattr(errors, name) for name in names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy facade resolves and lists its own names only."""
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        plugframe.Trainer  # noqa: B018
    assert dir(plugframe) == sorted(plugframe.__all__)


def test_importing_the_facade_imports_nothing() -> None:
    """A descriptor's module says ``from plugframe import Plugin`` and stays light: no torch, no pluggy."""
    code = "import sys; from plugframe import Plugin; print({'torch', 'pluggy', 'click'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_lite_imports_little_beside_torch() -> None:
    """Importing plugframe does not import the slow modules of torch that it does not use."""
    heavy = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo")
    code = f"""
import sys, torch
before = set(sys.modules)
from plugframe import Lite
Lite(accelerator="cpu", devices=1).teardown()
print(sorted(({set(heavy)} & set(sys.modules)) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "name"), [("context", "Context"), ("world", "World")])
def test_former_paths_of_public_names_work(module: str, name: str) -> None:
    """Names that plugins of API 1 import still work, with a warning that names the new path."""
    sys.modules.pop(f"plugframe.{module}", None)
    with pytest.warns(DeprecationWarning, match=f"use 'from plugframe import {name}'"):
        found = getattr(importlib.import_module(f"plugframe.{module}"), name)
    assert found is getattr(plugframe, name)
