"""The command that sums a run up (what it writes: tests/report)."""

import pytest

from rlhf.cli.__main__ import main as rlhf
from rlhf.cli.summary import main
from tests.support.results import made_up_results, write_results


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["--nothing"]])
def test_anything_but_one_directory_prints_the_usage(arguments, capsys):
    for command, name in ((main, "python -m rlhf.cli.summary"), (lambda words: rlhf(["summary", *words]), "rlhf")):
        with pytest.raises(SystemExit) as stopped:
            command(arguments)
        assert stopped.value.code == 2
        assert f"usage: {name}" in capsys.readouterr().err


def test_a_run_without_results_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == rlhf(["summary", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_it_is_a_subcommand_too(tmp_path, capsys):
    write_results(tmp_path, made_up_results())
    assert rlhf(["summary", str(tmp_path)]) == 0
    as_a_subcommand = capsys.readouterr().out
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == as_a_subcommand and "held-out accuracy" in as_a_subcommand
    assert (tmp_path / "summary.json").is_file()
