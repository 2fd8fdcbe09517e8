"""Precision contract tests of dtypes: parameters, inputs, outputs and contexts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from plugframe.hooks import Dtypes
from plugframe.lite.conversion import Before
from plugframe.testing.contracts.precision_bench import PrecisionBench
from plugframe.testing.contracts.precision_rules import CLEAN, DTYPES, IN_PLACE, LISTED, RETURNED, UNTOUCHED
from plugframe.testing.contracts.running import broken


class _Pair(NamedTuple):
    value: Any
    label: str


@dataclasses.dataclass
class _Output:
    logits: Any
    note: str


class DtypeTests(PrecisionBench):
    """Tests of the dtypes of parameters, inputs, outputs and results."""

    def test_it_says_its_dtypes(self, plugin: Any) -> None:
        """precision_dtypes() returns two floating-point dtypes of torch."""
        dtypes = plugin.precision_dtypes()
        if not isinstance(dtypes, Dtypes):
            broken(DTYPES, f"precision_dtypes() gave {dtypes!r}, not plugframe.hooks.Dtypes")
        for name in ("parameter", "compute"):
            dtype = getattr(dtypes, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                broken(DTYPES, f"{name}={dtype!r} is not a floating-point dtype of torch")

    def test_a_module_is_converted_in_place(self, plugin: Any) -> None:
        """A module is converted in place to the parameter dtype; integer and complex tensors keep theirs."""
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(self.device)
        phase = nn.Parameter(torch.tensor([1 + 2j], device=self.device))
        module.register_parameter("phase", phase)
        before, layout = dict(module.named_parameters()), Before.of(module)
        found = plugin.precision_convert_module(module=module)
        if found is not module:
            broken(IN_PLACE, f"precision_convert_module() returned another {type(found).__name__} object")
        provides = self.descriptor.provides
        for capability, what in layout.changes(module):
            if capability not in provides:
                broken(LISTED, f"{what} after a conversion, and the descriptor does not provide {capability!r}")
        replaces = bool({"replaces-modules", "tensor-subclasses"} & set(provides))
        for name, parameter in module.named_parameters():
            if not replaces and parameter is not before[name]:
                broken(IN_PLACE, f"{name} was replaced: an optimizer created before would update the old one")
            if parameter.is_floating_point() and parameter.dtype is not plugin.precision_dtypes().parameter:
                wanted = plugin.precision_dtypes().parameter
                broken(
                    DTYPES, f"{name} of a converted module is {parameter.dtype}, and precision_dtypes() has {wanted}"
                )
        for name, tensor in (("num_batches_tracked", module.get_buffer("1.num_batches_tracked")), ("phase", phase)):
            if tensor.is_floating_point():
                broken(UNTOUCHED, f"{name} of a converted module became {tensor.dtype}")
        if phase.detach().cpu().to(torch.complex64).tolist() != [1 + 2j]:
            broken(UNTOUCHED, f"a complex parameter lost its imaginary part: {phase.tolist()}")

    @pytest.mark.parametrize("hook", ["precision_convert_input", "precision_convert_output"])
    def test_what_is_no_float_tensor_is_untouched(self, plugin: Any, hook: str) -> None:
        """Numbers, strings, integer tensors and containers of any kind are unchanged."""
        convert = getattr(plugin, hook)
        index, flag = torch.ones(2, dtype=torch.int64), torch.tensor([True])
        for value in (3, 2.5, "text", None, b"bytes", index, flag, object(), len):
            if convert(data=value) is not value:
                broken(UNTOUCHED, f"{hook} changed {value!r} into {convert(data=value)!r}")
        floats = torch.ones(2)
        data = {"a": (floats, index), "b": [floats, {"c": _Pair(floats, "x")}], "d": _Output(floats, "y"), "n": 3}
        found = convert(data=data)
        shown = (type(found), type(found["a"]), type(found["b"][1]["c"]), type(found["d"]), found["d"].note, found["n"])
        if shown != (dict, tuple, _Pair, _Output, "y", 3):
            broken(UNTOUCHED, f"{hook} changed containers: {shown}")
        if found["a"][1] is not index:
            broken(UNTOUCHED, f"{hook} changed an integer tensor inside a tuple")
        dtypes = {found["a"][0].dtype, found["b"][0].dtype, found["b"][1]["c"].value.dtype, found["d"].logits.dtype}
        if len(dtypes) > 1:
            broken(UNTOUCHED, f"{hook} converts tensors in some containers and not in others: {dtypes}")
        if dtypes == {torch.float32} and found is not data:
            broken(UNTOUCHED, f"{hook} copied a dict in which nothing changes: it is in the hot path")
        if floats.dtype is not torch.float32 or data["a"][0] is not floats:  # type: ignore[index]
            broken(UNTOUCHED, f"{hook} modified its input")

    def test_a_forward_computes_in_the_dtype(self, plugin: Any) -> None:
        """A linear layer in the forward context computes in the dtype; outputs have the default dtype."""
        module = plugin.precision_convert_module(module=self.model())
        x = plugin.precision_convert_input(data=self.data()[0])
        for time in ("first", "second"):
            with plugin.precision_forward_context():
                out = module(x)
            compute = plugin.precision_dtypes().compute
            if torch.finfo(compute).bits >= 16 and out.dtype is not compute:
                broken(DTYPES, f"the {time} forward computed in {out.dtype}, and precision_dtypes() has {compute}")
            found = plugin.precision_convert_output(data=out)
            if found.dtype is not torch.get_default_dtype():
                broken(
                    RETURNED, f"the {time} forward returned {found.dtype}, the default is {torch.get_default_dtype()}"
                )
        with plugin.precision_forward_context(), plugin.precision_forward_context():
            module(x)

    def test_a_module_is_built_in_the_dtype(self, plugin: Any) -> None:
        """Parameters created in precision_init_context() have the parameter dtype."""
        wanted = plugin.precision_dtypes().parameter
        with plugin.precision_init_context():
            made = nn.Linear(1, 1).weight.dtype
        if made is not wanted:
            broken(DTYPES, f"a module built in precision_init_context() is {made}, and precision_dtypes() has {wanted}")

    @pytest.mark.parametrize("hook", ["precision_init_context", "precision_forward_context"])
    def test_a_context_is_left_as_it_was_entered(self, plugin: Any, hook: str) -> None:
        """Leaving the context, also by an error, restores default dtype and autocast."""
        state = self._modes()
        for fails in (False, True):
            try:
                with getattr(plugin, hook)():
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            if self._modes() != state:
                after = "an error in it" if fails else "leaving it"
                broken(CLEAN, f"after {after}, {hook} leaves {self._modes()}; before there was {state}")
