"""A parsed training script: its scopes, imports, parents and qualified names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import libcst as cst

Node = TypeVar("Node", bound=cst.CSTNode)


@dataclass(eq=False)
class Scope:
    """A function, or the module itself. Classes, lambdas and comprehensions belong to the scope around them.

    Attributes:
        node: the definition.
        parent: the scope around it; None for the module.
        owner: the class of a method.
        nodes: all nodes of the scope but those of inner functions, in order.
    """

    node: cst.Module | cst.FunctionDef
    parent: Scope | None = None
    owner: cst.ClassDef | None = None
    nodes: list[cst.CSTNode] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.node.name.value if isinstance(self.node, cst.FunctionDef) else ""

    @property
    def parameters(self) -> list[str]:
        if isinstance(self.node, cst.Module):
            return []
        found = self.node.params
        return [each.name.value for each in (*found.posonly_params, *found.params, *found.kwonly_params)]

    def all(self, kind: type[Node]) -> list[Node]:
        """Return the nodes of a type, in the order of the file."""
        return [node for node in self.nodes if isinstance(node, kind)]


class Script:
    """A script and where everything is in it.

    Args:
        text: source of the script.

    Raises:
        libcst.ParserSyntaxError: if it is not Python.
    """

    def __init__(self, text: str) -> None:
        self.module = cst.parse_module(text)
        self.scopes: list[Scope] = []
        self.parents: dict[cst.CSTNode, cst.CSTNode] = {}
        self.scope_of: dict[cst.CSTNode, Scope] = {}
        self.classes: dict[str, cst.ClassDef] = {}
        self.functions: dict[str, Scope] = {}
        self.imports: dict[str, str] = {}
        self.names: set[str] = set()
        self._index: dict[cst.CSTNode, int] = {}
        self.module.visit(_Walker(self))

    @property
    def top(self) -> Scope:
        return self.scopes[0]

    def all(self, kind: type[Node]) -> list[tuple[Node, Scope]]:
        """Return the nodes of a type with their scopes."""
        return [(node, scope) for scope in self.scopes for node in scope.all(kind)]

    def ancestors(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """Yield the nodes around a node, innermost first."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def inside(self, node: cst.CSTNode, outer: cst.CSTNode) -> bool:
        return node is outer or any(each is outer for each in self.ancestors(node))

    def statement(self, node: cst.CSTNode) -> cst.BaseStatement | None:
        """Return the innermost statement that holds a node, in a block."""
        for each in (node, *self.ancestors(node)):
            if isinstance(each, cst.BaseStatement) and not isinstance(each, cst.BaseSuite | cst.Else):
                parent = self.parents.get(each)
                if isinstance(parent, cst.IndentedBlock | cst.Module):
                    return each
        return None

    def is_before(self, first: cst.CSTNode, second: cst.CSTNode) -> bool:
        return self._index[first] < self._index[second]

    def qualified(self, node: cst.CSTNode | None) -> str:
        """Return the full dotted name of an expression, through the imports: ``torch.nn.Linear``; or ``""``."""
        text = dotted(node)
        first, _, rest = text.partition(".")
        full = self.imports.get(first)
        if full is None:
            return text
        return f"{full}.{rest}" if rest else full

    def constructors(self, base: str) -> set[str]:
        """Return the names of the classes in this file that derive from a class whose name ends in `base`."""
        found: set[str] = set()
        before = -1
        while len(found) != before:
            before = len(found)
            for name, node in self.classes.items():
                for argument in node.bases:
                    text = self.qualified(argument.value)
                    if text.rpartition(".")[2] == base or text in found:
                        found.add(name)
        return found

    def mentions(self, name: str) -> list[cst.Name]:
        """Return where a variable of that name is, attributes and keywords of that name left out."""
        found = []
        for node, _ in self.all(cst.Name):
            parent = self.parents[node]
            attribute = isinstance(parent, cst.Attribute) and parent.attr is node
            word = isinstance(parent, cst.Arg) and parent.keyword is node
            if node.value == name and not attribute and not word:
                found.append(node)
        return found

    def calls_of(self, scope: Scope) -> list[tuple[cst.Call, Scope]]:
        """Return the direct calls of a function of the file, or of the class whose ``__init__`` it is."""
        name = scope.owner.name.value if scope.owner is not None and scope.name == "__init__" else scope.name
        if scope.owner is not None and scope.name != "__init__":
            return [
                (call, where)
                for call, where in self.all(cst.Call)
                if isinstance(call.func, cst.Attribute) and call.func.attr.value == name
            ]
        return [(call, where) for call, where in self.all(cst.Call) if dotted(call.func) == name]


class _Walker(cst.CSTVisitor):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script
        self._stack: list[cst.CSTNode] = []
        self._scopes: list[Scope] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        script = self._script
        if self._stack:
            script.parents[node] = self._stack[-1]
        script._index[node] = len(script._index)
        if self._scopes:
            self._scopes[-1].nodes.append(node)
            script.scope_of[node] = self._scopes[-1]
        if isinstance(node, cst.Name):
            script.names.add(node.value)
        if isinstance(node, cst.ClassDef):
            script.classes[node.name.value] = node
        if isinstance(node, cst.Import | cst.ImportFrom):
            script.imports.update(_imported(node))
        if isinstance(node, cst.Module | cst.FunctionDef):
            self._enter(node)
        self._stack.append(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._stack.pop()
        if isinstance(original_node, cst.Module | cst.FunctionDef):
            self._scopes.pop()

    def _enter(self, node: cst.Module | cst.FunctionDef) -> None:
        owner = None
        if len(self._stack) > 1 and isinstance(self._stack[-2], cst.ClassDef):
            owner = self._stack[-2]
        scope = Scope(node, self._scopes[-1] if self._scopes else None, owner)
        self._scopes.append(scope)
        self._script.scopes.append(scope)
        if isinstance(node, cst.FunctionDef) and owner is None:
            self._script.functions.setdefault(node.name.value, scope)


def _imported(node: cst.Import | cst.ImportFrom) -> Iterator[tuple[str, str]]:
    if isinstance(node.names, cst.ImportStar):
        return
    origin = f"{dotted(node.module)}." if isinstance(node, cst.ImportFrom) and node.module is not None else ""
    for alias in node.names:
        name = dotted(alias.name)
        if alias.asname is not None:
            yield dotted(alias.asname.name), origin + name
        elif isinstance(node, cst.ImportFrom):
            yield name, origin + name
        else:
            yield name.partition(".")[0], name.partition(".")[0]


def dotted(node: cst.CSTNode | None) -> str:
    """Return a name or a chain of attributes as text, ``""`` for any other expression."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr.value}" if before else ""
    return ""


def argument(call: cst.Call, name: str, position: int | None = None) -> cst.BaseExpression | None:
    """Return the value that a call passes for a parameter, by keyword or by position."""
    for each in call.args:
        if each.keyword is not None and each.keyword.value == name:
            return each.value
    if position is not None and position < len(call.args):
        found = call.args[position]
        if found.keyword is None and not any(each.star for each in call.args[: position + 1]):
            return found.value
    return None


def method(node: cst.CSTNode | None) -> tuple[cst.BaseExpression, str] | None:
    """Return object and name of a method call, None for anything else."""
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
        return node.func.value, node.func.attr.value
    return None


def code(node: cst.CSTNode) -> str:
    """Return the source of a node."""
    return cst.Module([]).code_for_node(node)


def calls(node: cst.CSTNode) -> list[cst.Call]:
    """Return the calls in a node, itself included."""
    return find(node, cst.Call)


def names(node: cst.CSTNode) -> list[cst.Name]:
    """Return the names in a node, those of attributes and keywords included."""
    return find(node, cst.Name)


def find(node: cst.CSTNode, kind: type[Node]) -> list[Node]:
    """Return the nodes of a type in a node, itself included, outermost first."""
    found = [node] if isinstance(node, kind) else []
    return found + [each for child in node.children for each in find(child, kind)]
