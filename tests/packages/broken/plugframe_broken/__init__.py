"""Descriptors, most of them of something that cannot work."""

from plugframe import Plugin

_STRATEGIES = "plugframe_broken.strategies"

not_a_plugin = {"factory": f"{_STRATEGIES}:Usurper"}
newer = Plugin(factory=f"{_STRATEGIES}:Usurper", api=99)
unmarked = Plugin(factory=f"{_STRATEGIES}:Unmarked")
unknown = Plugin(factory=f"{_STRATEGIES}:Unknown")
raising = Plugin(factory=f"{_STRATEGIES}:Raising")
needy = Plugin(
    factory=f"{_STRATEGIES}:Usurper", requires=("acme_vendor_sdk",), extra="plugframe-broken[sdk]", priority=999
)
strategies = Plugin(factory=f"{_STRATEGIES}:Usurper")
usurper = Plugin(factory=f"{_STRATEGIES}:Usurper", priority=1000)
broken_chip = Plugin(factory="plugframe_broken.chip:Chip", priority=1000)
