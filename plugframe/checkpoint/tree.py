"""Split a state tree into named tensors and a JSON-serialisable structure, and join them again.

In the structure, None, bool, str, list and ordinary int and float represent themselves; everything else is an object
with one key, its tag: ``{"tensor": "model.weight"}``, ``{"dict": {…}}``, ``{"tuple": […]}``. So strings and keys of the
user cannot be mistaken for tags.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from plugframe.checkpoint import strict_json
from plugframe.checkpoint.stored import StoredTensor, Viewed, viewed
from plugframe.checkpoint.subclass import FlattenedTensor, context_text, is_wrapper, name_of
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
from plugframe.errors import CheckpointCorruptError, CheckpointError, printable_cause
from plugframe.utils.shards import is_shard, local_of, view_locally

#: Deeper trees are refused: the recursion limit of the JSON parser is only slightly larger.
MAX_DEPTH = 100
#: Maximum number of references to one tensor: more would be a file that expands beyond any memory.
MAX_REFERENCES = 50_000


def split(
    state: Mapping[str, Any],
    *,
    dtypes: Collection[torch.dtype] | None = None,
    where: str = "the checkpoint",
    sharded: bool = False,
    aliases: bool = True,
) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of `state` by name, and a JSON-serialisable structure that refers to them.

    Subclasses of plain types become those types, NumPy scalars plain values, and NumPy arrays tensors. A tensor that
    occurs twice (same memory, shape and strides) is listed once. The tensors are detached views with their device and
    strides; complex ones are viewed as real.

    Args:
        state: the tree; see `CheckpointSpec`.
        dtypes: dtypes that the format supports; other one-byte types are listed as uint8. None means any.
        where: name for errors, usually the path.
        sharded: whether tensors may be a ``DTensor``; they are listed as such.
        aliases: whether to detect a ``DTensor`` that occurs twice. A rank with an empty shard cannot.

    Raises:
        CheckpointError: listing every entry that cannot be saved, with its type and what to save instead.
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
    """Split a state like `split`; its tensors may be a `StoredTensor`, which is not read."""
    splitter = _Splitter(dtypes, sharded=sharded, aliases=aliases, stored=True)
    structure = splitter.run(state, where)
    return splitter.tensors, structure


def join(tensors: Mapping[str, Tensor | StoredTensor], structure: Any, *, where: str = "the checkpoint") -> Any:
    """Return the tree that was passed to `split`; its tensors may be a `StoredTensor`.

    Raises:
        CheckpointCorruptError: if the structure is invalid, or does not match the tensors.
    """
    joiner = _Joiner(tensors)
    try:
        state = joiner.decode(structure, 0)
    except Exception as error:  # noqa: BLE001 a file may hold anything
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
    # Preserves lone surrogates, which are legal in a Python str.
    return text.encode("utf-8", "surrogatepass")


def parse_structure(data: bytes) -> Any:
    """Return the structure written by `dump_structure`.

    Raises:
        ValueError: if `data` is not valid; see `plugframe.checkpoint.strict_json.parse`.
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
            return self._problem(
                f"{_path_text(path)} is an integer of {int.bit_length(value)} bits: save it as a tensor"
            )
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
        if isinstance(value, FlattenedTensor):
            return self._flattened(value, path)
        return self._numpy(value, path)

    def _flattened(self, value: FlattenedTensor, path: tuple[Any, ...]) -> Any:
        body = {"class": value.class_name, "context": value.context, "shape": list(value.shape)}
        inner = {name: self.encode(item, (*path, name)) for name, item in value.tensors.items()}
        return {"subclass": {**body, "tensors": inner, "dtype": dtype_name(value.dtype)}}

    def _container(self, value: Any, path: tuple[Any, ...]) -> Any:
        if id(value) in self._open:
            return self._problem(f"{_path_text(path)} contains itself: a state must be a tree")
        if len(path) > MAX_DEPTH:
            return self._problem(f"{_path_text(path[:3])}… is nested more than {MAX_DEPTH} deep: flatten it")
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
                self._problem(f"{_path_text(path)} has the key {key!r}, {describe(key)}: keys must be str or int")
                continue
            items.append([encode_scalar(key), self.encode(item, (*path, key))])
        if isinstance(value, Counter):
            # MultiStepLR has a Counter in its state, and needs one when it is loaded.
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
            name = _path_text(path)
            return self._problem(f"{name} is {describe(value)} of {value.dtype}: save {name}.tolist() instead")
        return self._problem(refuse(value, _path_text(path)))

    def _wrapper(self, value: Any, path: tuple[Any, ...]) -> Any:
        """Encode a tensor of a subclass: its class by name, and its inner tensors."""
        try:
            names, context = value.__tensor_flatten__()
            text = context_text(context)
        except TypeError as error:
            return self._problem(
                f"{_path_text(path)} is {describe(value)}, whose settings cannot be saved: they hold {error}"
            )
        tensors = {name: getattr(value, name) for name in names}
        return self._flattened(FlattenedTensor(name_of(value), tensors, text, value.shape, value.dtype), path)

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Any:
        if is_wrapper(value):
            return self._wrapper(value, path)
        problem = refuse_tensor(value, _path_text(path), sharded=self._sharded)
        if problem:
            return self._problem(problem)
        identity = _identity(value) if self._aliases or not is_shard(value) else id(value)
        if identity not in self._nodes:
            # Keep the value alive: its address identifies it only while it lives.
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
            return self._problem(f"{_path_text(path)} is a tensor of {plain.dtype}, which this format cannot hold")
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
            return self._problem(
                f"{_path_text(path)} is the same tensor for the {MAX_REFERENCES + 1}th time: save it once"
            )
        return self._nodes[identity][1]

    def _name(self, path: tuple[Any, ...]) -> str:
        # The name need only be readable and unique: the structure distinguishes the key "a.b" from two keys.
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
            "subclass": self._subclass,
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

    def _subclass(self, body: Any, depth: int) -> FlattenedTensor:
        inner = {name: self.decode(node, depth) for name, node in body["tensors"].items()}
        if not all(isinstance(item, (Tensor, StoredTensor, FlattenedTensor)) for item in inner.values()):
            raise ValueError("a part of a tensor is none")
        if not (isinstance(body["class"], str) and isinstance(body["context"], str)):
            raise ValueError("a tensor has no class")
        shape = torch.Size([int(size) for size in body["shape"]])
        return FlattenedTensor(body["class"], inner, body["context"], shape, dtype_of(body["dtype"]))

    def _items(self, body: Any, depth: int) -> dict[Any, Any]:
        items = [(self.decode(key, depth), self.decode(item, depth)) for key, item in body]
        found = dict(items)
        if len(found) != len(items) or any(isinstance(key, bool) or not isinstance(key, (str, int)) for key in found):
            raise ValueError("a dict has a duplicate key, or one that is neither str nor int")
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
            raise ValueError(f"tensor {name!r} has more than {MAX_REFERENCES} references")
        if (kind, name) not in self._made:
            self._made[kind, name] = make(self._tensors[name])
        return self._made[kind, name]


def _as_complex(tensor: Tensor | StoredTensor) -> Tensor | StoredTensor:
    if isinstance(tensor, StoredTensor):
        return viewed(tensor, tensor.dtype.to_complex())
    return torch.view_as_complex(tensor)


def _path_text(path: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)


def _identity(value: Tensor) -> Any:
    """Return a key that is equal for tensors of the same memory, dtype, shape and strides."""
    if is_shard(value):
        local = _identity(local_of(value.detach()))
        # An id is useless here: the local tensor may be a temporary object.
        return (local, value.shape, value.device_mesh, value.placements) if isinstance(local, tuple) else id(value)
    try:
        pointer = value.data_ptr()
    except RuntimeError:
        # Not every device supports addresses.
        pointer = 0
    if pointer == 0 or value.numel() == 0:
        return id(value)
    flags = (value.is_conj(), value.is_neg())
    return (pointer, value.device, value.dtype, tuple(value.shape), value.stride(), flags)


def _as_uint8(plain: Tensor) -> Tensor:
    if plain.element_size() != 1:
        raise ValueError(f"elements of {plain.dtype} have {plain.element_size()} bytes")
    return plain.view(torch.uint8)
