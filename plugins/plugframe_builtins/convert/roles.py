"""Roles of variables: which names of a script hold models, optimizers, loaders, and so on."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from plugframe_builtins.convert.script import Scope, Script, argument, calls, code, dotted, method

LOADERS = "loaders"
MODEL, OPTIMIZER, SCHEDULER, LOADER, SAMPLER, SCALER = "model", "optimizer", "scheduler", "loader", "sampler", "scaler"
DEVICE, RANK, LOCAL_RANK, WORLD_SIZE, LITE = "device", "rank", "local_rank", "world_size", "lite"

WRAPPERS = ("DistributedDataParallel", "DataParallel", "DDP")
#: Methods of a module that return it.
_SAME = ("to", "cuda", "cpu", "train", "eval", "double", "float", "half", "requires_grad_", "apply", "share_memory")
_OPTIMIZERS = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "LBFGS", "Lion", "Adafactor", "NAdam", "RAdam")
_MODEL_MAKERS = ("torchvision.models.", "timm.create_model", "torch.hub.load", "segmentation_models_pytorch.")
_VARIABLES = {"RANK": RANK, "LOCAL_RANK": LOCAL_RANK, "WORLD_SIZE": WORLD_SIZE}
_ATTRIBUTES = {"global_rank": RANK, "local_rank": LOCAL_RANK, "world_size": WORLD_SIZE}
_CALLS = {
    "torch.distributed.get_rank": RANK,
    "torch.distributed.get_world_size": WORLD_SIZE,
    "torch.device": DEVICE,
}


class Roles:
    """The roles of the variables of a script, by scope and dotted name; parameters take those of the arguments."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.modules = script.constructors("Module")
        self.optimizers = script.constructors("Optimizer")
        self.found: dict[tuple[object, str], str] = {}
        #: Functions whose returned values are being looked at, which may call themselves.
        self._entered: list[Scope] = []
        for _ in range(4):
            before = len(self.found)
            self._assignments()
            self._arguments()
            if len(self.found) == before:
                break

    def of(self, node: cst.CSTNode | str | None, scope: Scope | None) -> str:
        """Return the role of a name in a scope, or ``""``."""
        text = node if isinstance(node, str) else dotted(node)
        while text and scope is not None:
            role = self.found.get((self._home(scope, text), text))
            if role is not None:
                return role
            if text in scope.parameters and not text.startswith("self."):
                return ""
            scope = scope.parent
        return ""

    def _home(self, scope: Scope, text: str) -> object:
        if text.startswith("self."):
            outer: Scope | None = scope
            while outer is not None:
                if outer.owner is not None:
                    return outer.owner
                outer = outer.parent
        return scope

    def set(self, scope: Scope, text: str, role: str) -> None:
        if text and role:
            self.found.setdefault((self._home(scope, text), text), role)

    def _assignments(self) -> None:
        for scope in self.script.scopes:
            for target, value, _ in assignments(scope):
                role = self.infer(value, scope)
                self.set(scope, target, role)
                if role == OPTIMIZER:
                    self._trained(value, scope)
            for each in scope.all(cst.Assign):
                goal = each.targets[0].target
                if isinstance(goal, cst.Tuple) and isinstance(each.value, cst.Call):
                    roles = self._returned(each.value)
                    names = [dotted(element.value) for element in goal.elements]
                    if len(roles) == len(names):
                        for name, role in zip(names, roles, strict=True):
                            self.set(scope, name, role)

    def _trained(self, value: cst.CSTNode, scope: Scope) -> None:
        """Note that what an optimizer takes the parameters of is a model, wherever its class is from."""
        for call in calls(value):
            found = method(call)
            if found is not None and found[1] in ("parameters", "named_parameters"):
                parts = dotted(found[0]).split(".")
                name = ".".join(parts[:2]) if parts[0] == "self" else parts[0]
                if name and name != "self" and not self.of(name, scope):
                    self.set(scope, name, MODEL)

    def _arguments(self) -> None:
        """Give parameters the roles of what they are called with."""
        for scope in self.script.scopes[1:]:
            names = scope.parameters[1:] if scope.owner is not None else scope.parameters
            for call, where in self.script.calls_of(scope):
                for index, name in enumerate(names):
                    value = argument(call, name, index)
                    if value is not None:
                        self.set(scope, name, self.infer(value, where))

    def infer(self, value: cst.CSTNode, scope: Scope) -> str:
        """Return the role of the value of an expression, or ``""``."""
        if isinstance(value, cst.Name | cst.Attribute):
            last = dotted(value).rpartition(".")[2] if isinstance(value, cst.Attribute) else ""
            return self.of(value, scope) or _ATTRIBUTES.get(last, "")
        if isinstance(value, cst.IfExp):
            texts = code(value)
            if "cuda" in texts and "cpu" in texts and "is_available" in texts:
                return DEVICE
            return self.infer(value.body, scope) or self.infer(value.orelse, scope)
        if isinstance(value, cst.Subscript):
            return LOADER if self.infer(value.value, scope) == LOADERS else ""
        if isinstance(value, cst.Dict | cst.DictComp | cst.List | cst.ListComp):
            return LOADERS if self._holds_loaders(value, scope) else ""
        environment = rank_variable(value, self.script)
        if environment:
            return environment
        return self._infer_call(value, scope) if isinstance(value, cst.Call) else ""

    def _holds_loaders(self, value: cst.Dict | cst.DictComp | cst.List | cst.ListComp, scope: Scope) -> bool:
        if isinstance(value, cst.DictComp):
            return self.infer(value.value, scope) == LOADER
        if isinstance(value, cst.ListComp):
            return self.infer(value.elt, scope) == LOADER
        return bool(value.elements) and all(self.infer(each.value, scope) == LOADER for each in value.elements)

    def _infer_call(self, value: cst.Call, scope: Scope) -> str:
        name = self.script.qualified(value.func)
        last = name.rpartition(".")[2]
        if name in _CALLS:
            return _CALLS[name]
        if (
            ".lr_scheduler." in name
            or last == "SWALR"
            or last.endswith("Scheduler")
            or (last.startswith("get_") and "schedule" in last)
        ):
            return SCHEDULER
        if name in self.optimizers or name.startswith("torch.optim.") or last in _OPTIMIZERS:
            return OPTIMIZER if last[:1].isupper() and "Averaged" not in last else ""
        if last == "DataLoader":
            return LOADER
        if last == "DistributedSampler":
            return SAMPLER
        if last == "GradScaler":
            return SCALER
        if last in WRAPPERS or name == "torch.compile":
            return MODEL if value.args else ""
        inner = method(value)
        if inner is not None and inner[1] in _SAME:
            return self.infer(inner[0], scope)
        return MODEL if self._makes_model(name, last) else next(iter(self._returned(value)), "")

    def _makes_model(self, name: str, last: str) -> bool:
        if name in self.modules or name.startswith(_MODEL_MAKERS):
            return True
        if name.startswith("torch.nn.") and name.count(".") == 2:
            return last[:1].isupper() and not last.endswith("Loss") and last != "Parameter"
        return last in ("from_pretrained", "from_config") and "Model" in name

    def _returned(self, value: cst.Call) -> list[str]:
        """Return the roles of what a function of the file returns, one for each element of a tuple."""
        scope = self.script.functions.get(dotted(value.func)) or self._method_of_model(value)
        if scope is None or scope in self._entered:
            return []
        self._entered.append(scope)
        try:
            return self._roles_returned(scope)
        finally:
            self._entered.pop()

    def _roles_returned(self, scope: Scope) -> list[str]:
        for each in scope.all(cst.Return):
            if isinstance(each.value, cst.Tuple):
                roles = [self.infer(element.value, scope) for element in each.value.elements]
            else:
                roles = [self.infer(each.value, scope)] if each.value is not None else []
            if any(roles):
                return roles
        return []

    def _method_of_model(self, value: cst.Call) -> Scope | None:
        """Return the method of a model class that a call runs: ``model.configure_optimizers()``."""
        found = method(value)
        if found is None:
            return None
        scopes = [
            scope
            for scope in self.script.scopes
            if scope.owner is not None and scope.owner.name.value in self.modules and scope.name == found[1]
        ]
        return scopes[0] if len(scopes) == 1 else None

    def models_of(self, value: cst.CSTNode, scope: Scope) -> list[str]:
        """Return the names of the models whose parameters an optimizer is built with."""
        found: list[str] = []
        for call in calls(value):
            name = method(call)
            if name is not None and name[1] in ("parameters", "named_parameters"):
                model = self._model_name(dotted(name[0]), scope)
                if model:
                    found.append(model)
        owner = method(value)
        if owner is not None and self.of(owner[0], scope) == MODEL:
            found.append(dotted(owner[0]))
        if isinstance(value, cst.Call) and not found:
            found += [name for each in value.args for name in self._parts(each.value, scope)]
        if isinstance(value, cst.Call) and not found:
            for each in value.args:
                text = dotted(each.value)
                if self.of(text, scope) == MODEL and dotted(value.func) in self.script.functions:
                    found.append(text)
                elif each.keyword is None and text and not self.of(text, scope):
                    for target, inner, _ in assignments(scope):
                        if target == text:
                            found += self.models_of(inner, scope)
        return list(dict.fromkeys(found))

    def _parts(self, node: cst.CSTNode, scope: Scope) -> list[str]:
        """Return the models of the parameters that an expression names: ``[model.weight]``."""
        if isinstance(node, cst.Attribute):
            prefixes = dotted(node).split(".")
            names = [".".join(prefixes[:end]) for end in range(len(prefixes) - 1, 0, -1)]
            return [name for name in names if self.of(name, scope) == MODEL][:1]
        return [name for child in node.children for name in self._parts(child, scope)]

    def _model_name(self, text: str, scope: Scope) -> str:
        """Return the variable of a model, from the name of a part of it."""
        parts = text.removesuffix(".module").split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if self.of(name, scope) == MODEL:
                return name
        return "" if parts[0] == "self" and len(parts) == 1 else text


def assignments(scope: Scope) -> Iterator[tuple[str, cst.BaseExpression, cst.CSTNode]]:
    """Yield dotted name, value and node of every assignment of a scope, those of tuples element by element."""
    for node in scope.nodes:
        if isinstance(node, cst.AnnAssign) and node.value is not None:
            yield dotted(node.target), node.value, node
        if not isinstance(node, cst.Assign):
            continue
        for each in node.targets:
            goal, value = each.target, node.value
            if (
                isinstance(goal, cst.Tuple)
                and isinstance(value, cst.Tuple)
                and len(goal.elements) == len(value.elements)
            ):
                for one, other in zip(goal.elements, value.elements, strict=True):
                    yield dotted(one.value), other.value, node
            elif dotted(goal):
                yield dotted(goal), value, node


def rank_variable(node: cst.CSTNode, script: Script) -> str:
    """Return the role of ``int(os.environ["RANK"])``, ``int(os.environ.get("WORLD_SIZE", 1))`` and the like."""
    if isinstance(node, cst.Call) and dotted(node.func) == "int" and len(node.args) == 1:
        node = node.args[0].value
    else:
        return ""
    key: cst.CSTNode | None = None
    if isinstance(node, cst.Subscript) and script.qualified(node.value) == "os.environ":
        index = node.slice[0].slice
        key = index.value if isinstance(index, cst.Index) else None
    elif isinstance(node, cst.Call) and script.qualified(node.func) in ("os.environ.get", "os.getenv"):
        key = node.args[0].value if node.args else None
    return _VARIABLES.get(key.value.strip("\"'"), "") if isinstance(key, cst.SimpleString) else ""
