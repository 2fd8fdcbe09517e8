"""Environment variables that ranks get from what started them."""

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
