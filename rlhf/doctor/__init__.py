"""Cheap checks of a run's metrics that explain themselves: while it trains, and afterwards from its files."""

from rlhf.doctor.checks import EVERY_STAGE, OFFLINE, ON_POLICY, REWARD, Check, examine
from rlhf.doctor.findings import SICKNESSES, Finding, Sickness, finding
from rlhf.doctor.monitor import HealthMonitor, record_stop
from rlhf.doctor.report import NotARunError, StageView, diagnose

__all__ = [
    "EVERY_STAGE",
    "OFFLINE",
    "ON_POLICY",
    "REWARD",
    "SICKNESSES",
    "Check",
    "Finding",
    "HealthMonitor",
    "NotARunError",
    "Sickness",
    "StageView",
    "diagnose",
    "examine",
    "finding",
    "record_stop",
]
