"""The micro-batches of one optimizer step: which one runs, and which calls belong after the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from plugframe.errors import OrderError, SettingError

#: Returns the sum of a number over all ranks.
Sum = Callable[[float], float]


class Accumulation:
    """Micro-batches that are accumulated into one optimizer step.

    Attributes:
        models: the modules that are accumulated.
        steps: micro-batches of a step, but for the last one of an epoch.
        number: number of the current micro-batch, from 1; 0 before the first.
        of: number of micro-batches of the current step.
        total: sum of the weights of all ranks and micro-batches of the step, if it is known in advance.
        weight: weight of the current micro-batch on this rank, if it is known in advance.
        ended: whether the loop was left in the middle of a step.
    """

    def __init__(self, models: Iterable[nn.Module], steps: int) -> None:
        self.models = list(models)
        self.steps = steps
        self.number = self.of = 0
        self.total: float | None = None
        self.weight = 0.0
        self.ended = False
        self._owned: set[int] | None = None
        self._begin_step()

    def _begin_step(self) -> None:
        # Micro-batches with a backward, and whether they are used or dropped.
        self._reached: list[int] = []
        self._used = False
        # Weights given to `backward`: the divisor of the losses until the total is known, and this rank's sum.
        self._divisor = self._sum = 0.0
        self._weighted: list[int] = []

    def begin(self, number: int, of: int, *, weight: float = 0.0, total: float | None = None) -> None:
        """Begin a micro-batch."""
        if number == 1:
            self._begin_step()
        self.number, self.of, self.weight, self.total = number, of, weight, total

    @property
    def accumulating(self) -> bool:
        """Whether more micro-batches follow before the optimizer steps."""
        return self.number < self.of and not self.ended

    @property
    def pending(self) -> bool:
        """Whether there are gradients that no optimizer step has used."""
        return bool(self._reached) and not self._used

    @property
    def _where(self) -> str:
        return f"micro-batch {self.number} of {self.of} of lite.accumulate()"

    def owns(self, owner: nn.Module | Optimizer) -> bool:
        """Return whether a module or optimizer holds parameters of the models."""
        if isinstance(owner, nn.Module):
            return any(owner is each for each in self.models)
        if self._owned is None:
            self._owned = {id(parameter) for model in self.models for parameter in model.parameters()}
        return any(id(parameter) in self._owned for group in owner.param_groups for parameter in group["params"])

    # ------------------------------------------------------------------ calls of the script

    def on_step(self, owner: Optimizer, call: str = "step") -> None:
        """Check that a step, or clipping, comes after the last micro-batch.

        Raises:
            OrderError: if not.
        """
        if not self.owns(owner) or (self.ended and self._used):
            return
        what = f"{type(owner).__name__}.step()" if call == "step" else f"lite.{call}()"
        if self.ended:
            raise OrderError(
                f"{what}: the loop ended at {self._where}, whose gradients were not synchronised. Leave the loop after "
                "a step, `if not lite.accumulating:`, or drop the gradients with optimizer.zero_grad()."
            )
        if self.accumulating:
            raise OrderError(
                f"{what} is called at {self._where}, and the gradients are not complete: clip and step under "
                "`if not lite.accumulating:`."
            )
        if self._reached and self._reached[-1] != self.number:
            raise OrderError(
                f"{what}: {self._where}, the last one, had no lite.backward(), so that the gradients of the "
                "others were not synchronised: call it for every micro-batch."
            )
        if call == "step":
            self._used = True

    def on_zero_grad(self, owner: nn.Module | Optimizer) -> None:
        """Check that no gradients are dropped in the middle of a step.

        Raises:
            OrderError: if they are.
        """
        if not self._reached or not self.owns(owner):
            return
        if self.accumulating:
            raise OrderError(
                f"{type(owner).__name__}.zero_grad() at {self._where} drops the gradients of the micro-batches before: "
                "call it under `if not lite.accumulating:`, after the step."
            )
        self._used = True

    def end(self) -> None:
        """Note that the script has left the loop at the current micro-batch."""
        self.ended = self.ended or (self.accumulating and bool(self._reached))
        if not self.ended:
            self.of = self.number

    def check_used(self) -> None:
        """Check that the gradients of the last step were used.

        Raises:
            OrderError: if no optimizer stepped and none was reset.
        """
        if self.pending:
            raise OrderError(
                "No optimizer stepped after the last micro-batch of lite.accumulate(), and the next ones would add to "
                "its gradients: call optimizer.step() and zero_grad() under `if not lite.accumulating:`."
            )

    # ------------------------------------------------------------------ backward

    def takes(self, model: nn.Module | None, *, others: bool) -> bool:
        """Return whether a loss is one of the models.

        Args:
            model: the module of the loss, if it is known.
            others: whether modules that are not accumulated were set up.

        Raises:
            OrderError: if there is no telling whose loss it is.
        """
        if model is not None:
            return any(model is each for each in self.models)
        if others:
            raise OrderError(
                "lite.backward() in lite.accumulate(): several models were set up, and not all of them are "
                "accumulated. Say whose loss it is: lite.backward(loss, model=model)."
            )
        return True

    def on_backward(self, *, weighted: bool) -> None:
        """Record a backward of the models.

        Raises:
            OrderError: if some have a weight and others do not, or a micro-batch has several with one.
        """
        if self._reached and bool(self._weighted) != weighted:
            raise OrderError("lite.backward(loss, weight=…) in lite.accumulate(): pass a weight for every micro-batch.")
        if weighted and self.number in self._weighted:
            raise OrderError(
                "lite.backward(loss, weight=…) is called twice for a micro-batch: add up its losses; or count before, "
                "with lite.accumulate(..., weight=function of the batch)."
            )
        if weighted:
            self._weighted.append(self.number)
        self._reached.append(self.number)

    def weighted_factor(self, weight: float, total: Sum, ranks: int) -> float:
        """Return the factor of a loss with a weight of its own; `rescale` corrects the sum of them."""
        if not self._divisor:
            # Of about the size of the total, so that no gradient overflows.
            self._divisor = (total(weight) or ranks) * self.of
        self._sum += weight
        return weight * ranks / self._divisor

    def rescale(self, total: Sum) -> float | None:
        """Return the factor of the gradients after the last micro-batch; None if there is nothing to correct.

        Raises:
            SettingError: if all weights are 0.
        """
        if not self._weighted or self.accumulating:
            return None
        found = total(self._sum)
        if not found:
            raise SettingError("lite.backward(loss, weight=0) on all ranks and micro-batches: there is no mean.")
        return self._divisor / found if found != self._divisor else None
