"""Cheap checks of a run's metrics that explain themselves: while it trains, and afterwards from its files."""

from rlhf.doctor.checks import CHECKS, check
from rlhf.doctor.findings import SICKNESSES, Finding, Sickness, finding
from rlhf.doctor.monitor import HealthMonitor, record_stop
from rlhf.doctor.report import NotARunError, diagnose

__all__ = [
    "CHECKS",
    "SICKNESSES",
    "Finding",
    "HealthMonitor",
    "NotARunError",
    "Sickness",
    "check",
    "diagnose",
    "finding",
    "record_stop",
]
