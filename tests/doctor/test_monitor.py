"""The monitor's file (what it finds and forgets: test_doctor.py)."""

from rlhf.doctor.monitor import HealthMonitor
from tests.doctor.test_doctor import CHECKS, history


def test_the_file_is_there_and_empty_from_the_first_line_on_wherever_it_is(tmp_path):
    directory = tmp_path / "runs" / "new" / "ppo"
    HealthMonitor(directory, "ppo", CHECKS["ppo"]).observe(1, history("ppo")[0])
    assert (directory / "health.jsonl").read_text() == ""
