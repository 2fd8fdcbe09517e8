"""The rules of the collective contract, as failed checks show them."""

from __future__ import annotations

LAW_5 = "Law 5 (one shape law for any number of ranks: all_gather stacks, all_reduce and broadcast keep the shape)"
REDUCED = "Reduced (each reduction computes what its name says and keeps the dtype)"
INPUTS = "Inputs (inputs are not changed, and results are new and contiguous)"
MISMATCH = "Mismatch (unequal shapes or dtypes are a CollectiveMismatchError on all ranks, listing them)"
REFUSED = "Refused (a reduction without an exact result is a SettingError that says what to use)"
GRADIENTS = "Gradients (with sync_grads they reach every rank's input)"
OBJECTS = "Objects (any object that can be pickled is gathered in rank order, and broadcast from its source)"
GROUPS = "Groups (a group contains the ranks it was created with)"
BARRIERS = "Barriers (a barrier returns once all ranks have entered it, and a monitored one names missing ranks)"
IN_TIME = "In time (a collective that a rank does not call is an error after the timeout)"
CAPABLE = "Capable (it provides 'process-group' if collective_process_group() gives one, and only then)"
LOOPBACK = "Loopback (on one node every port listens on loopback only)"
LAW_9 = "Law 9 (nothing is left behind)"
