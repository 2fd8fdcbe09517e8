"""The gradient of a gathered parameter, as scripts see it between a forward and its backward."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe_builtins._shared.sharding.parameter import as_sharded, local_shard

_GRAD: Any = Tensor.grad
#: Name of the attribute with the sharded parameter.
_SHARDS = "_plugframe_shards"


class GatheredParameter(nn.Parameter):
    """A gathered parameter whose ``grad`` is the averaged one, which is sharded.

    Torch keeps the averaged gradients at the sharded parameters: `parameter.grad = None` on a gathered one would drop
    nothing, and the next backward would add to them.
    """

    def _get(self) -> Tensor | None:
        own, shards = _GRAD.__get__(self), self.__dict__.get(_SHARDS)  # a copy has no shards
        return cast("Tensor | None", shards.grad if own is None and shards is not None else own)

    def _set(self, value: Tensor | None) -> None:
        shards = self.__dict__.get(_SHARDS)
        if shards is None:
            _GRAD.__set__(self, value)
            return
        _GRAD.__set__(self, None)
        shards.grad = value if value is None or isinstance(value, DTensor) else as_sharded(local_shard(value, shards))

    def _delete(self) -> None:
        self._set(None)

    # Typed as an attribute by torch, where it is a property too.
    grad: Any = property(_get, _set, _delete)


def show(parameter: Any, shards: Tensor) -> bool:
    """Let a gathered parameter have the gradient of its shards, and return whether it could."""
    if type(parameter) is not nn.Parameter:
        return False
    parameter.__class__ = GatheredParameter
    setattr(parameter, _SHARDS, shards)
    return True


def hide(parameter: Any) -> None:
    """Make it torch's own again: backward looks at ``grad``."""
    parameter.__class__ = nn.Parameter
    parameter.__dict__.pop(_SHARDS, None)
