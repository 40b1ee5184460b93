"""Muon for one device and for many, and who gets it; needs torch alone."""

from muonrec.optim.distributed_muon import DistributedMuon
from muonrec.optim.muon import Muon
from muonrec.optim.newton_schulz import JORDAN_COEFFICIENTS, orthogonalize
from muonrec.optim.param_groups import Assignment, Role, RoleRule, Routing, format_routing, param_groups
from muonrec.optim.schedule import SCHEDULES, Schedule
from muonrec.optim.update import Split

__all__ = [
    "JORDAN_COEFFICIENTS",
    "SCHEDULES",
    "Assignment",
    "DistributedMuon",
    "Muon",
    "Role",
    "RoleRule",
    "Routing",
    "Schedule",
    "Split",
    "format_routing",
    "orthogonalize",
    "param_groups",
]
