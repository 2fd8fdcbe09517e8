"""Plugins that break one rule of the contract each, for the tests of the contract suites."""

from plugframe import Option, Plugin

_NAMES = {
    "checkpoint": "Right Narrows Unverified Unpickles InPlace Silent Litters Mumbles Lazy Overwrites Fibs Sticks",
    "environment": "Right Everywhere Swapped Crashes Agrees Stale Requeues Sets Timid",
    "launcher": "Right OnlyOne NoResult Swallows Leaves Stumbles Loses Strips Miscounts One Nameless Abandons Deaf",
    "logger": "Right Old Drops LosesOne Swaps Backwards Rounds Prints Finite FromOne EveryRank Early OneFile Waits "
    "Gives Cheerful Mute Discards Nags Overwrites Renames Twice Open",
    "strategy": "Right Alone Halves Finite Repeats Leaves Ignores Common Misnamed Mute Raises Unsent Unmarked Renamed "
    "Lacks Drifts Restarts Unequal Prefixes Adds Again Remembers Loses Talks Curt Insists",
    "collective": "Right Drops Writes Joins Adds Terse Rounds Cuts Reverses Everyone Passes Nameless Alone Hides Wide "
    "Leaves Single Swaps Sums Widens Turns Indexes Positions Converts Invents Pretends Shuffles Keeps Fits Detaches "
    "Anonymous First Spreads",
    "accelerator": "Right Counts Adds Settles Other Narrow Unheard Smoke Copies Draws Shrinks Indexed Leaves",
    "precision": "Right Full Copies Unlisted Halves Raw Settles Scaled Twice Steps Drops Forgets Common Stands Leaves",
    "extension": "Right Provides Repeats Forgets Swallows Nudges OnceOnly Leaves Amnesia Counts Unloaded Grows Objects "
    "Differs Skips",
}
_MORE = {
    "environment": {"priority": 70},
    "environment_Timid": {"priority": -1},
    "strategy": {"needs": {"collective": ("process-group",)}},
    "strategy_Ignores": {"options": (Option("bucket_cap_mb", int, 25, "size of a buffer"),)},
    "strategy_Misnamed": {"options": (Option("bucket_size", int, 25, "size of a buffer"),)},
    "strategy_Mute": {"summary": ""},
    "strategy_Loses": {"provides": ("local-backward",)},
    "collective": {"provides": ("process-group",)},
    "collective_Single": {"provides": (), "ranks": "one"},
    "accelerator": {"devices": ("cpu",)},
    "launcher": {"provides": ("function", "interactive")},
    "launcher_Stumbles": {"provides": ("function",)},
}

for _kind, _names in _NAMES.items():
    for _name in _names.split():
        _fields = {**_MORE.get(_kind, {}), **_MORE.get(f"{_kind}_{_name}", {})}
        if _kind == "environment":
            _fields["variables"] = (f"WRONG_{_name.upper()}_RANK",)
        _factory = f"plugframe_wrong.{_kind}:{_name}"
        globals()[f"{_kind}_{_name}"] = Plugin(factory=_factory, **{"summary": "Breaks a rule.", **_fields})
