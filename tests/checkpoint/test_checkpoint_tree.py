"""A state tree is restored exactly, and unsupported values are refused by key."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import pathlib
import re
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from checkpoint_trees import bits, same, trees
from plugframe.checkpoint import as_bytes, dump_structure, join, parse_structure, pieces, split
from plugframe.errors import CheckpointCorruptError, CheckpointError


def there_and_back(state: dict[Any, Any], **kwargs: Any) -> Any:
    tensors, structure = split(state, **kwargs)
    return join(tensors, parse_structure(dump_structure(structure)))


@settings(deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_a_tree_comes_back_to_the_last_bit(state: dict[Any, Any]) -> None:
    """Any supported tree is restored with the same types, keys, order and bits."""
    assert same(there_and_back(state), state)


@settings(deadline=None, database=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_a_format_of_few_dtypes_holds_every_tree(state: dict[Any, Any]) -> None:
    """Unsupported one-byte dtypes are listed as uint8, complex ones as real pairs."""
    known = {getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "uint8")}
    known |= {torch.int64, torch.int32, torch.int16, torch.uint64, torch.uint32, torch.uint16}
    tensors, structure = split(state, dtypes=known)
    assert {tensor.dtype for tensor in tensors.values()} <= known
    assert same(join(tensors, structure), state)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, {3: [1]}), {3: [1]}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (torch.Size([2, 3]), (2, 3)),
        (collections.namedtuple("Pair", "x y")(1, 2), (1, 2)),
        (enum.IntEnum("Colour", "RED")(1), 1),
        (torch.__version__, str(torch.__version__)),
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.str_("word"), "word"),
        (np.complex64(1j), 1j),
        ({np.int64(3): 1}, {3: 1}),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.ones(2, requires_grad=True) * 2, torch.full((2,), 2.0)),
        (torch.tensor([2 + 1j]).conj(), torch.tensor([2 - 1j])),
        (torch.tensor([2 + 1j]).conj().imag, torch.tensor([-1.0])),
        (np.arange(3, dtype=">i4"), torch.arange(3, dtype=torch.int32)),
        (np.array(2.5), torch.tensor(2.5, dtype=torch.float64)),
        (np.arange(4)[::-1], torch.tensor([3, 2, 1, 0])),
        (np.frombuffer(b"\x01\x02", dtype=np.uint8), torch.tensor([1, 2], dtype=torch.uint8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_and_numpy_values_become_plain(value: Any, expected: Any) -> None:
    """A subclass of a plain type becomes that type, an array a tensor."""
    assert same(there_and_back({"value": value}), {"value": expected})


def test_a_counter_stays_a_counter() -> None:
    """MultiStepLR has a Counter in its state and calls its methods later."""
    milestones = collections.Counter([2, 2, 5])
    back = there_and_back({"scheduler": {"milestones": milestones}})["scheduler"]["milestones"]
    assert back == milestones
    assert type(back) is collections.Counter


def test_numbers_beyond_json_come_back() -> None:
    """Integers of any length and all floats are restored; the JSON has no NaN and no Infinity."""
    state = {
        "big": 1 << 100_000,
        "small": -(7**300),
        "floats": [float("nan"), float("-inf"), -0.0, 5e-324, 0.1],
    }
    _, structure = split(state)
    json.loads(dump_structure(structure), parse_constant=lambda name: pytest.fail(name))
    assert same(there_and_back(state), state)


def test_a_tensor_that_occurs_twice_is_stored_once() -> None:
    """Tied weights are listed once and restored as one tensor; another view of the memory is another tensor."""
    weight = torch.nn.Parameter(torch.randn(3, 3))
    state = {
        "encoder": weight,
        "decoder": weight.data,
        "view": weight.detach().t(),
        "copy": weight.detach().clone(),
    }
    tensors, _ = split(state)
    assert list(tensors) == ["encoder", "view", "copy"]
    back = there_and_back(state)
    assert back["encoder"] is back["decoder"]
    assert back["view"] is not back["encoder"]


def test_empty_tensors_are_not_taken_for_one_another() -> None:
    """Tensors without elements have no address; they are equal only if they are the same object."""
    empty = torch.empty(0)
    state = {"a": empty, "b": empty, "c": torch.empty(0), "d": [np.empty((0, size)) for size in range(3)]}
    back = there_and_back(state)
    assert back["a"] is back["b"]
    assert back["a"] is not back["c"]
    assert [tuple(tensor.shape) for tensor in back["d"]] == [(0, 0), (0, 1), (0, 2)]


def test_names_of_tensors_are_readable_and_never_collide() -> None:
    """A name is the dotted path; colliding or reserved names are made unique."""
    one = [torch.tensor(float(number)) for number in range(7)]
    state = {
        "model": {"layer.weight": one[0], "layer": {"weight": one[1]}},
        "model.layer": {"weight": one[2]},
        "__metadata__": one[3],
        "": one[4],
        1: one[5],
        "\udc80": one[6],
    }
    tensors, _ = split(state)
    assert list(tensors) == [
        "model.layer.weight",
        "model.layer.weight#2",
        "model.layer.weight#3",
        "state.__metadata__",
        "state.",
        "1",
        "\\udc80",
    ]
    assert same(there_and_back(state), state)


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Tagged(torch.Tensor):
    """A user's tensor subclass."""


class Sharded(torch.Tensor):
    """A stub of a DTensor."""

    def full_tensor(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED = {
    "namespace": (argparse.Namespace(lr=1), "is an argparse.Namespace: save vars(state['key']) instead"),
    "set": ({1, 2}, "is a set: save sorted(state['key']) instead"),
    "deque": (collections.deque([1]), "is a collections.deque: save list(state['key']) instead"),
    "bytearray": (bytearray(b"a"), "is a bytearray: save bytes(state['key']) instead"),
    "enum": (enum.Enum("Colour", "RED")(1), "save state['key'].value instead"),
    "module": (
        torch.nn.Linear(1, 1),
        "is a torch.nn.modules.linear.Linear: save state['key'].state_dict() instead",
    ),
    "generator": (torch.Generator(), "save state['key'].get_state() instead"),
    "path": (pathlib.PurePosixPath("a"), "save str(state['key']) instead"),
    "device": (torch.device("cpu"), "is a torch.device: save str(state['key']) instead"),
    "date": (datetime.date(2020, 1, 1), "save state['key'].isoformat() instead"),
    "dataclass": (Settings(), "save dataclasses.asdict(state['key']) instead"),
    "function": (len, "code is never saved; save its name instead"),
    "class": (Settings, "code is never saved; save its name instead"),
    "lock": (threading.Lock(), "is a _thread.lock: save its values as dict"),
    "subclass": (torch.ones(1).as_subclass(Tagged), "save state['key'].as_subclass(torch.Tensor) instead"),
    "shard": (torch.ones(1).as_subclass(Sharded), "save state['key'].full_tensor() instead"),
    "meta": (torch.empty(2, device="meta"), "is on the meta device and has no values"),
    "sparse": (torch.eye(2).to_sparse(), "is a sparse_coo tensor: save state['key'].to_dense() instead"),
    "freed": (freed(), "has no storage: its memory was freed"),
    "object array": (
        np.array([{}], dtype=object),
        "is a numpy.ndarray of object: save state['key'].tolist() instead",
    ),
    "masked array": (np.ma.masked_array([1.0], mask=[1]), "numpy.ma.MaskedArray of float64"),
    "numpy date": (np.datetime64("2020-01-01"), "is a numpy.datetime64"),
    "tuple key": ({(1, 2): 3}, "has the key (1, 2), a tuple: keys must be str or int"),
    "bool key": ({True: 3}, "has the key True, a bool: keys must be str or int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_remedy(name: str) -> None:
    """The error has the key, the type and what to save instead."""
    value, text = REFUSED[name]
    with pytest.raises(CheckpointError, match=r"state\['key'\].*" + re.escape(text)):
        split({"key": value})


def test_all_offenders_are_listed_at_once() -> None:
    """One error lists every unsupported entry, at any depth, and the file."""
    state = {"fine": 1, "args": argparse.Namespace(), "deep": [{"x": ({1},)}], 3: len}
    with pytest.raises(CheckpointError, match=r"cannot save last\.ckpt, nothing was written: ") as caught:
        split(state, where="last.ckpt")
    text = str(caught.value)
    assert all(name in text for name in ("state['args']", "state['deep'][0]['x'][0]", "state[3]"))
    assert "fine" not in text
    assert "\n" not in text


def test_a_state_that_is_no_mapping_is_refused() -> None:
    """The root of a state is a mapping."""
    with pytest.raises(CheckpointError, match=r"state is a torch.nn.modules.linear.Linear: save state.state_dict\(\)"):
        split(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_dtype_the_format_cannot_hold_is_refused() -> None:
    """A wide dtype that the format does not support is refused by key."""
    with pytest.raises(CheckpointError, match=r"state\['a'\] is a tensor of torch.int64, which this format"):
        split({"a": torch.ones(1, dtype=torch.int64)}, dtypes={torch.float32})


def test_cycles_and_bottomless_trees_are_refused() -> None:
    """A cycle, or a tree deeper than 100 levels, is refused; 100 levels are supported."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match=r"state\['loop'\]\[0\] contains itself"):
        split({"loop": loop})
    deep: list[Any] = [1j, float("nan"), torch.ones(1)]
    for _ in range(99):
        deep = [deep]
    assert same(there_and_back({"deep": deep}), {"deep": deep})
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        split({"deep": [deep]})


@pytest.mark.parametrize(
    ("structure", "text"),
    [
        ({"dict": {"a": {"call": "os.system"}}}, "unknown entry"),
        ({"dict": {}, "tuple": []}, "unknown entry"),
        ({}, "unknown entry"),
        ({"tensor": "gone"}, "'gone' is missing"),
        ({"tensor": ["w"]}, "unhashable"),
        ({"dtype": "load"}, "'load' is not a dtype"),
        ({"dtype": "nn"}, "'nn' is not a dtype"),
        ({"bits": ["save", "w"]}, "'save' is not a dtype"),
        ({"float": "__import__('os')"}, "is not nan, inf or -inf"),
        ({"int": "zz"}, "invalid literal"),
        ({"bytes": "?"}, "base64|padding"),
        ({"items": [[["a"], 1]]}, "unhashable"),
        ({"items": 3}, "not iterable"),
        ({"dict": []}, "has no attribute"),
        ({"complex_tensor": "w"}, "last dimension"),
        ({"tuple": [1]}, "tensor 'w' is not part of its structure"),
    ],
)
def test_a_structure_that_is_none_is_corrupt(structure: Any, text: str) -> None:
    """Only plain values, containers and the given tensors are accepted in a structure."""
    with pytest.raises(CheckpointCorruptError, match=text):
        join({"w": torch.ones(3)}, structure)


def test_bottomless_json_is_corrupt_not_a_crash() -> None:
    """JSON that is nested too deeply is refused."""
    with pytest.raises(ValueError, match="nested too deeply|recursion"):
        join({}, parse_structure(b"[" * 100_000 + b"]" * 100_000))


@pytest.mark.parametrize("max_bytes", [8, 24, 100, 10_000])
@pytest.mark.parametrize("how", ["plain", "transposed", "sliced", "expanded", "row", "scalar", "empty"])
def test_pieces_are_the_elements_in_order(how: str, max_bytes: int) -> None:
    """The pieces of any strided tensor are its elements in row-major order, each within the limit."""
    base = torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)
    tensor = {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "sliced": base[:, ::2],
        "expanded": base[0].expand(7, 4, 5),
        "row": base.transpose(1, 2)[:1],
        "scalar": base[0, 0, 0],
        "empty": base[:, :0],
    }[how]
    bites = [bytes(as_bytes(piece)) for piece in pieces(tensor, max_bytes=max_bytes)]
    assert b"".join(bites) == bits(tensor)
    assert all(len(bite) <= max_bytes for bite in bites)


def test_bytes_of_what_is_not_in_one_piece_are_refused() -> None:
    """Tensors that are not contiguous, or without memory, have no bytes."""
    for tensor in (torch.ones(3, 3).t()[:2], freed(), torch.empty(2, device="meta")):
        with pytest.raises(ValueError, match="has no plain bytes"):
            as_bytes(tensor)
