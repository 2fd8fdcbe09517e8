"""What the rules of one conversion share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import libcst as cst

from plugframe_builtins.convert.edits import Edits
from plugframe_builtins.convert.roles import LITE, LOADER, MODEL, OPTIMIZER, Roles, assignments
from plugframe_builtins.convert.script import Scope, Script, calls, code, dotted, method


@dataclass(eq=False)
class Conversion:
    """A script, the roles of its variables, and the edits collected so far.

    Attributes:
        lite: the name of the `Lite` object in the script.
        distributed: whether the script ran on several ranks before, so that its batch sizes are those of one rank.
        raw: whether its loop is plain PyTorch; else the calls of another library.
        precision: source of the argument ``precision``, if the script has one of its own.
        launches: whether the script started its ranks itself.
        trains: whether a model is set up, or a backward found.
        reduced: variables that are reduced after the loop that adds to them.
    """

    script: Script
    lite: str = "lite"
    distributed: bool = False
    raw: bool = True
    precision: str = ""
    launches: bool = False
    trains: bool = False
    reduced: set[tuple[Scope, str]] = field(default_factory=set)
    roles: Roles = field(init=False)
    edits: Edits = field(init=False)

    def __post_init__(self) -> None:
        self.roles = Roles(self.script)
        self.edits = Edits(self.script)

    def is_loader(self, node: cst.CSTNode, scope: Scope) -> bool:
        return self.roles.infer(node, scope) == LOADER

    def loops_over_loader(self, node: cst.CSTNode, scope: Scope) -> bool:
        """Return whether a node is a loop over a loader: by ``for``, through ``enumerate``, or ``next``."""
        if isinstance(node, cst.For) and self._reads_loader(node.iter, scope):
            return True
        return isinstance(node, cst.For | cst.While) and any(
            dotted(call.func) == "next" and call.args and self._reads_loader(call.args[0].value, scope)
            for call in scope.all(cst.Call)
            if self.script.inside(call, node.body)
        )

    def _reads_loader(self, node: cst.CSTNode, scope: Scope, depth: int = 0) -> bool:
        if self.is_loader(node, scope):
            return True
        if isinstance(node, cst.Call):
            return any(self._reads_loader(each.value, scope, depth) for each in node.args)
        if isinstance(node, cst.Name) and depth < 4:
            values = [value for target, value, _ in assignments(scope) if target == node.value]
            return any(isinstance(value, cst.Call) and self._reads_loader(value, scope, depth + 1) for value in values)
        return False

    def loader_loop(self, node: cst.CSTNode) -> cst.For | cst.While | None:
        """Return the innermost loop over a loader around a node, in the node's scope."""
        scope = self.script.scope_of[node]
        for each in self.script.ancestors(node):
            if each is scope.node:
                return None
            if isinstance(each, cst.For | cst.While) and self.loops_over_loader(each, scope):
                return each
        return None

    def reads_batches(self, node: cst.CSTNode, seen: tuple[Scope, ...] = ()) -> bool:
        """Return whether a node runs once for each batch of a loader, in this scope or in those that call it."""
        if self.loader_loop(node) is not None:
            return True
        scope = self.script.scope_of[node]
        if scope.parent is None or scope in seen:
            return False
        if scope.name == "closure":
            return self.reads_batches(scope.node, (*seen, scope))
        return any(self.reads_batches(call, (*seen, scope)) for call, _ in self.script.calls_of(scope))

    def steps_in(self, loop: cst.For | cst.While) -> bool:
        """Return whether a loop trains: whether it computes gradients or steps, functions of the file included."""

        def has_step(node: cst.CSTNode, depth: int = 0) -> bool:
            for call in calls(node):
                found = method(call)
                if found is not None and found[1] in ("backward", "step"):
                    return True
                scope = self.called(call)
                if scope is not None and depth < 4 and has_step(scope.node, depth + 1):
                    return True
            return False

        return has_step(loop.body)

    def without_gradients(self, node: cst.CSTNode) -> bool:
        """Return whether a node is evaluated under ``no_grad``, as far as its function shows."""
        for each in self.script.ancestors(node):
            if isinstance(each, cst.With) and any(
                "no_grad" in code(i) or "inference_mode" in code(i) for i in each.items
            ):
                return True
            if isinstance(each, cst.FunctionDef):
                return any("no_grad" in code(d) or "inference_mode" in code(d) for d in each.decorators)
        return False

    def optimizers_of(self, model: str, scope: Scope) -> list[str]:
        """Return the optimizers of a model that a scope can name, by where they are built."""
        found: list[str] = []
        place: Scope | None = scope
        while place is not None:
            for target, value, _ in assignments(place):
                if self.roles.infer(value, place) == OPTIMIZER and model in self.roles.models_of(value, place):
                    found.append(target)
            place = place.parent
        if not found:
            found = [name for name in scope.parameters if self.roles.of(name, scope) == OPTIMIZER]
            models = [name for name in scope.parameters if self.roles.of(name, scope) == MODEL]
            if len(models) != 1:
                return []
        return list(dict.fromkeys(found))

    def is_lite(self, node: cst.CSTNode, scope: Scope) -> bool:
        return self.roles.of(node, scope) == LITE or dotted(node) == self.lite

    def reduction(self, node: cst.CSTNode, scope: Scope, depth: int = 0) -> str:
        """Return what a value of a batch is: ``"mean"``, ``"sum"``, ``"size"``, ``"number"``, ``"ratio"`` or ``""``."""
        if depth > 8:
            return ""
        if isinstance(node, cst.Integer | cst.Float):
            return "number"
        if isinstance(node, cst.BinaryOperation):
            return self._combined(node, scope, depth)
        if isinstance(node, cst.Call):
            return self._reduction_of_call(node, scope, depth)
        if isinstance(node, cst.Attribute) and node.attr.value == "data":
            return self.reduction(node.value, scope, depth + 1)
        if (
            isinstance(node, cst.Subscript)
            and isinstance(node.value, cst.Attribute)
            and node.value.attr.value == "shape"
        ):
            return "size"
        if isinstance(node, cst.Name):
            values = [value for target, value, _ in assignments(scope) if target == node.value]
            own = re.compile(rf"\b{re.escape(node.value)}\b")
            kinds = {self.reduction(value, scope, depth + 1) for value in values if not own.search(code(value))}
            return kinds.pop() if len(kinds) == 1 else ""
        return ""

    def _combined(self, node: cst.BinaryOperation, scope: Scope, depth: int) -> str:
        left, right = (self.reduction(each, scope, depth + 1) for each in (node.left, node.right))
        if isinstance(node.operator, cst.Add | cst.Subtract):
            return left if left == right or right in ("number", "") else right if left in ("number", "") else "ratio"
        if isinstance(node.operator, cst.Multiply):
            if {left, right} == {"mean", "size"}:
                return "sum"
            return left if right in ("number", "") else right if left in ("number", "") else ""
        if isinstance(node.operator, cst.Divide):
            if left == "sum":
                return {"size": "mean", "sum": "ratio", "number": "sum"}.get(right, "ratio")
            return left if right in ("number", "") else ""
        return ""

    def _reduction_of_call(self, node: cst.Call, scope: Scope, depth: int) -> str:
        name = self.script.qualified(node.func)
        if any(each.keyword is not None and each.keyword.value == "reduction" for each in node.args):
            text = code(node)
            return "sum" if '"sum"' in text or "'sum'" in text else "mean" if "mean" in text else ""
        if name.startswith("torch.nn.functional.") and ("loss" in name or "entropy" in name):
            return "mean"
        if name in ("torch.mean", "torch.sum"):
            return name.removeprefix("torch.") if len(node.args) == 1 else ""
        if name in ("len", "float", "int"):
            return (
                "size" if name == "len" else self.reduction(node.args[0].value, scope, depth + 1) if node.args else ""
            )
        function = self.called(node)
        if function is not None:
            returned = [each.value for each in function.all(cst.Return) if each.value is not None]
            return self._returned(returned[0], function, depth) if len(returned) == 1 else ""
        inner = method(node)
        if inner is not None:
            if inner[1] in ("item", "detach", "cpu", "float", "double", "clone"):
                return self.reduction(inner[0], scope, depth + 1)
            if inner[1] in ("mean", "sum") and not node.args:
                return inner[1]
            if inner[1] in ("size", "numel"):
                return "size"
        return self._criterion(node.func, scope)

    def called(self, node: cst.Call) -> Scope | None:
        """Return the function or method of the file that a call runs."""
        inner = method(node)
        if inner is None:
            return self.script.functions.get(dotted(node.func))
        if dotted(inner[0]) != "self":
            return None
        found = [scope for scope in self.script.scopes if scope.owner is not None and scope.name == inner[1]]
        return found[0] if len(found) == 1 else None

    def _returned(self, value: cst.BaseExpression, scope: Scope, depth: int) -> str:
        """Return what a function that is called for each batch returns; a loss is a mean."""
        kind = self.reduction(value, scope, depth + 1)
        return kind or ("mean" if self.is_loss(base(value), scope) else "")

    def is_loss(self, name: str, scope: Scope) -> bool:
        """Return whether gradients of a variable are computed in a scope."""
        word = re.compile(rf"\b{re.escape(name)}\b")
        for call in scope.all(cst.Call) if name else ():
            found = method(call)
            if found is None or found[1] != "backward":
                continue
            if word.search(code(found[0])) or (call.args and dotted(call.args[0].value) == name):
                return True
        return False

    def _criterion(self, function: cst.BaseExpression, scope: Scope) -> str:
        """Return the reduction of a loss object such as ``nn.CrossEntropyLoss()``."""
        place: Scope | None = scope
        while place is not None:
            for target, value, _ in assignments(place):
                name = self.script.qualified(value.func) if isinstance(value, cst.Call) else ""
                if target == dotted(function) and name.startswith("torch.nn.") and name.endswith("Loss"):
                    text = code(value)
                    if "reduction" not in text:
                        return "mean"
                    return "sum" if "sum" in text else "mean" if "mean" in text else ""
            place = place.parent
        if dotted(function) in scope.parameters:
            for call, where in self.script.calls_of(scope):
                names = scope.parameters[1:] if scope.owner is not None else scope.parameters
                index = names.index(dotted(function)) if dotted(function) in names else -1
                if 0 <= index < len(call.args):
                    return self._criterion(call.args[index].value, where) if where is not scope else ""
        return ""


def base(node: cst.CSTNode) -> str:
    """Return the variable of ``loss.item()``, ``float(loss)`` and the like."""
    found = method(node)
    if found is not None and found[1] in ("item", "detach", "cpu"):
        return base(found[0])
    if isinstance(node, cst.Call) and dotted(node.func) == "float" and node.args:
        return base(node.args[0].value)
    return node.value if isinstance(node, cst.Name) else ""
