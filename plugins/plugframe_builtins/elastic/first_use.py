"""Find lines of the user's code that may have initialised a device, for the error message of a refused fork.

torch has no public callback for the initialisation of a device, nor does it record the line. Its lazy calls would do,
but are private, would have to be queued when plugframe is imported, whether or not the script ever forks, and miss
everything before that. So nothing is recorded. Code that has run is parsed when forking is refused: the cells of a
notebook or the script, in order, up to the current line, and the user's functions that they call.
That finds explicit uses (``x.cuda()``, ``device="cuda"``, ``model.to(device)``); it misses uses inside
libraries, and also reports lines in branches that were not taken, beside the next ones.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

#: Functions of a device's module that do not initialise it.
_HARMLESS = re.compile(
    r"is_\w*(available|initialized)|device_count|manual_seed\w*|empty_cache|memory_\w+|max_memory_\w+|amp\..*|nvtx\..*"
)
#: Calls that take a device and do not initialise it.
_NAMING = re.compile(r"(.*\.)?(device|autocast|GradScaler|get_device_module)")
_NO_PYTHON = re.compile(r"(?m)^(\s*)[%!?].*$")
_MAX_DEPTH = 8
#: Most lines reported.
_MAX_TOLD = 3


@dataclass(frozen=True)
class _Scope:
    """A piece of code.

    Attributes:
        file: its name, for display.
        lines: of that file or cell.
        names: the namespace of its names.
        until: the last line that has run.
        devices: names bound to the device, besides those in `names`.
        depth: call depth.
    """

    file: str
    lines: list[str]
    names: Mapping[str, Any]
    until: float = float("inf")
    devices: set[str] = field(default_factory=set)
    depth: int = 0


def first_uses(device_type: str) -> list[str]:
    """Return the first few uses, such as ``train.py, line 12 (model.cuda())``: which branches ran is not known."""
    return list(islice(dict.fromkeys(_Search(device_type).uses()), _MAX_TOLD))


class _Search:
    def __init__(self, device_type: str) -> None:
        self._type = device_type
        self._frames = [each for each in reversed(inspect.stack(context=0)) if _is_users(each.filename)]
        self._running = {each.frame.f_code: each.lineno for each in self._frames}
        self._seen: set[tuple[CodeType, frozenset[str]]] = set()

    def uses(self) -> Iterator[str]:
        """Yield every use, in execution order."""
        main = sys.modules["__main__"]
        names = vars(main)
        cells = names.get("In")
        file = getattr(main, "__file__", None)
        if "IPython" in sys.modules and isinstance(cells, list):
            for number, cell in enumerate(cells):
                yield from self._in_module(
                    _Scope(f"In [{number}]", str(cell).splitlines(), names), number == len(cells) - 1
                )
        elif file is not None and _is_users(file) and os.path.isfile(file):
            with tokenize.open(file) as source:
                lines = source.read().splitlines()
            yield from self._in_module(_Scope(os.path.basename(file), lines, names), True)
        for each in self._frames:
            yield from self._in_code(each.frame.f_code, {**each.frame.f_globals, **each.frame.f_locals}, set(), 0)

    def _in_module(self, scope: _Scope, runs: bool) -> Iterator[str]:
        try:
            tree = ast.parse(_NO_PYTHON.sub(r"\1pass", "\n".join(scope.lines)))
        except SyntaxError:
            return  # a cell of another language
        if runs:
            lines = [each.lineno for each in self._frames if _is_top(each.function)]
            scope = replace(scope, until=lines[-1] if lines else scope.until)
        yield from self._in_statements(tree.body, scope)

    def _in_code(self, code: CodeType, names: Mapping[str, Any], devices: set[str], depth: int) -> Iterator[str]:
        """Search a function, once for all calls with the same arguments that stand for the device."""
        if (
            (code, frozenset(devices)) in self._seen
            or _is_top(code.co_name)
            or not _is_users(code.co_filename)
            or depth > _MAX_DEPTH
        ):
            return
        self._seen.add((code, frozenset(devices)))
        try:
            lines, first = inspect.getsourcelines(code)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError):
            return  # entered at a prompt, or a part of a line
        ast.increment_lineno(tree, first - 1)
        until = self._running.get(code, float("inf"))
        padded = [""] * (first - 1) + [line.rstrip("\n") for line in lines]
        scope = _Scope(_place(code.co_filename), padded, names, until, devices, depth)
        for function in tree.body:
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from self._in_statements(function.body, scope)

    def _in_statements(self, statements: Iterable[ast.stmt], scope: _Scope) -> Iterator[str]:
        for node in _in_order(statements):
            if node.lineno > scope.until:
                return
            if isinstance(node, ast.Assign) and self._denotes(node.value, scope):
                scope.devices.update(target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.Call):
                if self._uses(node, scope):
                    yield f"{scope.file}, line {node.lineno} ({scope.lines[node.lineno - 1].strip()})"
                yield from self._in_call(node, scope)

    def _uses(self, call: ast.Call, scope: _Scope) -> bool:
        """Return whether a call itself uses the device."""
        name = ast.unparse(call.func)
        if name.startswith(f"torch.{self._type}."):
            return not _HARMLESS.fullmatch(name.removeprefix(f"torch.{self._type}."))
        last = name.rpartition(".")[2]
        if isinstance(call.func, ast.Attribute) and last == self._type:
            return True
        if _NAMING.fullmatch(name):
            return False
        given = [word.value for word in call.keywords if word.arg in ("device", "map_location")]
        if last in ("to", "Generator", "set_default_device"):
            given += call.args
        # The user's functions are searched instead.
        return any(self._denotes(value, scope) for value in given) and self._callee(call, scope) is None

    def _in_call(self, call: ast.Call, scope: _Scope) -> Iterator[str]:
        """Search the called function if it is the user's."""
        function = self._callee(call, scope)
        if function is None:
            return
        parameters = list(inspect.signature(function).parameters)
        given = [*zip(parameters, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]
        devices = {name for name, value in given if name is not None and self._denotes(value, scope)}
        yield from self._in_code(function.__code__, function.__globals__, devices, scope.depth + 1)

    def _callee(self, call: ast.Call, scope: _Scope) -> FunctionType | None:
        found = _value(call.func, scope.names)
        if isinstance(found, type):
            found = vars(found).get("__init__")
        found = inspect.unwrap(found) if callable(found) else None
        return found if isinstance(found, FunctionType) and _is_users(found.__code__.co_filename) else None

    def _denotes(self, value: ast.expr, scope: _Scope) -> bool:
        """Return whether an expression denotes the device."""
        for node in ast.walk(value):
            if isinstance(node, ast.Constant) and self._is_device(node.value):
                return True
            if isinstance(node, ast.Name) and (node.id in scope.devices or self._is_device(scope.names.get(node.id))):
                return True
        return False

    def _is_device(self, value: Any) -> bool:
        if isinstance(value, torch.device):
            return value.type == self._type
        return isinstance(value, str) and value.partition(":")[0] == self._type


def _in_order(statements: Iterable[ast.AST]) -> Iterator[Any]:
    """Yield assignments and calls in execution order, without definitions."""
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        # Arguments of a call run before it.
        yield from _in_order(ast.iter_child_nodes(node))
        if isinstance(node, (ast.Assign, ast.Call)):
            yield node


def _value(name: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the object named by ``function``, ``module.function`` or ``Class``; None for anything else."""
    if isinstance(name, ast.Name):
        return names.get(name.id)
    if isinstance(name, ast.Attribute):
        owner = _value(name.value, names)
        return vars(owner).get(name.attr) if isinstance(owner, (ModuleType, type)) else None
    return None


def _place(file: str) -> str:
    return "a cell" if "ipykernel" in file or file.startswith("<") else os.path.basename(file)


def _is_top(name: str) -> bool:
    return name == "<module>" or name.startswith("<cell line")  # as some IPythons call it


def _is_users(file: str) -> bool:
    """Return whether a file is outside of Python, installed packages and this project."""
    others = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    others += [
        os.path.dirname(vars(sys.modules[name])["__file__"]) for name in ("plugframe", "plugframe_builtins.elastic")
    ]
    path = os.path.abspath(file)
    return not file.startswith("<frozen") and not any(path.startswith(folder + os.sep) for folder in others)
