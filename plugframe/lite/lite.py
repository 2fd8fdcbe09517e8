"""Starting the ranks; and the whole object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

from plugframe.errors import SettingError
from plugframe.launch import start
from plugframe.lite.checkpointing import Keeping
from plugframe.lite.core import Core
from plugframe.lite.logging import Telling
from plugframe.lite.loop import Loop
from plugframe.lite.ranks import Ranks
from plugframe.lite.setup import SetUp

T = TypeVar("T")

#: Marks the ``run`` of a subclass that starts the ranks it needs.
_WRAPPED = "_plugframe_starts_ranks"


class Lite(SetUp, Loop, Ranks, Keeping, Telling):
    __doc__ = Core.__doc__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = getattr(cls, "run", None)
        # Its own, or that of a class beside this one which knows nothing of ranks.
        if isinstance(run, FunctionType) and not hasattr(run, _WRAPPED):
            setattr(cls, "run", _on_every_rank(run))  # noqa: B010

    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Make sure that the job's ranks run.

        Where they do already (``plugframe run``, torchrun, a scheduler) or where one is enough, this process
        goes on. Otherwise, in a script, this process starts and supervises the ranks, each of which runs the
        script from its beginning; code after the call runs on the ranks alone, code before it once more on each.

        Args:
            function: called as ``function(lite, *args, **kwargs)`` on every rank. With it, this process goes on
                after the ranks have ended.

        Returns:
            What `function` returned: on rank 0, if ranks were started. None without a function.

        Raises:
            RankFailedError: if a rank failed while running `function`.
        """
        if function is not None and not callable(function):
            raise SettingError(f"launch() takes a function, got {type(function).__name__}.")
        if self._alone():
            self._started("launch")
            return function(self, *args, **kwargs) if function is not None else None
        if function is None:
            start.start_script(self.plan, self._request, self._registry)
        handed = (type(self), self.__getstate__(), function, args, kwargs)
        return cast("T", start.start_function(self.plan, self._request, self._registry, _rank_main, handed))


for _part in (Core, SetUp, Loop, Ranks, Keeping, Telling):
    for _name, _method in vars(_part).items():
        if inspect.isfunction(_method):
            _method.__qualname__ = f"Lite.{_name}"  # what an error about its arguments calls it


def _rank_main(cls: type[Lite], state: dict[str, Any], function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a launched function on a rank: make the `Lite` of this process, call, tear down."""
    lite = cls.__new__(cls)
    lite.__setstate__(state)
    with lite:
        lite._started("launch")
        return function(lite, *args, **kwargs)


def _on_every_rank(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the ``run`` of a subclass start the ranks it needs and return rank 0's result."""

    @functools.wraps(run)
    def wrapper(self: Lite, *args: Any, **kwargs: Any) -> Any:
        if self._alone():
            self._started("run")
            return run(self, *args, **kwargs)
        return self.launch(_call_run, *args, **kwargs)

    setattr(wrapper, _WRAPPED, True)
    return wrapper


def _call_run(lite: Any, *args: Any, **kwargs: Any) -> Any:
    return lite.run(*args, **kwargs)
