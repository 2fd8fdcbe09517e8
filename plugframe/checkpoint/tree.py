"""A state tree as named tensors plus a JSON-able structure, and back.

In the structure None, bool, str, list and ordinary int and float stand for themselves; all else is an object
with one key, its tag: ``{"tensor": "model.weight"}``, ``{"dict": {…}}``, ``{"tuple": […]}``. So no string and no
key of the user's can be mistaken for a tag.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from plugframe._printable import printable_cause
from plugframe.checkpoint import strict_json
from plugframe.checkpoint.stored import StoredTensor, Viewed, viewed
from plugframe.checkpoint.unsupported import describe, refuse, refuse_tensor
from plugframe.checkpoint.values import (
    MAX_INT_BITS,
    dtype_name,
    dtype_of,
    encode_scalar,
    from_numpy,
    is_numpy,
    large_int,
    special_float,
)
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe.utils.shards import is_shard, local_of, view_locally

#: Deeper trees are refused: the JSON parser's own recursion limit is not far beyond.
MAX_DEPTH = 100
#: A tensor may be in a state this often; more is no state, but a file that unfolds to more than any memory.
MAX_REFERENCES = 50_000


def split(
    state: Mapping[str, Any],
    *,
    dtypes: Collection[torch.dtype] | None = None,
    where: str = "the checkpoint",
    sharded: bool = False,
    aliases: bool = True,
) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of `state` by name, and a JSON-able structure that names them.

    Subclasses of plain types become those types, numpy scalars the equal plain value, numpy arrays tensors;
    a tensor that occurs twice (same memory, shape and strides) is listed once. The tensors are detached views:
    on their own device, strided as they were, never complex.

    Args:
        state: the tree; see `CheckpointSpec`.
        dtypes: what the format can hold; other one-byte types are listed as uint8. None means any.
        where: what the error names, usually the path.
        sharded: whether tensors may be a ``DTensor``, of which this rank has a part. They are listed as such.
        aliases: whether a ``DTensor`` that occurs twice is found out. A rank with an empty part cannot tell.

    Raises:
        CheckpointError: naming every entry that cannot be saved, with its type and what to save instead.
    """
    splitter = _Splitter(dtypes, sharded=sharded, aliases=aliases, stored=False)
    structure = splitter.run(state, where)
    tensors: dict[str, Tensor] = {n: t for n, t in splitter.tensors.items() if not isinstance(t, StoredTensor)}
    return tensors, structure


def split_stored(
    state: Mapping[str, Any],
    *,
    dtypes: Collection[torch.dtype] | None = None,
    where: str = "the checkpoint",
    sharded: bool = False,
    aliases: bool = True,
) -> tuple[dict[str, Tensor | StoredTensor], Any]:
    """Do what `split` does with a state whose tensors may yet lie in a checkpoint; they stay there."""
    splitter = _Splitter(dtypes, sharded=sharded, aliases=aliases, stored=True)
    structure = splitter.run(state, where)
    return splitter.tensors, structure


def join(tensors: Mapping[str, Tensor | StoredTensor], structure: Any, *, where: str = "the checkpoint") -> Any:
    """Return the tree that `split` took apart; its tensors may yet lie in the checkpoint.

    Raises:
        CheckpointCorruptError: if the structure is none, or does not fit the tensors.
    """
    joiner = _Joiner(tensors)
    try:
        state = joiner.decode(structure, 0)
    except Exception as error:  # noqa: BLE001 whatever a value in the place of another leads to
        raise CheckpointCorruptError(
            f"{where}: its structure is not what was written: {str(error)[:200]}."
        ) from printable_cause(error)
    unused = [name for name in tensors if name not in joiner.used]
    if unused:
        raise CheckpointCorruptError(f"{where}: tensor {unused[0]!r} is not part of its structure.")
    return state


def dump_structure(structure: Any) -> bytes:
    """Return a structure as JSON."""
    text = json.dumps(structure, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate is a legal str in Python; this way it comes back as it was.
    return text.encode("utf-8", "surrogatepass")


def parse_structure(data: bytes) -> Any:
    """Return what `dump_structure` wrote.

    Raises:
        ValueError: if `data` is no JSON, names a key twice, or is nested beyond measure.
    """
    return strict_json.parse(data)


class _Splitter:
    def __init__(self, dtypes: Collection[torch.dtype] | None, *, sharded: bool, aliases: bool, stored: bool) -> None:
        self.tensors: dict[str, Tensor | StoredTensor] = {}
        self.problems: list[str] = []
        self._dtypes = dtypes
        self._sharded = sharded
        self._aliases = aliases
        self._stored = stored
        self._nodes: dict[Any, tuple[Any, Any]] = {}
        self._num_references: Counter[Any] = Counter()
        self._open: set[int] = set()

    def run(self, state: Any, where: str) -> Any:
        if not isinstance(state, Mapping):
            raise CheckpointError(f"cannot save {where}, nothing was written: {refuse(state, 'state')}.")
        structure = self.encode(state, ())
        if self.problems:
            raise CheckpointError(f"cannot save {where}, nothing was written: {'; '.join(self.problems)}.")
        return structure

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and int.bit_length(value) > MAX_INT_BITS:
            return self._problem(f"{_spell(path)} is an integer of {int.bit_length(value)} bits: save it as a tensor")
        if isinstance(value, (str, int, float, complex, bytes)):
            return encode_scalar(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, (Mapping, list, tuple)):
            return self._container(value, path)
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if self._stored and isinstance(value, StoredTensor):
            return self._stored_tensor(value, path)
        return self._numpy(value, path)

    def _container(self, value: Any, path: tuple[Any, ...]) -> Any:
        if id(value) in self._open:
            return self._problem(f"{_spell(path)} contains itself: a state must be a tree")
        if len(path) > MAX_DEPTH:
            return self._problem(f"{_spell(path[:3])}… is nested more than {MAX_DEPTH} deep: flatten it")
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self._mapping(value, path)
            items = [self.encode(item, (*path, index)) for index, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        items: list[list[Any]] = []
        for key, item in value.items():
            if is_numpy(key, "integer"):
                key = int(key)
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                self._problem(f"{_spell(path)} has the key {key!r}, {describe(key)}: keys must be str or int")
                continue
            items.append([encode_scalar(key), self.encode(item, (*path, key))])
        if isinstance(value, Counter):
            # MultiStepLR keeps one in its state, and needs one back.
            return {"counter": items}
        return {"dict": dict(items)} if all(type(key) is str for key, _ in items) else {"items": items}

    def _numpy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if is_numpy(value, "generic"):
            item = value.item()
            if type(item) in (bool, int, float, complex):
                return item if isinstance(item, bool) else encode_scalar(item)
        elif is_numpy(value, "ndarray"):
            tensor = from_numpy(value)
            if tensor is not None:
                return self._tensor(tensor, path)
            name = _spell(path)
            return self._problem(f"{name} is {describe(value)} of {value.dtype}: save {name}.tolist() instead")
        return self._problem(refuse(value, _spell(path)))

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Any:
        problem = refuse_tensor(value, _spell(path), sharded=self._sharded)
        if problem:
            return self._problem(problem)
        identity = _identity(value) if self._aliases or not is_shard(value) else id(value)
        if identity not in self._nodes:
            # The value is kept with its node: its address tells it from others only while it lives.
            self._nodes[identity] = (value, self._store(value.detach(), path))
        return self._refer(identity, path)

    def _store(self, plain: Tensor, path: tuple[Any, ...]) -> Any:
        name = self._name(path)
        plain = view_locally(plain, lambda part: part.resolve_conj().resolve_neg())
        if plain.is_complex():
            self.tensors[name] = view_locally(plain, torch.view_as_real)
            return {"complex_tensor": name}
        if self._dtypes is None or plain.dtype in self._dtypes:
            self.tensors[name] = plain
            return {"tensor": name}
        try:
            self.tensors[name] = view_locally(plain, _as_uint8)
        except (RuntimeError, ValueError):
            return self._problem(f"{_spell(path)} is a tensor of {plain.dtype}, which this format cannot hold")
        return {"bits": [dtype_name(plain.dtype), name]}

    def _stored_tensor(self, value: StoredTensor, path: tuple[Any, ...]) -> Any:
        base = value.source.base if isinstance(value.source, Viewed) else value
        identity = (id(base.source), base.name, value.dtype)
        if identity not in self._nodes:
            name = self._name(path)
            self.tensors[name] = base
            node = {"complex_tensor": name} if value.dtype.is_complex else {"bits": [dtype_name(value.dtype), name]}
            self._nodes[identity] = (value, {"tensor": name} if base is value else node)
        return self._refer(identity, path)

    def _refer(self, identity: Any, path: tuple[Any, ...]) -> Any:
        self._num_references[identity] += 1
        if self._num_references[identity] == MAX_REFERENCES + 1:
            return self._problem(f"{_spell(path)} is the same tensor for the {MAX_REFERENCES + 1}th time: save it once")
        return self._nodes[identity][1]

    def _name(self, path: tuple[Any, ...]) -> str:
        # "a.b" may be one key or two; the structure knows, the name need only be readable and free.
        name = ".".join(str(key) for key in path).encode("utf-8", "backslashreplace").decode()
        if not name or name.startswith("__"):
            name = f"state.{name}"
        unique, number = name, 1
        while unique in self.tensors:
            number += 1
            unique = f"{name}#{number}"
        return unique

    def _problem(self, text: str) -> Any:
        self.problems.append(text)
        return None


class _Joiner:
    def __init__(self, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        self.used: Counter[str] = Counter()
        self._tensors = tensors
        self._made: dict[tuple[str, str], Tensor | StoredTensor] = {}
        self._tags: dict[str, Callable[[Any, int], Any]] = {
            "dict": lambda body, depth: {key: self.decode(item, depth) for key, item in body.items()},
            "items": self._items,
            "counter": lambda body, depth: Counter(self._items(body, depth)),
            "tuple": lambda body, depth: tuple([self.decode(item, depth) for item in body]),
            "tensor": lambda body, _: self._tensor(body, "tensor", lambda tensor: tensor),
            "complex_tensor": lambda body, _: self._tensor(body, "complex", _as_complex),
            "bits": lambda body, _: self._bits(*body),
            "float": lambda body, _: special_float(body),
            "complex": lambda body, depth: complex(*[self.decode(item, depth) for item in body]),
            "int": lambda body, _: large_int(body),
            "bytes": lambda body, _: base64.b64decode(body, validate=True),
            "dtype": lambda body, _: dtype_of(body),
        }

    def decode(self, node: Any, depth: int) -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if depth > MAX_DEPTH + 3:
            raise ValueError("it is nested too deeply")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict) or len(node) != 1 or (tag := next(iter(node))) not in self._tags:
            raise ValueError(f"unknown entry {str(node)[:60]}")
        return self._tags[tag](node[tag], depth + 1)

    def _items(self, body: Any, depth: int) -> dict[Any, Any]:
        items = [(self.decode(key, depth), self.decode(item, depth)) for key, item in body]
        found = dict(items)
        if len(found) != len(items) or any(isinstance(key, bool) or not isinstance(key, (str, int)) for key in found):
            raise ValueError("a dict has a key twice, or one that is neither str nor int")
        return found

    def _bits(self, dtype: Any, name: Any) -> Tensor | StoredTensor:
        wanted = dtype_of(dtype)
        return self._tensor(
            name,
            str(dtype),
            lambda tensor: viewed(tensor, wanted) if isinstance(tensor, StoredTensor) else tensor.view(wanted),
        )

    def _tensor(
        self, name: Any, kind: str, make: Callable[[Tensor | StoredTensor], Tensor | StoredTensor]
    ) -> Tensor | StoredTensor:
        if name not in self._tensors:
            raise ValueError(f"tensor {name!r} is missing")
        self.used[name] += 1
        if self.used[name] > MAX_REFERENCES:
            raise ValueError(f"tensor {name!r} is named more than {MAX_REFERENCES} times")
        if (kind, name) not in self._made:
            self._made[kind, name] = make(self._tensors[name])
        return self._made[kind, name]


def _as_complex(tensor: Tensor | StoredTensor) -> Tensor | StoredTensor:
    if isinstance(tensor, StoredTensor):
        return viewed(tensor, tensor.dtype.to_complex())
    return torch.view_as_complex(tensor)


def _spell(path: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)


def _identity(value: Tensor) -> Any:
    """Return a key that two tensors share if they are the same values in the same memory."""
    if is_shard(value):
        part = _identity(local_of(value.detach()))
        # The part may be a passing object, whose number tells nothing.
        return (part, value.shape, value.device_mesh, value.placements) if isinstance(part, tuple) else id(value)
    try:
        pointer = value.data_ptr()
    except RuntimeError:
        # Not every device tells addresses.
        pointer = 0
    if pointer == 0 or value.numel() == 0:
        return id(value)
    flags = (value.is_conj(), value.is_neg())
    return (pointer, value.device, value.dtype, tuple(value.shape), value.stride(), flags)


def _as_uint8(plain: Tensor) -> Tensor:
    if plain.element_size() != 1:
        raise ValueError(f"elements of {plain.dtype} have {plain.element_size()} bytes")
    return plain.view(torch.uint8)
