"""Tell by the source of a module's methods which of them run its submodules."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

#: A reference to a module in the source of a method, and attributes of it that are no module.
_Found = tuple[nn.Module, tuple[str, ...]]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def runs_parts(module: nn.Module, name: str) -> bool:
    """Return whether a method calls submodules with parameters, by itself or through other methods of the module.

    It is decided by the source: ``self.encoder(x)``, ``self.layers[0](x)``, ``for layer in self.layers: x = layer(x)``,
    ``self.encode(x)`` of a method that does so. A method without source, or that gets at its submodules in another way,
    is not found.
    """
    return _runs(module, name, set())


def _runs(module: nn.Module, name: str, seen: set[tuple[int, str]]) -> bool:
    if (id(module), name) in seen:
        return False
    seen.add((id(module), name))
    # Those it hides too: it may call them with super().
    functions = [vars(cls).get(name) for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    return any(_Method(module, each, seen).runs() for each in functions if isinstance(each, FunctionType))


class _Method:
    """The source of one method of a module."""

    def __init__(self, module: nn.Module, function: FunctionType, seen: set[tuple[int, str]]) -> None:
        self._module = module
        self._seen = seen
        function = inspect.unwrap(function)
        self._self = next(iter(function.__code__.co_varnames), "self")
        try:
            self._tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            self._tree = ast.Module([], [])
        #: Local names of submodules.
        self._names: dict[str, nn.Module] = {}

    def runs(self) -> bool:
        """Return whether it calls submodules with parameters."""
        for node in ast.walk(self._tree):
            self._note_names(node)
        return any(self._is_run(node) for node in ast.walk(self._tree) if isinstance(node, ast.Call))

    def _note_names(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            found = self._find(node.value)
            if found is not None and not found[1]:
                self._names |= dict.fromkeys(_targets(node.targets), found[0])
        elif isinstance(node, (ast.For, ast.comprehension)):
            for each in ast.walk(node.iter):
                found = self._find(each) if isinstance(each, ast.Attribute) else None
                if found is not None and (not found[1] or found[1] in (("children",), ("values",), ("items",))):
                    self._names |= dict.fromkeys(_targets([node.target]), found[0])

    def _is_run(self, call: ast.Call) -> bool:
        if isinstance(call.func, ast.Name) and call.func.id == self._self:
            return False  # a call of the module itself
        found = self._find(call.func)
        if found is not None:
            module, rest = found
            if not rest:
                return module is not self._module and _has_parameters(module)
            # A method of the module or of a submodule, and no attribute of what it holds.
            return len(rest) == 1 and _runs(module, rest[0], self._seen)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if "checkpoint" not in name:
            return False
        given = (self._find(argument) for argument in call.args)
        return any(each is not None and not each[1] and each[0] is not self._module for each in given)

    def _find(self, node: ast.AST) -> _Found | None:
        """Return the module that an expression is, and the attributes of it that follow; None for another object."""
        if isinstance(node, ast.Name):
            if node.id == self._self:
                return self._module, ()
            return (self._names[node.id], ()) if node.id in self._names else None
        if isinstance(node, ast.Subscript):
            found = self._find(node.value)
            # Any element stands for the container.
            return found if found is not None and not found[1] else None
        if not isinstance(node, ast.Attribute):
            return None
        found = self._find(node.value)
        if found is None:
            return None
        module, rest = found
        if rest:
            return module, (*rest, node.attr)
        # Of a container it may be an attribute of an element.
        elements = list(module.children()) if isinstance(module, _CONTAINERS) else []
        for each in (module, *elements):
            child = dict(each.named_children()).get(node.attr)
            if child is not None:
                return child, ()
        owner = next((each for each in elements if hasattr(type(each), node.attr)), module)
        return (module if hasattr(nn.Module, node.attr) else owner), (node.attr,)


def _targets(targets: list[ast.expr]) -> Iterator[str]:
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
