"""Start the ranks that a script, a function or the ``run`` of a subclass needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from plugframe.errors import SettingTypeError
from plugframe.launch import start
from plugframe.lite.script_body import is_unguarded

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

#: Marks the ``run`` of a subclass that starts the ranks it needs.
WRAPPED = "_plugframe_starts_ranks"


def launch(lite: Lite, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Launch the job's ranks, if they do not run yet; see `Lite.launch`."""
    if function is not None and not callable(function):
        raise SettingTypeError(f"launch() takes a function, got {type(function).__name__}.")
    if lite._alone():
        lite._started("launch")
        return function(lite, *args, **kwargs) if function is not None else None
    if function is None:
        start.start_script(lite.plan, lite._request, lite._registry)
    handed = (type(lite), lite.__getstate__(), function, args, kwargs)
    return start.start_function(lite.plan, lite._request, lite._registry, _rank_main, handed)


def _rank_main(cls: type[Lite], state: dict[str, Any], function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a launched function on a rank: create the `Lite` of this process, call, tear down."""
    lite = cls.__new__(cls)
    lite.__setstate__(state)
    with lite:
        lite._started("launch")
        return function(lite, *args, **kwargs)


def on_every_rank(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the ``run`` of a subclass to launch the ranks and return rank 0's result."""

    @functools.wraps(run)
    def wrapper(self: Lite, *args: Any, **kwargs: Any) -> Any:
        if self._alone():
            self._started("run")
            return run(self, *args, **kwargs)
        # A script without a guard would be imported by the ranks of a function: they run the script instead.
        if is_unguarded() and start.runs_scripts(self._request, self._registry):
            self.launch()
        return self.launch(_call_run, *args, **kwargs)

    setattr(wrapper, WRAPPED, True)
    return wrapper


def _call_run(lite: Any, *args: Any, **kwargs: Any) -> Any:
    return lite.run(*args, **kwargs)
