"""The rules of the collective contract, as failed checks show them."""

from __future__ import annotations

LAW_5 = "Law 5 (one shape law for any number of ranks: all_gather stacks, all_reduce and broadcast keep the shape)"
REDUCED = "Reduced (each reduction computes what its name says, in the dtype it was given)"
INPUTS = "Inputs (what is passed in is never changed, and results are new and contiguous)"
MISMATCH = "Mismatch (unequal shapes or dtypes are a CollectiveMismatchError on all ranks, listing them)"
REFUSED = "Refused (a reduction that has no exact result is a SettingError that says what to use)"
GRADIENTS = "Gradients (with sync_grads they flow back to every rank's input)"
OBJECTS = "Objects (any object that can be pickled is gathered in rank order, and broadcast from its source)"
GROUPS = "Groups (a group holds the ranks it was made of)"
BARRIERS = "Barriers (a barrier returns once all are there, and a monitored one names who is missing)"
IN_TIME = "In time (an exchange that a rank does not take part in is an error after the timeout)"
CAPABLE = "Capable (it provides 'process-group' if collective_process_group() gives one, and only then)"
LOOPBACK = "Loopback (on one node nothing listens on other interfaces than loopback)"
LAW_9 = "Law 9 (nothing is left behind)"
