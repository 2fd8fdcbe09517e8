"""The rules of the precision contract, as failed tests show them."""

from __future__ import annotations

DTYPES = "Dtypes (parameters are stored, and results computed, in the dtypes of precision_dtypes())"
IN_PLACE = (
    'In place (a module is converted in place; its parameter objects stay, unless "replaces-modules" or '
    '"tensor-subclasses" is provided)'
)
LISTED = "Listed (the descriptor provides the names of what a conversion does to a module)"
UNTOUCHED = "Untouched (values other than floating-point tensors are unchanged, and containers keep their types)"
RETURNED = "Returned (a forward returns torch's default dtype, so that losses are computed in it)"
REFUSED = "Refused (a dtype the device does not support is an UnsupportedError, never replaced by another)"
GRADIENTS = "Gradients (after precision_unscale() they are unscaled, also after a second call)"
STEPS = "Steps (a step is that of plain torch, within the rounding of the dtypes)"
OVERFLOW = "Overflow (a step with non-finite gradients is skipped if, and only if, precision_unscale() returned True)"
CLOSURES = "Closures (a closure is evaluated once, or refused with an UnsupportedError)"
STATE = "State (precision_load_state() restores what precision_state() returned, and training continues identically)"
APART = "Apart (two objects are independent)"
TRAINING = "Training (a run under Lite ends near the one in plain torch)"
CLEAN = "Law 9 (nothing is left behind)"
