"""The types in the signatures of `Lite`. Checkers and editors read them; nothing imports them while a script runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, Protocol, TypeAlias, TypedDict, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.optim import Optimizer

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple

    #: Of optimizers from the third on: with two bound ones before, what is no optimizer is still an error.
    Os = TypeVarTuple("Os")

T = TypeVar("T")
K = TypeVar("K")
P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
O1 = TypeVar("O1", bound=Optimizer)
O2 = TypeVar("O2", bound=Optimizer)
#: A scheduler, which is returned as it is.
S = TypeVar("S")
#: A ``DataLoader``, or another object that yields batches.
L1 = TypeVar("L1", bound=Iterable[Any])
L2 = TypeVar("L2", bound=Iterable[Any])

StrPath: TypeAlias = str | os.PathLike[str]
Devices: TypeAlias = int | str | list[int] | tuple[int, ...]
Methods: TypeAlias = Iterable[str | Callable[..., object]]
Reduction: TypeAlias = Literal["mean", "avg", "sum", "min", "max", "product"] | str | ReduceOp | ReduceOp.RedOpType
Group: TypeAlias = ProcessGroup | None


class BackwardArguments(TypedDict, total=False):
    """Keywords of ``Tensor.backward``."""

    gradient: Tensor | None
    retain_graph: bool | None
    create_graph: bool
    inputs: Tensor | Sequence[Tensor] | None


class Stateful(Protocol):
    """What has a ``state_dict``: modules, optimizers, schedulers, scalers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> object: ...


class Writable(Protocol):
    """A file that can be printed to."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class Array(Protocol):
    """An array or a number of NumPy."""

    def __array__(self, /) -> Any: ...


class Image(Protocol):
    """An image of PIL."""

    @property
    def __array_interface__(self, /) -> Any: ...


#: Rows of a table.
Rows: TypeAlias = Sequence[Mapping[str, object]]
T_co = TypeVar("T_co", covariant=True)


class Items(Protocol[T_co]):
    """A list or a tuple; no string, in which ``__contains__`` takes strings alone."""

    def __contains__(self, value: object, /) -> bool: ...

    def __getitem__(self, index: int, /) -> T_co: ...

    def __iter__(self) -> Iterator[T_co]: ...

    def __reversed__(self) -> Iterator[T_co]: ...


class Dataclass(Protocol):
    """An object of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


#: What a collective makes a tensor of; ``complex`` is every number of Python.
Number: TypeAlias = Tensor | complex | Array
N = TypeVar("N", bound=Number)
#: What all_gather makes a list of, alone.
Text = TypeVar("Text", bound=str | bytes | None)
#: Tensors in containers: a collective returns the type it is given.
Tensors: TypeAlias = "Tensor | Items[Tensors] | Mapping[Any, Tensors]"
Nest = TypeVar("Nest", bound="Items[Tensors] | Mapping[Any, Tensors] | Dataclass")
