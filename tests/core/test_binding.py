"""One provider for each hook, wrappers in order around it, and a plain call where nothing wraps."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pluggy
import pytest
import torch

from plugframe import Lite, Plugin, PluginContractError, SettingError, UnsupportedError, hookimpl
from plugframe.base import Accelerator, Collective, Extension, Logger, Strategy
from plugframe.core.planning.plan import Choice
from plugframe.core.registry.registry import Entry
from plugframe.core.runtime.binding import Binding, BoundHooks
from plugframe.hooks import KINDS, Kind
from plugframe.hooks.markers import since_of


def add(binding: Binding, kind: str, plugin: Any, *, published: bool = False) -> Any:
    """Register a plugin of a kind as the job's session would, and return it."""
    name = type(plugin).__name__.lower()
    entry = Entry(kind, name, f"acme:{name}", "acme-plugins", "1.2") if published else None
    choice = Choice(kind=kind, name=name, reason="a test", descriptor=Plugin(factory=f"acme:{name}"), entry=entry)
    binding.add(choice, plugin)
    return plugin


def bound(strategy: Any, *extensions: Any, trace: bool = False, published: bool = False) -> BoundHooks:
    """Return the hooks of a job with one strategy and some extensions, registered innermost first."""
    binding = Binding(trace=trace)
    add(binding, "strategy", strategy, published=published)
    for extension in extensions:
        add(binding, "extension", extension)
    return binding.bind()


class Plain(Strategy):
    """The base as it is."""


class Noting(Extension):
    """Wraps one hook and writes down when it is entered and left."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    @hookimpl(wrapper=True)
    def strategy_next_batch(self, iterator: Iterator[Any]) -> Generator[None, Any, Any]:
        self.notes.append(f"{self.name} in")
        result = yield
        self.notes.append(f"{self.name} out")
        return result


# ---------------------------------------------------------------------- plain calls


def test_a_provider_hook_that_nothing_wraps_is_a_plain_call() -> None:
    """Every hook of a provider is its own bound method: nothing of the plugin system is in the hot path."""
    binding = Binding()
    providers = {
        kind: add(binding, kind, plugin) for kind, plugin in {"strategy": Plain(), "collective": Collective()}.items()
    }
    hooks = binding.bind()
    for kind, provider in providers.items():
        for name in KINDS[kind].hooks:
            assert getattr(hooks, name) == getattr(provider, name)
            assert not isinstance(getattr(hooks, name), pluggy.HookCaller)


def test_only_what_is_wrapped_pays_for_it() -> None:
    """A wrapper turns its own hook into another call, and leaves the others plain."""
    strategy = Plain()
    hooks = bound(strategy, Noting("x", []))
    assert hooks.strategy_next_batch != strategy.strategy_next_batch
    assert hooks.strategy_backward == strategy.strategy_backward


def test_a_hook_without_its_kind_or_of_no_kind() -> None:
    """A name that is no hook, or of a kind that takes no part, is an attribute error that says so."""
    hooks = bound(Plain())
    with pytest.raises(AttributeError, match="There is no hook 'strategy_bakward'"):
        _ = hooks.strategy_bakward
    with pytest.raises(AttributeError, match="There is no hook 'precision_backward'"):
        _ = hooks.precision_backward


def test_an_implementation_may_leave_arguments_out() -> None:
    """As pluggy promises, and with nothing wrapped as well: it is then called through pluggy."""

    class Brief(Strategy):
        @hookimpl
        def strategy_next_batch(self, iterator: Iterator[Any]) -> Any:  # type: ignore[override]
            return next(iterator)

        @hookimpl
        def strategy_init_context(self, empty_init: bool | None = True) -> Any:
            return empty_init

    for trace in (False, True):
        hooks = bound(Brief(), trace=trace)
        assert hooks.strategy_next_batch(iterator=iter([7]), exhausted=None) == 7
        assert hooks.strategy_init_context(empty_init=False) is False


def test_a_provider_may_return_none() -> None:
    """No result is a result: nothing else is run for it."""

    class Silent(Strategy):
        calls = 0

        @hookimpl
        def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
            Silent.calls += 1

    notes: list[str] = []
    assert bound(Silent(), Noting("x", notes)).strategy_next_batch(iterator=iter([1]), exhausted=None) is None
    assert (Silent.calls, notes) == (1, ["x in", "x out"])


# ---------------------------------------------------------------------- wrappers


def test_wrappers_nest_around_the_provider() -> None:
    """The last registered is outermost, sees the provider's result, and may replace it."""

    class Doubling(Extension):
        @hookimpl(wrapper=True)
        def strategy_next_batch(self) -> Generator[None, Any, Any]:
            return 2 * (yield)

    notes: list[str] = []
    hooks = bound(Plain(), Noting("inner", notes), Doubling(), Noting("outer", notes))
    assert hooks.strategy_next_batch(iterator=iter([21]), exhausted=None) == 42
    assert notes == ["outer in", "inner in", "inner out", "outer out"]


class Listed(Noting):
    """A wrapper around something every Lite does at start."""

    @hookimpl(wrapper=True)
    def strategy_setup(self) -> Generator[None, Any, Any]:
        self.notes.append(f"{self.name} in")
        result = yield
        self.notes.append(f"{self.name} out")
        return result


def test_the_first_listed_extension_is_outermost() -> None:
    """In plugins= the order is that of reading: what comes first is around what follows."""
    notes: list[str] = []
    with Lite(accelerator="cpu", devices=1, plugins=(Listed("first", notes), Listed("second", notes))) as lite:
        lite.launch()
    assert notes == ["first in", "second in", "second out", "first out"]


class First(Listed):
    """A wrapper that asks to be outermost, wherever it is listed."""

    @hookimpl(wrapper=True, tryfirst=True)
    def strategy_setup(self) -> Generator[None, Any, Any]:
        return (yield from Listed.strategy_setup(self))


class Last(Listed):
    """A wrapper that asks to be innermost, wherever it is listed."""

    @hookimpl(wrapper=True, trylast=True)
    def strategy_setup(self) -> Generator[None, Any, Any]:
        return (yield from Listed.strategy_setup(self))


def test_a_wrapper_may_ask_for_its_place() -> None:
    """``tryfirst`` is around all others, callbacks included, and ``trylast`` next to the provider.

    Of several that ask for the same place the first listed is nearest to it; callbacks count before extensions.
    """
    notes: list[str] = []
    extensions = (Last("5", notes), Listed("2", notes), Last("4", notes), Listed("3", notes), First("b", notes))
    callbacks = (Listed("1", notes), First("a", notes))
    with Lite(accelerator="cpu", devices=1, plugins=extensions, callbacks=callbacks) as lite:
        lite.launch()
    assert notes[:7] == [f"{name} in" for name in "ab12345"]
    assert notes[7:] == [f"{name} out" for name in "54321ba"]


def test_a_wrapper_sees_and_may_handle_what_the_provider_raises() -> None:
    """An exception of the provider goes through the wrappers to the caller."""

    class Guard(Extension):
        @hookimpl(wrapper=True)
        def strategy_next_batch(self, iterator: Iterator[Any], exhausted: Any) -> Generator[None, Any, Any]:
            try:
                return (yield)
            except ZeroDivisionError:
                return "handled"

    def failing(error: Exception) -> Iterator[Any]:
        yield from ()
        raise error

    hooks = bound(Plain(), Guard())
    assert hooks.strategy_next_batch(iterator=failing(ZeroDivisionError()), exhausted=None) == "handled"
    with pytest.raises(KeyError, match="x"):
        hooks.strategy_next_batch(iterator=failing(KeyError("x")), exhausted=None)


# ---------------------------------------------------------------------- what breaks the contract


class Taking(Extension):
    """Would provide what the strategy provides."""

    @hookimpl
    def strategy_backward(self, loss: Any) -> None:
        """Take over."""


class Misspelt(Strategy):
    """A hook that is none."""

    @hookimpl
    def strategy_backwards(self, loss: Any) -> None:
        """Never called."""


class Unmarked(Strategy):
    """Overrides without the mark."""

    def strategy_no_sync(self, module: Any, engine: Any, enabled: bool) -> Any:
        raise NotImplementedError

    def strategy_data_shard(self) -> tuple[int, int]:
        return 0, 1


class Misnamed(Strategy):
    """Takes an argument the hook does not have."""

    @hookimpl
    def strategy_next_batch(self, loader: Any) -> Any:  # type: ignore[override]
        return None


class KeywordOnly(Strategy):
    """Takes its arguments by keyword only."""

    @hookimpl
    def strategy_next_batch(self, *, iterator: Any, exhausted: Any) -> Any:  # type: ignore[override]
        return next(iterator, exhausted)


class Inside(Strategy):
    """Wraps its own hook, and does not provide it."""

    @hookimpl(wrapper=True)
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        return (yield)


class NoGenerator(Extension):
    """Says that it wraps, and does not yield."""

    @hookimpl(wrapper=True)
    def strategy_next_batch(self) -> None:
        """Nothing."""


class Forgetful(Extension):
    """Would wrap, would listen, but is not marked."""

    def strategy_backward(self) -> Any:
        yield

    def on_launch(self) -> None:
        """Never called."""


class Launching(Extension):
    """Wraps what happens before there is a job."""

    @hookimpl(wrapper=True)
    def launcher_launch(self) -> Any:
        return (yield)


@dataclass
class Alike(Extension):
    """A dataclass: two of them are equal."""

    size: int = 1

    @hookimpl
    def on_launch(self) -> None:
        """Hear it."""


@pytest.mark.parametrize(
    ("strategy", "extensions", "said"),
    [
        (
            Plain,
            (Taking,),
            r"extension object taking implements strategy_backward, which strategy 'plain' \(acme-pl",
        ),
        (Plain, (Taking,), r"mark it with @plugframe.hookimpl\(wrapper=True\) to wrap the provider"),
        (
            Misspelt,
            (),
            r"strategy 'misspelt' \(acme-plugins 1.2\) implements strategy_backwards, which is no hook. Did you mean "
            r"'strategy_backward'\?",
        ),
        (
            Unmarked,
            (),
            r"\(acme-plugins 1.2\) overrides strategy_data_shard, strategy_no_sync without a mark: add @p",
        ),
        (Misnamed, (), r"'misnamed' \(acme-plugins 1.2\) breaks the plugin contract: .* Argument\(s\) {'loader'}"),
        (KeywordOnly, (), r"strategy_next_batch takes iterator by keyword only, .* leave out the '\*'"),
        (
            Inside,
            (),
            r"'inside' \(acme-plugins 1.2\) does not provide the hook strategy_next_batch: implement it and",
        ),
        (Plain, (NoGenerator,), "extension object nogenerator breaks the plugin contract: .* not a generator function"),
        (Plain, (Forgetful,), "extension object forgetful overrides strategy_backward, on_launch without a mark"),
        (Plain, (Launching,), "extension object launching implements launcher_launch, and no launcher takes part in a"),
        (Plain, (Alike, Alike), "extension object alike equals another plugin in use: give its class eq=False"),
    ],
)
def test_a_plugin_that_breaks_the_contract(strategy: type, extensions: tuple[type, ...], said: str) -> None:
    """The plugin, its package, the hook and what to write are named before anything runs."""
    with pytest.raises(PluginContractError, match=said):
        bound(strategy(), *(extension() for extension in extensions), published=True)


def test_a_hook_the_base_has_no_default_for_must_be_provided() -> None:
    """What a subclass left out is named."""

    class Half(Accelerator):
        device_type = "cpu"

    binding = Binding()
    add(binding, "accelerator", Half(), published=True)  # type: ignore[abstract]
    with pytest.raises(
        PluginContractError,
        match=r"accelerator 'half' \(acme-plugins 1.2\) does not provide the hook accelerator_is_available: implement",
    ):
        binding.bind()


def _first_contract(kind: Kind) -> Any:
    """Return a plugin without base class, with those hooks of a kind that version 1 of the contract had."""
    hooks: dict[str, Any] = {}
    for name in kind.hooks:
        if since_of(getattr(kind.spec, name)) == 1:
            arguments = ", ".join(inspect.signature(getattr(kind.spec, name)).parameters)
            exec(f"def {name}({arguments}): return 'own'", hooks)
            hooks[name] = hookimpl(hooks[name])
    hooks.pop("__builtins__", None)
    return type("First", (), hooks)()


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.many], ids=lambda kind: kind.name)
def test_a_plugin_of_the_first_contract_lacks_no_hook(kind: Kind) -> None:
    """Hooks that are newer have their defaults, also for a plugin that inherits from nothing, and can be wrapped."""
    binding = Binding()
    add(binding, kind.name, _first_contract(kind))
    hooks = binding.bind()
    newer = [name for name in kind.hooks if since_of(getattr(kind.spec, name)) > 1]
    assert all(callable(getattr(hooks, name)) for name in kind.hooks)
    if kind.name == "collective":
        assert newer
        with pytest.raises(UnsupportedError, match="written for version 1 .* has no collective_send"):
            hooks.collective_send(tensor=torch.ones(1), dst=1, tag=0, group=None)


class Watching(Extension):
    """Wraps a hook that the provider does not have."""

    @hookimpl(wrapper=True)
    def collective_send(self, dst: int) -> Generator[None, Any, Any]:
        try:
            return (yield)
        except UnsupportedError:
            return dst


def test_a_default_can_be_wrapped() -> None:
    """A wrapper meets the default of a hook that the provider lacks."""
    binding = Binding()
    add(binding, "collective", _first_contract(KINDS["collective"]))
    add(binding, "extension", Watching())
    assert binding.bind().collective_send(tensor=torch.ones(1), dst=3, tag=0, group=None) == 3


def test_one_object_cannot_be_in_use_twice() -> None:
    """The same object as an extension and as a callback would hear everything twice."""
    extension = Noting("x", [])
    with pytest.raises(SettingError, match="extension object noting is given twice: keep one"):
        bound(Plain(), extension, extension)


def test_two_providers_of_one_kind_never_meet() -> None:
    """A second provider is refused as what it is: no wrapper."""
    binding = Binding()
    add(binding, "collective", Collective())
    add(binding, "extension", Collective())
    with pytest.raises(PluginContractError, match="extension object collective implements collective_setup, which"):
        binding.bind()


# ---------------------------------------------------------------------- notifications and loggers


class Hearing(Extension):
    """Listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def on_save(self, path: str) -> None:
        self.heard.append(path)


class Paper(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    @hookimpl
    def logger_log(self, metrics: Any, step: int | None) -> None:
        self.lines.append((dict(metrics), step))


def test_a_notification_nobody_listens_to_is_none() -> None:
    """Who would notify sees it and calls nothing."""
    hooks = bound(Plain())
    assert all(getattr(hooks, name) is None for name in KINDS["extension"].hooks)
    assert hooks.logger_log is None


def test_notifications_and_loggers_reach_everyone() -> None:
    """Any number may listen; each gets what it names of the arguments."""
    first, second = Hearing(), Hearing()
    hooks = bound(Plain(), first, second)
    hooks.on_save(path="here", state={})
    assert first.heard == second.heard == ["here"]
    assert hooks.on_load is None
    binding, papers = Binding(), [Paper(), Paper()]
    for paper in papers:
        add(binding, "logger", paper)
    binding.bind().logger_log(metrics={"loss": 1.0}, step=3)
    assert [paper.lines for paper in papers] == [[({"loss": 1.0}, 3)]] * 2


# ---------------------------------------------------------------------- tracing


def test_a_traced_pipeline_prints_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Traced, every hook is a real hook call, and shows its arguments in brief on stderr."""
    hooks = bound(Plain(), trace=True)
    assert hooks.strategy_next_batch(iterator=iter([5]), exhausted=None) == 5
    hooks.strategy_load_module_state(module=torch.nn.Linear(2, 1), state={}, strict=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "plugframe: strategy_next_batch(iterator=list_iterator, exhausted=NoneType)",
        "plugframe: strategy_load_module_state(module=Linear, state=dict, strict=False)",
    ]


def test_plugframe_trace_traces(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """PLUGFRAME_TRACE=1 prints what a script makes the plugins do; tensors by their shape."""
    monkeypatch.setenv("PLUGFRAME_TRACE", "1")
    with Lite(accelerator="cpu", devices=1) as lite:
        model = lite.setup(torch.nn.Linear(2, 1))
        lite.backward(model(torch.ones(3, 2)).mean())
    lines = capsys.readouterr().err.splitlines()
    assert "plugframe: accelerator_device(index=0)" in lines
    assert "plugframe: precision_convert_input(data=tuple)" in lines
    assert "plugframe: strategy_backward(loss=Tensor(), module=Linear, args=tuple, kwargs=dict)" in lines
    assert "plugframe: strategy_teardown()" in lines


def test_a_hook_without_a_module_is_a_hook_like_any() -> None:
    """Code that makes a function by hand may give it no module: that is no reason to fail."""
    function = hookimpl(FunctionType((lambda self: None).__code__, {}, "on_teardown"))
    assert function.__module__ is None
    plugin = type("Made", (), {"on_teardown": function})()
    binding = Binding()
    add(binding, "extension", plugin)
    assert binding.deprecations == []
