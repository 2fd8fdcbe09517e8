"""The strategy: each step is made by the replicas that live, and by all of them or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.optim import Optimizer
from torchft import Manager, ProcessGroupGloo

from plugframe.base import Strategy
from plugframe.errors import SettingError
from plugframe.hooks import Engine, hookimpl
from plugframe.hooks.context import Context


class TorchFT(Strategy):
    """Average gradients over the replicas that live. One that comes back gets model and optimizers from a healthy one.

    Args:
        replica: number of this replica.
        num_replicas: replicas that share the data.
        min_replicas: replicas without which no step is made.
        lighthouse: address of torchft's lighthouse, such as ``"http://host:29510"``.
        timeout_s: seconds after which a replica that does not answer counts as dead.
    """

    manager: Manager

    def __init__(
        self,
        *,
        replica: int = 0,
        num_replicas: int = 1,
        min_replicas: int = 1,
        lighthouse: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        if replica >= num_replicas:
            raise SettingError(f"replica={replica} does not exist: num_replicas={num_replicas} counts from 0.")
        self.replica, self.num_replicas, self.min_replicas = replica, num_replicas, min_replicas
        self.lighthouse, self.timeout = lighthouse, timedelta(seconds=timeout_s)
        self._modules: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._synchronized = True
        #: Whether the step is made; None between its first backward and the decision.
        self._commit: bool | None = True

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        address = self.lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")
        if address is None:
            raise SettingError("strategy='torchft' needs lighthouse=, or TORCHFT_LIGHTHOUSE: run torchft_lighthouse.")
        # The other replicas connect to it, on whatever machine they are.
        host = socket.gethostname()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=self.timeout),
            load_state_dict=self._load,
            state_dict=self._state,
            min_replica_size=self.min_replicas,
            timeout=self.timeout,
            quorum_timeout=self.timeout,
            connect_timeout=self.timeout,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=address,
            replica_id=f"replica_{self.replica}_",
        )

    @hookimpl
    def strategy_teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.shutdown(wait=False)

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        engine = super().strategy_setup_module(module)
        self._modules.append(module)
        return engine

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        self._optimizers += optimizers
        return optimizers

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        return self.replica, self.num_replicas

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._commit is not None:
            self.manager.start_quorum()
            self._commit = None
        super().strategy_backward(loss, module, args, kwargs)
        if self._synchronized:
            # Averaging twice leaves what was averaged before as it is, so gradients may accumulate.
            gradients = [p.grad for each in self._modules for p in each.parameters() if p.grad is not None]
            for work in [self.manager.allreduce(gradient) for gradient in gradients]:
                work.wait()

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: Engine, enabled: bool) -> AbstractContextManager[Any]:
        return self._accumulating(enabled)

    @contextmanager
    def _accumulating(self, enabled: bool) -> Iterator[None]:
        before, self._synchronized = self._synchronized, not enabled
        try:
            yield
        finally:
            self._synchronized = before

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        if self._commit is None:
            # Decided once for all optimizers. A replica that came back gets its state here.
            self._commit = self.manager.should_commit()
        return super().strategy_optimizer_step(optimizer, step, closure) if self._commit else None

    @hookimpl
    def strategy_state(self) -> dict[str, Any]:
        return dict(self.manager.state_dict())

    @hookimpl
    def strategy_load_state(self, state: dict[str, Any]) -> None:
        self.manager.load_state_dict(state)

    def _state(self) -> dict[str, Any]:
        return {name: [each.state_dict() for each in held] for name, held in self._held().items()}

    def _load(self, state: dict[str, Any]) -> None:
        for name, held in self._held().items():
            for each, own in zip(held, state[name], strict=True):
                each.load_state_dict(own)

    def _held(self) -> dict[str, Sequence[Any]]:
        return {"modules": self._modules, "optimizers": self._optimizers}
