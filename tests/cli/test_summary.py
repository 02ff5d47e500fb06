"""The command that sums a run up (what it writes: tests/report)."""

import pytest

from rlhf.cli.summary import main


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["--help"]])
def test_anything_but_one_directory_prints_the_usage(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: python -m rlhf.cli.summary OUTPUT_DIR" in capsys.readouterr().err


def test_a_run_without_results_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
