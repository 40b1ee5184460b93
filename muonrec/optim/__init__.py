"""Muon for one device and for many, and who gets it; needs torch alone."""

from muonrec.optim.capture import capture_step
from muonrec.optim.distributed_muon import DistributedMuon
from muonrec.optim.muon import Muon
from muonrec.optim.newton_schulz import COEFFICIENT_SETS, JORDAN_COEFFICIENTS, orthogonalize
from muonrec.optim.param_groups import Assignment, Role, RoleRule, Routing, format_routing, param_groups
from muonrec.optim.schedule import SCHEDULES, Schedule
from muonrec.optim.update import Split

__all__ = [
    "COEFFICIENT_SETS",
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
    "capture_step",
    "format_routing",
    "orthogonalize",
    "param_groups",
]
