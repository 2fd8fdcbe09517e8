"""The rules of the strategy contract, as failed checks show them."""

from __future__ import annotations

LAW_4 = "Law 4 (a run that is stopped and resumed ends bit for bit where the uninterrupted one ends)"
LAW_6 = "Law 6 (gradients on N ranks equal those of one process on the whole batch)"
LAW_7 = "Law 7 (clip_gradients gives the norm of one process, and the same error on gradients that are not finite)"
LAW_8 = "Law 8 (evaluation over N ranks sees every sample exactly once)"
LAW_9 = "Law 9 (nothing is left behind)"
START = "Start (training begins with the weights of rank 0 on all ranks, also for modules made without storage)"
STATE = "State (a checkpoint has the user's keys and full tensors, and loads on any number of ranks)"
STATISTICS = "Statistics (running statistics, which have no gradients, are equal on all ranks after a step)"
OWN = "Own objects (set-up keeps the user's own model and optimizer objects, and tear-down restores them)"
ONCE = "Once (a wrapper sees each call of the script once)"
SKIPPED = "Skipped (a step that an extension skips on one rank is made on no rank)"
APART = "Apart (two jobs are independent)"
LOCAL = "Local backward (with 'local-backward' strategy_no_sync calls no collective, and a later backward averages)"
