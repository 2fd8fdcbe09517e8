"""Names of the environment variables that plugframe reads: those that ranks get, and those that are settings."""

from __future__ import annotations

#: Set for ranks by what launched them.
LAUNCHED = "PLUGFRAME_LAUNCHED"
#: Set for ranks that wait for one under a debugger: no timeout in the code shall end them.
PATIENT = "PLUGFRAME_PATIENT"
#: The file in which the ranks of one node meet, in a folder that only the owner of the job can open.
MEETING = "PLUGFRAME_JOB_STORE"
#: Shared by the ranks of a job, and by the launchers of several nodes; see `plugframe.base.job_token`.
TOKEN = "PLUGFRAME_JOB_TOKEN"
#: A number that all ranks of a job share and no other job has: the seed where the code asks for any.
JOB_SEED = "PLUGFRAME_JOB_SEED"
#: Set by a process that acts as a rank, for the programs it starts: see `plugframe.launch.inheritance`.
RANK = "PLUGFRAME_RANK"
#: Names the settings that a command line set, so that a message can tell them from variables set by hand.
FROM_COMMAND_LINE = "PLUGFRAME_FROM_COMMAND_LINE"
#: Names the settings file, in the place of the one that is found.
CONFIG = "PLUGFRAME_CONFIG"
#: Plugins and packages that are never imported, and the only ones that may be.
DISABLE, ALLOW = "PLUGFRAME_DISABLE", "PLUGFRAME_ALLOW"
#: Prints every call of a hook, if it is "1".
TRACE = "PLUGFRAME_TRACE"

#: All that are no setting of `Lite`.
ALL = (LAUNCHED, PATIENT, MEETING, TOKEN, JOB_SEED, RANK, FROM_COMMAND_LINE, CONFIG, DISABLE, ALLOW, TRACE)
