"""The rules of the precision contract, as failed tests show them."""

from __future__ import annotations

DTYPES = "Dtypes (parameters are kept, and numbers computed, in the dtypes that precision_dtypes() says)"
IN_PLACE = "In place (a module that is converted is the user's own, and so are its parameters)"
UNTOUCHED = "Untouched (what is no floating-point tensor goes through as it is, and containers keep their types)"
RETURNED = "Returned (what a forward returns is in torch's default dtype, so that losses are computed in it)"
REFUSED = "Refused (a dtype the device does not compute in is an UnsupportedError, never another dtype)"
GRADIENTS = "Gradients (precision_unscale() leaves them true to size, however often it is called)"
STEPS = "Steps (a step is that of plain torch, as far as the dtypes allow)"
OVERFLOW = (
    "Overflow (a step with gradients that are not finite is skipped if precision_unscale() says so, and only then)"
)
CLOSURES = "Closures (a closure is evaluated as it should be, or refused with an UnsupportedError)"
STATE = "State (what precision_state() gives, precision_load_state() takes, and training goes on the same)"
APART = "Apart (two objects of it do not see each other)"
TRAINING = "Training (a run under Lite ends near the one in plain torch)"
CLEAN = "Law 9 (nothing is left behind)"
