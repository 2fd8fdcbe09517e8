"""From what was asked and what is installed to a plan: a pure function, tried without devices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from plugframe import (
    EnvironmentMismatchError,
    Option,
    PlugframeWarning,
    Plugin,
    PluginContractError,
    PluginError,
    PluginLoadError,
    SettingError,
    UnknownPluginError,
    UnsupportedError,
    hookimpl,
)
from plugframe.base import parse_devices
from plugframe.cli.plan_table import plan_rows
from plugframe.core.config.request import Request, Setting
from plugframe.core.planning.plan import Plan
from plugframe.core.planning.resolve import resolve
from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks.spelling import Given
from plugframe.hooks.world import World
from plugframe.launch.choose import choose_launcher

# ---------------------------------------------------------------------- a catalogue without devices


class Chip:
    """An accelerator with so many devices of a type; the plan asks it, nothing else does."""

    def __init__(self, type_: str, count: int, *, indexed: bool = True, available: Any = True) -> None:
        self.type, self.count, self.indexed, self.available = type_, count, indexed, available

    @hookimpl
    def accelerator_is_available(self) -> bool:
        if isinstance(self.available, Exception):
            raise self.available
        return bool(self.available)

    @hookimpl
    def accelerator_parse_devices(self, devices: Any) -> tuple[int, ...]:
        return parse_devices(devices, count=self.count, name=self.type, indexed=self.indexed)

    @hookimpl
    def accelerator_device(self, index: int) -> Any:
        return SimpleNamespace(type=self.type, index=index)


class Starter:
    """An environment that has started the processes of a world, or none."""

    def __init__(self, world: World | None = None, *, detects: Any = True) -> None:
        self.world, self.detects = world, detects

    @hookimpl
    def environment_detect(self) -> bool:
        if isinstance(self.detects, Exception):
            raise self.detects
        return bool(self.detects)

    @hookimpl
    def environment_launched(self) -> bool:
        return self.world is not None

    @hookimpl
    def environment_world(self) -> World:
        assert self.world is not None
        return self.world

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        assert self.world is not None
        for asked, there in ((num_processes, self.world.local_world_size), (num_nodes, self.world.num_nodes)):
            if asked not in (None, there):
                raise EnvironmentMismatchError(f"{asked} asked for, {there} started")


class Idle:
    """A plugin nothing is asked of while the plan is made."""


def plugin(**words: Any) -> Plugin:
    """Return a descriptor with a factory that is never imported, unless it is an alias or a tag."""
    alone = "alias_of" in words or "best_of" in words
    return Plugin(**words if alone else {"factory": "somewhere:Thing", **words})


@dataclass
class Shelf:
    """A catalogue of descriptors and objects, with the real registry's way of finding names."""

    plugins: dict[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def put(self, kind: str, name: str, descriptor: Any, thing: Any = None) -> Shelf:
        """Return a shelf with one more plugin; `name` may be qualified."""
        return Shelf({**self.plugins, (kind, name): (descriptor, thing if thing is not None else Idle())})

    def entries(self, kind: str | None = None) -> list[Entry]:
        return self._registry().entries(kind)

    def names(self, kind: str) -> list[str]:
        return self._registry().names(kind)

    def find(self, kind: str, name: str) -> Entry:
        return self._registry().find(kind, name)

    def shadowed(self, entry: Entry) -> bool:
        return self._registry().shadowed(entry)

    def refused(self, kind: str | None = None) -> dict[Entry, str]:
        return self._registry().refused(kind)

    def describe(self, entry: Entry) -> Plugin:
        descriptor: Plugin | Exception = self._of(entry)[0]
        if isinstance(descriptor, Exception):
            raise descriptor
        return descriptor

    def absent(self, entry: Entry) -> str | None:
        missing = self.describe(entry).requires
        return f"{missing[0]}: type pip install {missing[0]}" if missing else None

    def make(self, entry: Entry, options: Mapping[str, Any] | None = None) -> Any:
        self.made.append(f"{entry.kind} {entry.name}")
        thing = self._of(entry)[1]
        if isinstance(thing, Exception):
            raise thing
        return thing

    def _of(self, entry: Entry) -> tuple[Any, Any]:
        name = entry.name if entry.builtin else entry.qualified
        return self.plugins[entry.kind, name]

    def _registry(self) -> Registry:
        quiet = Registry([_entry(kind, name) for kind, name in self.plugins])
        quiet.describe = self.describe  # type: ignore[method-assign]
        return quiet


def _entry(kind: str, name: str) -> Entry:
    distribution, _, bare = name.rpartition(":")
    return Entry(kind, bare, f"somewhere:{bare}", distribution or "plugframe", "1.2" if distribution else "0.1.0")


SHELF = (
    Shelf()
    .put("accelerator", "host", plugin(devices=("cpu",), priority=0), Chip("cpu", 1, indexed=False))
    .put("accelerator", "chip", plugin(devices=("chip",), priority=90, tags=("big",)), Chip("chip", 4))
    .put("accelerator", "far", plugin(devices=("far",), priority=99, tags=("big",)), Chip("far", 8, available=False))
    .put("accelerator", "shy", plugin(devices=("shy",)), Chip("shy", 2))
    .put("accelerator", "big", plugin(best_of="big"))
    .put("strategy", "one", plugin(ranks="one", priority=100))
    .put("strategy", "many", plugin(priority=10, needs={"collective": ("group",)}))
    .put("strategy", "only", plugin(devices=("chip",), conflicts={"precision": ("wide",)}))
    .put("strategy", "many_forked", plugin(alias_of="many", implies={"launcher": "functions"}))
    .put("precision", "full", plugin(priority=10, provides=("wide",)))
    .put("precision", "half", plugin(priority=5))
    .put("precision", "h", plugin(alias_of="half"))
    .put("precision", "tiny", plugin(devices=("chip",)))
    .put("collective", "alone", plugin(ranks="one", priority=100))
    .put("collective", "wire", plugin(priority=10, provides=("group",)))
    .put("collective", "string", plugin())
    .put("checkpoint", "file", plugin(priority=10))
    .put("environment", "shell", plugin(priority=0), Starter())
    .put("launcher", "starter", plugin(priority=10, provides=("script", "function")))
    .put("launcher", "functions", plugin(priority=5, provides=("function", "interactive")))
    .put("logger", "paper", plugin())
    .put("extension", "guard", plugin())
    .put("extension", "watch", plugin())
)


def started(world: World) -> Shelf:
    """Return the shelf on a machine where somebody has started the processes."""
    return SHELF.put("environment", "scheduler", plugin(priority=50, variables=("JOB",)), Starter(world))


def ask(typed: Mapping[str, Any] | None = None, **code: Any) -> Request:
    """Return a request: keywords are the code's, `typed` came from the command line."""
    own = {f: Setting(v, "the code") for f, v in code.items() if v is not None}
    line = {f: Setting(v, f"the command line (--{f})") for f, v in (typed or {}).items()}
    return Request({**line, **own}, {f: s for f, s in line.items() if f in own})


def plan(shelf: Shelf = SHELF, typed: Mapping[str, Any] | None = None, **code: Any) -> Plan:
    """Resolve settings against a shelf, in a job if the shelf has a scheduler."""
    return resolve(ask(typed, **code), shelf, {"JOB": "1"})


def names(made: Plan) -> dict[str, str]:
    """Return the name chosen for each kind."""
    return {kind: choice.name for kind, choice in made.choices.items()}


# ---------------------------------------------------------------------- every combination

ACCELERATORS = (None, "host", "chip", "shy", "big", "far")
DEVICES = (None, 1, 2, "2", "0,2", [1], -1, 9)
STRATEGIES = (None, "one", "many", "only")
WORLDS = (None, World(), World(world_size=2, local_world_size=2), World(world_size=2, local_world_size=1, num_nodes=2))
COUNTS = {"host": 1, "chip": 4, "shy": 2}


def expected(accelerator: Any, devices: Any, strategy: Any, world: World | None) -> Any:
    """Say by other means what must come out: the kind of error, or the names and device indices."""
    stated = {1: 1, 2: 2, "2": 2, "0,2": 2, 9: 9}.get(devices) if not isinstance(devices, list) else len(devices)
    if world and stated not in (None, world.local_world_size):
        return EnvironmentMismatchError
    if accelerator == "far":
        return UnsupportedError
    device = accelerator if accelerator in COUNTS else "chip"
    whole = tuple(range(COUNTS[device]))
    if devices is None:
        auto = whole[:1] if strategy == "one" else whole
        indices = tuple(range(world.local_world_size)) if world else auto
    elif devices in ("0,2", [1]):
        indices = (0, 2) if devices == "0,2" else (1,)
        if device == "host" or indices[-1] not in whole:
            return SettingError
    else:
        indices = whole if devices == -1 else tuple(range(int(devices)))
        if device != "host" and len(indices) > len(whole):
            return SettingError
    if world and len(indices) != world.local_world_size:
        return EnvironmentMismatchError
    ranks = world.world_size if world else len(indices)
    if (strategy == "one" and ranks > 1) or (strategy == "only" and device != "chip"):
        return UnsupportedError
    chosen = strategy or ("one" if ranks == 1 else "many")
    precision = "half" if chosen == "only" else "full"
    collective = "wire" if chosen == "many" or ranks > 1 else "alone"
    return (device, chosen, precision, collective, indices, ranks)


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_combination_comes_to_what_it_must(accelerator: str | None) -> None:
    """Accelerator by name, tag or not at all; any devices; any strategy; started by somebody or not."""
    for devices, strategy, world in itertools.product(DEVICES, STRATEGIES, WORLDS):
        case = f"accelerator={accelerator} devices={devices} strategy={strategy} world={world}"
        shelf = started(world) if world else SHELF
        due = expected(accelerator, devices, strategy, world)
        try:
            made = plan(shelf, accelerator=accelerator, devices=devices, strategy=strategy)
        except (SettingError, UnsupportedError, EnvironmentMismatchError) as error:
            refused: Any = type(error)
            assert refused is due, f"{case}: {error}"  # noqa: PT017 - one case of many
            continue
        kinds = ("accelerator", "strategy", "precision", "collective")
        found = (*(made.choices[kind].name for kind in kinds), made.devices, made.world_size)
        assert found == due, case
        assert made.launched == (world is not None)
        assert all(reason for _, _, reason in plan_rows(made)), case
        for kind, value in (("accelerator", accelerator), ("strategy", strategy)):
            asked = "asked for in the code" in made.choices[kind].reason
            assert asked == (value is not None), f"{case}: {made.choices[kind].reason}"


# ---------------------------------------------------------------------- reasons


def test_every_choice_has_its_reason() -> None:
    """The plan says of every field why it is what it is."""
    made = plan(accelerator="big", precision="h", plugins=("guard",), loggers=("paper",))
    assert {what: why for what, _, why in plan_rows(made)} == {
        "accelerator": "asked for in the code: the best available; skipped far (no such device)",
        "devices": "auto: all of this machine",
        "nodes": "4 ranks in all",
        "strategy": "auto: the first that fits 4 ranks on chip",
        "precision": "'h' stands for it, asked for in the code",
        "collective": "auto: the first that fits 4 ranks on chip and provides 'group' for strategy 'many'",
        "checkpoint": "auto: the first that fits 4 ranks on chip",
        "environment": "auto: detected",
        "extension": "asked for in the code",
        "logger": "asked for in the code",
    }
    assert [value for what, value, _ in plan_rows(made) if what == "devices"] == ["4 on each node: 0, 1, 2, 3"]


def test_the_line_names_every_plugin_with_its_package() -> None:
    """One line lists each plugin with its package and version."""
    made = plan(SHELF.put("strategy", "acme-ddp:acme", plugin()), strategy="acme", devices=1, accelerator="host")
    assert made.line() == (
        "1 rank, accelerator host (plugframe 0.1.0), strategy acme (acme-ddp 1.2), precision full (plugframe 0.1.0), "
        "collective alone (plugframe 0.1.0), checkpoint file (plugframe 0.1.0), environment shell (plugframe 0.1.0)"
    )


def test_a_plan_of_several_nodes_counts_all_ranks() -> None:
    """Before anything is started, ranks are devices times nodes; a machine needs no job to say so."""
    made = plan(num_nodes=3, devices=2)
    assert (made.world_size, made.num_nodes, made.launched, names(made)["strategy"]) == (6, 3, False, "many")


def test_only_what_is_asked_about_this_machine_is_made() -> None:
    """Implementations are imported for what was asked to describe the machine, up to the first that fits."""
    shelf = replace(SHELF, made=[])
    plan(shelf, devices=2)
    assert shelf.made == ["environment shell", "accelerator far", "accelerator chip"]


def test_two_plans_of_one_request_are_alike() -> None:
    """The same arguments give the same plan."""
    first, second = (plan(devices=2, precision="half") for _ in range(2))
    assert plan_rows(first) == plan_rows(second)


# ---------------------------------------------------------------------- aliases and contradictions


def test_an_alias_brings_its_implications() -> None:
    """A strategy's alias chooses the strategy, and with it the launcher."""
    request = ask(strategy="many_forked", devices=2)
    made = resolve(request, SHELF, {})
    assert names(made)["strategy"] == "many"
    assert made.choices["strategy"].reason == "'many_forked' stands for it, asked for in the code"
    launcher = choose_launcher(request, SHELF, "function")
    assert launcher.name == "functions"
    assert "strategy='many_forked', which stands for launcher='functions'" in launcher.reason


def test_an_implication_may_be_repeated_but_not_contradicted() -> None:
    """What an alias stands for and what was asked besides must be the same plugin, however it is spelt."""
    assert plan(strategy="many_forked", launcher="plugframe:functions", devices=2)
    with pytest.raises(
        SettingError, match="launcher='starter' in the code, but 'functions' in strategy='many_forked', which stands"
    ):
        plan(strategy="many_forked", launcher="starter", devices=2)


def test_what_is_implied_on_the_command_line_counts_beside_the_code() -> None:
    """The code's plain name and the command line's alias of it agree, and the alias still says how to launch."""
    request = ask({"strategy": "many_forked"}, strategy="many", devices=2)
    assert names(resolve(request, SHELF, {}))["strategy"] == "many"
    assert choose_launcher(request, SHELF, "function").name == "functions"


@pytest.mark.parametrize(
    ("kind", "code", "typed"),
    [
        ("strategy", "many", "only"),
        ("precision", "full", "h"),
        ("accelerator", "host", "chip"),
        ("accelerator", "big", "host"),
        ("accelerator", "host", "big"),
        ("strategy", "acme-a:acme", "acme-b:acme"),
    ],
)
def test_code_and_command_line_contradict_each_other(kind: str, code: str, typed: str) -> None:
    """Two different plugins are an error that names both, and where each was asked for."""
    shelf = SHELF.put("strategy", "acme-a:acme", plugin()).put("strategy", "acme-b:acme", plugin())
    with pytest.raises(
        SettingError, match=rf"{kind}='{code}' in the code, but '{typed}' in the command line \(--{kind}\)"
    ):
        plan(shelf, {kind: typed}, **{kind: code})


@pytest.mark.parametrize(
    ("kind", "code", "typed", "name"),
    [
        ("strategy", "many", "plugframe:many", "many"),
        ("precision", "half", "h", "half"),
        ("accelerator", "big", "chip", "chip"),
        ("accelerator", "chip", "big", "chip"),
        ("accelerator", "big", "big", "chip"),
    ],
)
def test_two_spellings_agree(kind: str, code: str, typed: str, name: str) -> None:
    """A name, its alias, its qualified form and a tag it carries do not contradict each other."""
    assert names(plan(SHELF, {kind: typed}, **{kind: code}))[kind] == name


@pytest.mark.parametrize(
    ("code", "typed", "found"),
    [
        (("guard",), ("guard",), ["guard"]),
        (("guard",), ("plugframe:guard",), ["guard"]),
        (("guard",), ("watch",), None),
        (("guard", "watch"), ("watch", "guard"), None),
        ((Starter(),), ("guard",), ["guard"]),
    ],
)
def test_extensions_of_code_and_command_line(code: tuple[Any, ...], typed: tuple[str, ...], found: Any) -> None:
    """The same in the same order agree; other kinds of objects in plugins= leave the command line its say."""
    if found is not None:
        assert [choice.name for choice in plan(SHELF, {"plugins": typed}, plugins=code).extensions] == found
        return
    with pytest.raises(SettingError, match=r"plugins=\['guard'.*\] in the code, but \['watch'.*\] in the command line"):
        plan(SHELF, {"plugins": typed}, plugins=code)


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (
            {"strategy": "one", "devices": 2},
            UnsupportedError,
            "strategy='one' works with one rank, and there are 2: use strategy='many', or choose devices=1",
        ),
        (
            {"strategy": "only", "accelerator": "host"},
            UnsupportedError,
            "strategy='only' works on chip, and the device is cpu: use strategy='one' or 'many', or choose another acc",
        ),
        (
            {"strategy": "only", "precision": "full"},
            UnsupportedError,
            "precision='full' has 'wide', which strategy 'only' does not support: choose 'half' or 'tiny'",
        ),
        (
            {"precision": "tiny", "accelerator": "host"},
            UnsupportedError,
            "precision='tiny' works on chip, and the device is cpu: choose another precision or accelerator",
        ),
        (
            {"collective": "alone", "devices": 2, "strategy": "only", "precision": "half"},
            UnsupportedError,
            "collective='alone' works with one rank, and there are 2: choose 'wire'",
        ),
        (
            {"collective": "string", "devices": 2},
            UnsupportedError,
            "collective='string' does not provide 'group', which strategy 'many' needs: choose 'wire'",
        ),
        (
            {"accelerator": "far"},
            UnsupportedError,
            "accelerator='far' is not available on this machine: no such device. Available here: chip, host",
        ),
        ({"accelerator": "chip", "devices": 9}, SettingError, "devices=9 does not fit accelerator 'chip'"),
        ({"precision": ["full"]}, SettingError, "is neither the name of a plugin nor a precision object"),
        ({"strategy": Chip}, SettingError, r"neither the name .* Pass an instance: Chip\(\)"),
        ({"strategy": Chip("x", 1)}, SettingError, "neither the name of a plugin nor a strategy object"),
        ({"strategy": "mny"}, UnknownPluginError, r"Did you mean 'many'\?"),
        ({"plugins": ("paper",)}, UnknownPluginError, "extension='paper' is not installed. It is the name of a logger"),
        (
            {"plugins": (Idle(),)},
            SettingError,
            "is neither the name of a plugin nor an extension object. No method of it is marked",
        ),
        ({"plugins": ("guard", "guard")}, SettingError, "extension 'guard' is given twice in the code: keep one"),
        ({"plugins": (Starter(), Starter())}, SettingError, "holds 2 objects of the kind environment: one can be"),
        (
            {"plugins": (Starter(),), "environment": "shell"},
            SettingError,
            "environment is given twice: as 'shell' in the code, and in plugins=. Keep one",
        ),
        (
            {"plugins": (Chip("x", 1),), "accelerator": "big"},
            SettingError,
            "accelerator is given twice: as 'big' in the code",
        ),
    ],
)
def test_a_request_that_cannot_be_met(settings: dict[str, Any], error: type[Exception], said: str) -> None:
    """What was asked is never replaced: the error says what was asked, what was found and what to choose."""
    with pytest.raises(error, match=said):
        plan(**settings)


def test_nothing_fits() -> None:
    """Where nothing installed fits, that is said with what is installed."""
    bare = Shelf({key: value for key, value in SHELF.plugins.items() if key[1] not in ("many", "wire", "host", "chip")})
    with pytest.raises(UnsupportedError, match=r"accelerator='auto' finds no device .*: skipped far \(no such"):
        plan(bare)
    with pytest.raises(UnsupportedError, match="accelerator='big' finds no device on this machine"):
        plan(bare, accelerator="big")
    with pytest.raises(UnsupportedError, match="No installed strategy fits 2 ranks on shy. Installed: many_fork"):
        plan(bare, accelerator="shy")
    with pytest.raises(UnsupportedError, match="No installed environment recognises"):
        plan(SHELF.put("environment", "shell", plugin(priority=0), Starter(detects=False)))
    with pytest.raises(UnsupportedError, match="'auto' finds no device on this machine; none is installed"):
        plan(Shelf({("environment", "shell"): SHELF.plugins["environment", "shell"]}))


# ---------------------------------------------------------------------- needs and provides


def test_needs_of_any_plugin_are_met() -> None:
    """What an accelerator, a checkpoint, an extension or a logger needs of the collective counts like a strategy's."""
    needy = plugin(needs={"collective": ("group",)}, priority=10)
    cases: list[tuple[str, Any]] = [
        ("accelerator", "needy"),
        ("precision", "needy"),
        ("checkpoint", "needy"),
        ("plugins", ("needy",)),
        ("loggers", ("needy",)),
    ]
    for setting, value in cases:
        kind = {"plugins": "extension", "loggers": "logger"}.get(setting, setting)
        shelf = SHELF.put(kind, "needy", needy, Chip("cpu", 1, indexed=False))
        assert names(plan(shelf, devices=1, **{setting: value}))["collective"] == "wire", setting
        with pytest.raises(UnsupportedError, match=f"does not provide 'group', which {kind} 'needy' needs"):
            plan(shelf, devices=1, collective="alone", **{setting: value})


def test_needs_of_other_kinds_are_checked() -> None:
    """A need of something that was chosen before is checked, and one of something that cannot be needed refused."""
    picky = SHELF.put("strategy", "picky", plugin(needs={"accelerator": ("wheels",)}))
    with pytest.raises(UnsupportedError, match="accelerator 'chip' does not provide 'wheels', which strategy 'picky'"):
        plan(picky, strategy="picky")
    odd = SHELF.put("strategy", "acme:odd", plugin(needs={"colective": ("group",)}))
    with pytest.raises(PluginContractError, match=r"strategy odd \(acme 1.2\) has needs=.'colective'.* one of acc"):
        plan(odd, strategy="odd")


def test_auto_finds_what_provides_what_is_needed() -> None:
    """A checkpoint that shards is found for a strategy that needs one."""
    shelf = SHELF.put("checkpoint", "shards", plugin(priority=1, provides=("sharded",))).put(
        "strategy", "fully", plugin(needs={"checkpoint": ("sharded",)})
    )
    assert names(plan(shelf, strategy="fully"))["checkpoint"] == "shards"
    assert names(plan(shelf))["checkpoint"] == "file"


def test_what_conflicts_is_refused() -> None:
    """A strategy refuses what a precision does, not its name."""
    shelf = SHELF.put("precision", "acme:odd", plugin(provides=("autocast",)))
    assert names(plan(shelf, strategy="only", accelerator="chip", precision="odd"))["precision"] == "odd"
    assert names(plan(shelf, strategy="only", accelerator="chip"))["precision"] == "half"
    wide = SHELF.put("precision", "acme:odd", plugin(provides=("wide",)))
    with pytest.raises(
        UnsupportedError, match="'odd' has 'wide', which strategy 'only' does not support: choose 'half'"
    ):
        plan(wide, strategy="only", accelerator="chip", precision="odd")
    picky = SHELF.put("checkpoint", "picky", plugin(conflicts={"accelerator": ("big",)}, priority=1))
    shelf = picky.put("accelerator", "chip", plugin(devices=("chip",), priority=90, provides=("big",)), Chip("chip", 4))
    with pytest.raises(UnsupportedError, match="accelerator 'chip' has 'big', which checkpoint 'picky' does not supp"):
        plan(shelf, checkpoint="picky")


def test_names_of_precisions_are_deprecated() -> None:
    """A strategy of contract 1 lists names: they count, with a warning that says what replaces them."""
    shelf = SHELF.put("strategy", "acme:old", plugin(precisions=("half",)))
    with pytest.warns(
        PlugframeWarning, match=r"old \(acme 1.2\) lists the names .* replace precisions= .* by conflicts="
    ):
        assert names(plan(shelf, strategy="old"))["precision"] == "half"
    with (
        pytest.warns(PlugframeWarning, match="deprecated"),
        pytest.raises(UnsupportedError, match="'full' is not supported by strategy 'old': choose 'half'"),
    ):
        plan(shelf, strategy="old", precision="full")


def test_a_descriptor_depends_on_options() -> None:
    """What a plugin provides and needs, and how many ranks it takes, can follow from its options."""

    def ranks(options: Mapping[str, Any], num_ranks: int) -> str | None:
        return f"needs a multiple of stages={options['stages']} ranks" if num_ranks % options["stages"] else None

    staged = plugin(
        options=(Option("stages", int, 2), Option("shards", bool, False)),
        ranks=ranks,
        for_options=lambda options: {"needs": {"collective": ("group",)}} if options["shards"] else {},
    )
    shelf = SHELF.put("strategy", "staged", staged)
    assert names(plan(shelf, strategy="staged", devices=2))["collective"] == "wire"
    with pytest.raises(UnsupportedError, match="'staged' needs a multiple of stages=2 ranks, and there are 3: use"):
        plan(shelf, strategy="staged", devices=3)
    given = Given("strategy", "", "shards", "true", "the command line", "command")
    asked = replace(ask(strategy="staged", devices=2, collective="string"), options=(given,))
    with pytest.raises(UnsupportedError, match="'string' does not provide 'group', which strategy 'staged' needs"):
        resolve(asked, shelf, {})
    broken = SHELF.put("strategy", "acme:odd", plugin(for_options=lambda options: {"wings": 2}))
    with pytest.raises(PluginLoadError, match=r"odd \(acme 1.2\) is broken: for_options\(\) returned .*'wings': 2"):
        plan(broken, strategy="odd")


# ---------------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("wants", "name"), [("script", "starter"), ("function", "starter"), ("interactive", "functions")]
)
def test_the_launcher_is_the_most_eager_that_can(wants: str, name: str) -> None:
    """Launchers are told apart by what they can start."""
    assert choose_launcher(ask(), SHELF, wants).name == name


@pytest.mark.parametrize(
    ("launcher", "wants", "said"),
    [
        ("functions", "script", r"launcher='functions' cannot start a script again: call launch\(fn\) .*='starter'"),
        ("starter", "interactive", "cannot run a function that is typed at a prompt, or use launcher='functions'"),
    ],
)
def test_a_launcher_that_cannot_says_which_can(launcher: str, wants: str, said: str) -> None:
    """A launcher that was asked for is not replaced."""
    with pytest.raises(UnsupportedError, match=said):
        choose_launcher(ask(launcher=launcher), SHELF, wants)


def test_no_launcher_at_all() -> None:
    """Where nothing installed can start it, that is said, and a broken launcher is told."""
    nothing = Shelf().put("launcher", "acme:cannon", PluginLoadError("launcher 'cannon' (acme 1.2) is broken: x."))
    with (
        pytest.warns(PlugframeWarning, match="'cannon'"),
        pytest.raises(UnsupportedError, match="No installed launcher can start a script"),
    ):
        choose_launcher(ask(), nothing, "script")


# ---------------------------------------------------------------------- objects


class Striped:
    """A strategy object of a class nobody publishes."""

    @hookimpl
    def strategy_setup(self, context: Any) -> None:
        """Nothing to do."""


class Described(Striped):
    """One that carries its own descriptor."""

    plugin = Plugin(factory="mine:Described", ranks="one", priority=1)


class Wrapping:
    """An extension: it has a strategy's hook, as a wrapper."""

    @hookimpl(wrapper=True)
    def strategy_backward(self) -> Any:
        return (yield)


class Paper:
    """A logger object."""

    @hookimpl
    def logger_setup(self, context: Any) -> None:
        """Nothing to do."""


def test_an_object_is_used_as_it_is() -> None:
    """An object has the name of its class, and its own descriptor if it carries one."""
    thing = Striped()
    made = plan(strategy=thing, devices=2)
    choice = made.choices["strategy"]
    assert (choice.instance, choice.name, choice.origin) == (thing, "Striped", "Striped (an object in the code)")
    with pytest.raises(UnsupportedError, match="strategy='Described' works with one rank"):
        plan(strategy=Described(), devices=2)


def test_an_object_of_a_published_class_has_what_is_published_of_it() -> None:
    """Its descriptor counts, needs included, wherever the class is imported from."""
    described = Plugin(factory=f"{__name__}:Striped", needs={"collective": ("group",)})
    shelf = SHELF.put("strategy", "acme:striped", described)
    made = plan(shelf, strategy=Striped(), devices=1)
    assert (made.choices["strategy"].origin, names(made)["collective"]) == ("striped (acme 1.2)", "wire")
    assert names(plan(shelf, {"strategy": "striped"}, strategy=Striped()))["strategy"] == "striped"
    with pytest.raises(SettingError, match=r"strategy=Striped in the code, but 'many' in the command line"):
        plan(shelf, {"strategy": "many"}, strategy=Striped())


def test_objects_of_every_kind_go_into_plugins() -> None:
    """plugins= sorts objects by the hooks they provide; what only wraps is an extension."""
    things = (Starter(), Striped(), Wrapping(), Chip("cpu", 3, indexed=False), Paper())
    made = plan(plugins=(*things, "guard"), devices=2)
    assert (made.choices["environment"].instance, made.choices["strategy"].instance) == things[:2]
    assert made.choices["accelerator"].instance is things[3]
    assert [choice.name for choice in made.extensions] == ["Wrapping", "guard"]
    assert [choice.instance for choice in made.loggers] == [things[4]]


# ---------------------------------------------------------------------- environments


def test_environments_are_asked_the_most_eager_first() -> None:
    """The first whose variables are all set and who recognises the process is taken; nobody else is asked."""
    shelf = (
        replace(SHELF, made=[])
        .put("environment", "inner", plugin(priority=60, variables=("RANK", "PORT")), Starter(World()))
        .put("environment", "outer", plugin(priority=30, variables=("JOB",)), Starter(World()))
        .put("environment", "blind", plugin(priority=40), Starter(World(), detects=False))
        .put("environment", "never", plugin(variables=("JOB",)), Starter(World()))
    )

    def found(**environ: str) -> tuple[str, str]:
        choice = resolve(ask(devices=1), shelf, environ).choices["environment"]
        return choice.name, choice.reason

    assert found() == ("shell", "auto: detected")
    assert found(JOB="1") == ("outer", "auto: JOB set")
    assert found(JOB="1", RANK="0") == ("outer", "auto: JOB set")
    assert found(JOB="1", RANK="0", PORT="1") == ("inner", "auto: RANK, PORT set")
    assert "environment never" not in shelf.made


def test_an_environment_that_was_asked_for_is_not_detected() -> None:
    """Asked for by name, it is taken at its word."""
    shelf = SHELF.put("environment", "cluster", plugin(), Starter(World(), detects=False))
    assert names(plan(shelf, environment="cluster"))["environment"] == "cluster"


def test_a_broken_environment_is_passed_over_with_a_warning() -> None:
    """Whatever an environment does instead of answering, the next one is asked, and it is told."""
    broken = started(World()).put("environment", "acme:x", plugin(priority=99), Starter(detects=KeyError("JOB_ID")))
    with pytest.warns(PlugframeWarning, match=r"environment x \(acme 1.2\) failed in environment_detect: KeyError"):
        assert names(plan(broken))["environment"] == "scheduler"


def test_what_was_started_must_be_what_was_asked_for() -> None:
    """Counts, lists, and "all" are compared with what is there; nodes as well."""
    two = started(World(world_size=2, local_world_size=2))
    for settings in ({"devices": 3}, {"devices": "0,1,2"}, {"devices": [1]}, {"devices": -1}, {"num_nodes": 2}):
        with pytest.raises(EnvironmentMismatchError, match="asked for"):
            plan(two, **settings)
    assert plan(two, devices=[1, 3]).devices == (1, 3)
    assert plan(two, accelerator="shy", devices=-1).devices == (0, 1)


def test_more_processes_than_devices() -> None:
    """Processes that share a device by accident are refused, naming who started them."""
    nine = started(World(world_size=9, local_world_size=9))
    with pytest.raises(UnsupportedError, match="scheduler started 9 processes on this node, which do not fit its dev"):
        plan(nine)
    assert len(plan(nine, accelerator="host").devices) == 9


# ---------------------------------------------------------------------- broken packages


BROKEN = PluginLoadError("accelerator 'acme' (acme-accel 1.2) is broken: x.")


@pytest.mark.parametrize(
    ("shelf", "said"),
    [
        (SHELF.put("accelerator", "acme-accel:acme", BROKEN), r"'acme' \(acme-accel 1.2\) is broken"),
        (
            SHELF.put("accelerator", "acme-accel:acme", plugin(priority=999), BROKEN),
            r"is broken: x\. It was skipped under accelerator='auto'",
        ),
        (
            SHELF.put("accelerator", "acme:x", plugin(priority=999), Chip("x", 1, available=OSError("bus"))),
            r"x \(acme 1.2\) failed in accelerator_is_available: OSError: bus\. It was skipped",
        ),
        (
            SHELF.put("accelerator", "acme:x", plugin(priority=999, requires=("acme_sdk",)), Chip("x", 1)),
            r"'x' \(acme 1.2\) needs acme_sdk: type pip install acme_sdk\. It was skipped under accelerator='auto'",
        ),
    ],
)
def test_a_broken_accelerator_under_auto_is_a_warning_and_a_note(shelf: Shelf, said: str) -> None:
    """It is never a silent fall to another device: a warning names it, and the plan keeps it."""
    with pytest.warns(PlugframeWarning, match=said) as caught:
        made = plan(shelf)
    assert names(made)["accelerator"] == "chip"
    assert made.notes == tuple(str(warning.message) for warning in caught)
    assert len(caught) == 1


def test_a_broken_accelerator_that_is_asked_for_is_an_error() -> None:
    """By name there is no way round it; it does not disturb those who ask for another."""
    failing = SHELF.put("accelerator", "acme:x", plugin(priority=999), Chip("x", 1, available=OSError("bus")))
    with pytest.raises(
        UnsupportedError, match=r"accelerator='x' is not available .* OSError: bus\. Available here: ch"
    ) as e:
        plan(failing, accelerator="x")
    assert isinstance(e.value.__cause__, PluginError)
    with pytest.raises(PluginLoadError, match="acme-accel"):
        plan(SHELF.put("accelerator", "acme-accel:acme", plugin(), BROKEN), accelerator="acme")
    assert names(plan(failing, accelerator="host"))["accelerator"] == "host"


def test_only_rank_zero_warns() -> None:
    """All ranks pass the same things over; one of them tells."""
    for rank in range(2):
        shelf = started(World(global_rank=rank, local_rank=rank, world_size=2, local_world_size=2))
        shelf = shelf.put("accelerator", "acme-accel:acme", BROKEN)
        if rank == 0:
            with pytest.warns(PlugframeWarning, match="acme-accel"):
                plan(shelf)
        else:
            assert plan(shelf).notes == (str(BROKEN),)


def test_a_misspelt_variable_is_told_with_the_plan() -> None:
    """What `gather` noted is warned of and kept."""
    request = replace(ask(), notes=("The environment variable PLUGFRAME_X is not a setting.",))
    with pytest.warns(PlugframeWarning, match="PLUGFRAME_X"):
        assert resolve(request, SHELF, {}).notes == request.notes


@pytest.mark.parametrize(
    ("descriptor", "said"),
    [
        (plugin(alias_of="many_forked"), r"'x' \(acme 1.2\) is broken: it stands for 'many_forked', which is an alias"),
        (plugin(best_of="big"), "best_of= is for accelerators"),
        (plugin(implies={"lancher": "starter"}), "implies=.'lancher'.* names no kind of plugin"),
        (plugin(alias_of="gone"), "strategy='gone' is not installed"),
    ],
)
def test_a_descriptor_that_leads_nowhere(descriptor: Plugin, said: str) -> None:
    """Aliases of aliases, tags of other kinds and implications of nothing name the package at fault."""
    with pytest.raises((PluginLoadError, UnknownPluginError), match=said):
        plan(SHELF.put("strategy", "acme:x", descriptor), strategy="x")


def test_an_accelerator_that_gives_no_device() -> None:
    """An answer that breaks the contract is told as such."""

    class Empty(Chip):
        @hookimpl
        def accelerator_parse_devices(self, devices: Any) -> tuple[int, ...]:
            return ()

    with pytest.raises(PluginContractError, match=r"void \(acme 1.2\) returned no device"):
        plan(SHELF.put("accelerator", "acme:void", plugin(), Empty("void", 0)), accelerator="void")


def test_a_third_party_cannot_take_over_auto_under_a_built_in_name() -> None:
    """A shadowed plugin is not picked however eager it is; qualified, it is there."""
    shelf = SHELF.put("strategy", "acme:many", plugin(priority=1000))
    assert plan(shelf, devices=2).choices["strategy"].qualified == "plugframe:many"
    assert plan(shelf, devices=2, strategy="acme:many").choices["strategy"].qualified == "acme:many"
