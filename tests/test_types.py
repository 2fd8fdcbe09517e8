"""The types of what a user calls; what mypy and pyright make of them is in tests/typing."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path

import pytest

from plugframe import Lite
from plugframe.core.config.request import FIELDS
from plugframe.lite import lite as module

ROOT = Path(__file__).parent.parent
#: Where an object may be any: what `load` and `state_dict` hold, a plugin's own methods, and nested data of any kind.
MOST = 8


def methods() -> list[ast.FunctionDef]:
    """Return the public methods of `Lite` and its constructor, overloads included."""
    tree = ast.parse(inspect.getsource(module))
    [cls] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if node.name == "__init__" or not node.name.startswith("_")]


def annotations(method: ast.FunctionDef) -> list[ast.expr]:
    """Return the annotations of a method, that of what it returns included."""
    given = method.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each for each in (*(a.annotation for a in arguments if a is not None), method.returns) if each is not None]


def test_any_is_rare() -> None:
    """`Any` tells a checker and an editor nothing: it stands only where any object is meant."""
    found = [
        f"{method.name}: {ast.unparse(annotation)}"
        for method in methods()
        for annotation in annotations(method)
        for node in ast.walk(annotation)
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert len(found) <= MOST, "\n".join(found)


def test_every_argument_has_a_type() -> None:
    """Arguments, and what is returned, have annotations, in every overload."""
    for method in methods():
        given = method.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [each.arg for each in arguments if each is not None and each.annotation is None]
        assert bare in (["self"], []), f"{method.name}: {bare}"
        assert method.returns is not None, method.name


def test_a_method_is_a_docstring_and_a_call() -> None:
    """What a public method does is in a function beside the class: the class is read for what there is."""
    spared = {"__init__", "teardown"}  # the settings, and the counterpart of _started
    for method in methods():
        overload = "overload" in map(ast.unparse, method.decorator_list)
        if overload or method.name in spared:
            continue
        assert ast.get_docstring(method), method.name
        assert len(method.body) == 2, method.name


def test_editors_know_the_names_of_today() -> None:
    """The names that editors complete are those of the entry points."""
    script = ROOT / ".ci" / "names.py"
    if not script.exists():
        pytest.skip("the script that writes them is in a checkout alone")
    written = (ROOT / "plugframe" / "lite" / "_names.py").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(script))["text"](), "run python .ci/names.py"


def test_every_setting_is_an_argument() -> None:
    """The constructor takes what a settings file may hold."""
    assert set(FIELDS) == set(inspect.signature(Lite).parameters)
