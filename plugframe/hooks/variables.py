"""Names of the environment variables that plugframe reads."""

from __future__ import annotations

#: Set for ranks by their launcher.
LAUNCHED = "PLUGFRAME_LAUNCHED"
#: Set for ranks beside one under a debugger: disables the timeouts that the code sets.
PATIENT = "PLUGFRAME_PATIENT"
#: Rendezvous file of the ranks of one node, in a folder that only the owner of the job can open.
MEETING = "PLUGFRAME_JOB_STORE"
#: Shared by the ranks of a job, and by the launchers of several nodes; see `plugframe.base.job_token`.
TOKEN = "PLUGFRAME_JOB_TOKEN"
#: A number unique to the job and equal on all ranks: the default seed.
JOB_SEED = "PLUGFRAME_JOB_SEED"
#: Set by a rank for the programs it starts: see `plugframe.launch.inheritance`.
RANK = "PLUGFRAME_RANK"
#: Names of the settings from the command line, so that messages can distinguish them from variables set by hand.
FROM_COMMAND_LINE = "PLUGFRAME_FROM_COMMAND_LINE"
#: Path of the settings file, instead of the one found by searching.
CONFIG = "PLUGFRAME_CONFIG"
#: Plugins and packages that are never imported, and the only ones that may be imported.
DISABLE, ALLOW = "PLUGFRAME_DISABLE", "PLUGFRAME_ALLOW"
#: Prints every call of a hook, if it is "1".
TRACE = "PLUGFRAME_TRACE"
#: Makes the line that a job prints at its start show every plugin with its package and version, if it is "1".
VERBOSE = "PLUGFRAME_VERBOSE"

#: All variables that are not a setting of `Lite`.
ALL = (LAUNCHED, PATIENT, MEETING, TOKEN, JOB_SEED, RANK, FROM_COMMAND_LINE, CONFIG, DISABLE, ALLOW, TRACE, VERBOSE)
