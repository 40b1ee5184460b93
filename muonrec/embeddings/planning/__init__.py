"""Planning: what each rank of a cluster that is not there would hold, send and compute.

TorchRec's planner places the tables, on the meta device; the rest is arithmetic on the shapes. `describe_job` reads a
model, `plan_job` plans it, `find_changes` says what makes a plan fit that does not.
"""

from muonrec.embeddings.planning.accounts import IN_PASSES, IN_STEP, PERSISTENT, Collective, Plan, plan_job
from muonrec.embeddings.planning.changes import MOST_RANKS, Change, find_changes
from muonrec.embeddings.planning.job import Cluster, DenseParameter, Job, Table, Workload, describe_job
from muonrec.embeddings.planning.placement import Placement

__all__ = [
    "IN_PASSES",
    "IN_STEP",
    "MOST_RANKS",
    "PERSISTENT",
    "Change",
    "Cluster",
    "Collective",
    "DenseParameter",
    "Job",
    "Placement",
    "Plan",
    "Table",
    "Workload",
    "describe_job",
    "find_changes",
    "plan_job",
]
