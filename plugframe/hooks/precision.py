"""The precision contract: dtypes of parameters and arithmetic, and loss scaling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from plugframe.hooks.context import Context


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtypes of a precision, for strategies that implement mixed precision themselves.

    Attributes:
        parameter: dtype of the parameters.
        compute: dtype of the forward and backward arithmetic.
    """

    parameter: torch.dtype
    compute: torch.dtype


class PrecisionSpec(Protocol):
    """Hooks of the kind ``precision``."""

    @provider
    def precision_setup(self, context: Context) -> None:
        """Check that this device supports the precision, and prepare it (a loss scaler).

        Called once on every rank, after accelerator and collective are set up.

        Raises:
            UnsupportedError: if ``context.hooks.accelerator_supports_dtype`` returns False. There is no fallback to
                another precision.
        """
        ...

    @provider
    def precision_teardown(self) -> None:
        """Undo `precision_setup`. Called once on every rank, also after an exception."""
        ...

    @provider
    def precision_dtypes(self) -> Dtypes:
        """Return the dtypes of the precision. Called on every rank, by strategies, at set-up."""
        ...

    @provider
    def precision_convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Convert a module's parameters in place and return it. Called on every rank at ``lite.setup``."""
        ...

    @provider(since=2)
    def precision_finalize(self, module: torch.nn.Module) -> torch.nn.Module:
        """Convert a trained module to its final form and return it: quantization-aware training ends in integers.

        Called on every rank by ``lite.finalize(module)``, with a plain module that holds all its values. The default
        returns the module as it is.
        """
        return module

    @provider
    def precision_convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors in `data` (any nesting) that go into a forward.

        Called on every rank for every forward: it is in the hot path. Return `data` itself where nothing changes.
        """
        ...

    @provider
    def precision_convert_output(self, data: Any) -> Any:
        """Convert the floating-point tensors in `data` (any nesting) that come out of a forward.

        Called on every rank for every forward: it is in the hot path. Return `data` itself where nothing changes.
        """
        ...

    @provider
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        """Return the context a forward runs in, and ``lite.autocast()``.

        Called on every rank for every forward: it is in the hot path.

        Example:
            ``return torch.autocast("cpu", torch.bfloat16)``
        """
        ...

    @provider
    def precision_init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which ``lite.init_module()`` and ``init_tensor()`` create tensors: it sets the
        default dtype to the parameters'. Called on every rank."""
        ...

    @provider
    def precision_backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call ``loss.backward(*args, **kwargs)``, scaled where the precision needs it.

        Called on every rank by the strategy: it is in the hot path.
        """
        ...

    @provider
    def precision_finish_backward(self) -> None:
        """Unscale gradients after a backward, once the strategy has averaged them.

        Called on every rank after `strategy_backward`, also if that raised: it is in the hot path. After it the script
        may read, clip and apply gradients as without this precision.

        Example:
            ``torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / self.scale)``
        """
        ...

    @provider
    def precision_setup_optimizer(self, optimizer: Optimizer) -> None:
        """Register an optimizer: gradients of its parameters must be unscaled after each backward.

        Called on every rank for each optimizer at ``lite.setup`` and ``lite.setup_optimizers``, after the strategy has
        prepared it.
        """
        ...

    @provider
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Run ``step(closure)``, or skip it if gradients overflowed.

        Called on every rank by the strategy: it is in the hot path.

        Raises:
            UnsupportedError: if a closure is given and the precision cannot re-evaluate it.
        """
        ...

    @provider
    def precision_unscale(self, optimizer: Optimizer) -> bool:
        """Unscale the gradients of `optimizer`'s parameters, if `precision_finish_backward` has not.

        Called on every rank by ``lite.clip_gradients``.

        Returns:
            True if a step with non-finite gradients is skipped automatically, so that they are not an error.
        """
        ...

    @provider
    def precision_state(self) -> dict[str, Any]:
        """Return the state for an exact resume (the loss scale). Called on every rank while saving."""
        ...

    @provider
    def precision_load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `precision_state`. Called on every rank while loading."""
        ...
