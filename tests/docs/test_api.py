"""Every public name is on the page of the API, and every method of `Lite` says what it takes, returns and raises."""

from __future__ import annotations

import inspect
import re

import pytest

import plugframe
import plugframe.errors
from paths import DOCS
from plugframe import Lite

PAGE = (DOCS / "api.md").read_text(encoding="utf-8")
METHODS = [
    name for name, value in vars(Lite).items() if not name.startswith("_") and inspect.isfunction(inspect.unwrap(value))
]


def test_every_public_name_is_on_the_page() -> None:
    """By a directive of its own; exceptions by that of their module, `Fabric` and the version in a sentence."""
    documented = set(re.findall(r"^::: plugframe\.(\w+)$", PAGE, re.M)) | set(re.findall(r"`plugframe\.(\w+)`", PAGE))
    errors = {name for name, value in vars(plugframe.errors).items() if inspect.isclass(value)}
    assert "errors" in documented
    assert set(plugframe.__all__) <= documented | errors
    undocumented = [name for name in plugframe.__all__ if not getattr(plugframe, name).__doc__]
    assert not undocumented


def test_the_methods_are_found() -> None:
    """Overloads, properties and inherited names left out."""
    assert {"setup", "backward", "save", "accumulate", "log"} <= set(METHODS)
    assert len(METHODS) > 40


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_takes_and_returns(name: str) -> None:
    """Its docstring has every argument, and ``Returns`` if there is a result."""
    method = inspect.unwrap(vars(Lite)[name])
    text = inspect.getdoc(method) or ""
    signature = inspect.signature(method)
    arguments = [each for each in signature.parameters if each != "self"]
    assert re.match(r"[A-Z].*\.", text)
    assert not [each for each in arguments if not re.search(rf"\b{each}\b", text)]
    if arguments:
        assert "Args:" in text
    if signature.return_annotation not in ("None", "Self", inspect.Signature.empty):
        assert "Returns:" in text or re.search(r"\breturn(s|ed)?\b", text, re.I)
