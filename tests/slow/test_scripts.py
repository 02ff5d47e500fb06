"""The shell entry points and the Python behind them: arguments sorted, environments reused, results summed up."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.algorithms.config import OFFLINE_CONSTANTS
from rlhf.pipeline.arguments import sort_arguments
from rlhf.pipeline.stages import parse_stage
from tests.support.results import made_up_results

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "training_scripts"
ALL_SCRIPTS = [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci" / "run"]


def bare_environment(**more):
    """What a new shell has: no variable of this process but HOME and PATH."""
    return {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], **more}


def bash(*words, env=None, cwd=ROOT, timeout=120):
    environment = bare_environment(RLHF_PYTHON=sys.executable) if env is None else env
    command = ["bash", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_executable(script):
    done = bash("-n", script)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    "script", ["run_all.sh", "run_sft.sh", "run_reward.sh", "run_ppo.sh", "run_dpo.sh", "run_rrhf.sh"]
)
def test_help_explains_without_an_environment(script, tmp_path):
    done = bash(SCRIPTS / script, "--help", env=bare_environment(RLHF_PYTHON="/nowhere/python"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for option in ("--config", "--base_model", "--preference_data", "--num_devices", "--overwrite", "--help-all"):
        assert option in done.stdout
    assert len(done.stdout.splitlines()) <= 30, "one screen"
    assert "[setup]" not in done.stdout


def test_every_offline_algorithm_has_a_script_of_its_own():
    for algorithm in OFFLINE_CONSTANTS:
        command = (SCRIPTS / f"run_{algorithm}.sh").read_text(encoding="utf-8").splitlines()[-1]
        words = command.split('run_all.sh" ')[1].split(' "$@"')[0].split()
        sorted_words = sort_arguments(words, user_dir=ROOT, over_an_earlier_run=True)
        assert sorted_words.stages == ("offline",)
        assert parse_stage("offline", sorted_words.stage_arguments["offline"]).offline.algorithm == algorithm


def test_run_all_refuses_an_unknown_option_before_any_stage(tmp_path):
    done = bash(SCRIPTS / "run_all.sh", "--learning_rat", "1e-4", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "unknown option --learning_rat" in done.stderr and "--learning_rate" in done.stderr
    assert "===" not in done.stdout and not (tmp_path / "out").exists()


@pytest.fixture
def fake_project(tmp_path):
    """A copy of the project whose stages are checked like the real ones, then only write down how they were called."""
    project = tmp_path / "project"
    for folder in ("training_scripts", "rlhf"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", project)
    for stage, folder in (("sft", "step1_sft"), ("reward", "step2_reward"), ("ppo", "step3_ppo")):
        (project / folder).mkdir()
        (project / folder / "main.py").write_text(
            "import json, os, runpy, sys\n"
            "from pathlib import Path\n"
            "if __name__ != '__main__':\n"
            f"    main = runpy.run_path({str(ROOT / folder / 'main.py')!r})['main']\n"
            "else:\n"
            "  arguments = [word for word in sys.argv[1:] if not word.startswith('--local_rank')]\n"
            f"  directory = Path(arguments[arguments.index('--output_dir') + 1]) / '{stage}'\n"
            "  directory.mkdir(parents=True, exist_ok=True)\n"
            "  if os.environ.get('RANK', '0') != '0': sys.exit(0)\n"
            "  print('called', json.dumps(arguments), os.getcwd(), os.environ.get('WORLD_SIZE', '1'))\n"
            f"  if '{stage}' == os.environ.get('STOP_AT'): sys.exit(7)\n"
            f"  if '{stage}' == os.environ.get('NO_RESULT_AT'): sys.exit(0)\n"
            f"  if '{stage}' == os.environ.get('BUG_AT'): raise KeyError('a bug')\n"
            f"  result = json.loads(Path(os.environ['RESULTS']).read_text())['{stage}']\n"
            "  (directory / 'result.json').write_text(json.dumps(result))\n",
            encoding="utf-8",
        )
    results = tmp_path / "results.json"
    results.write_text(json.dumps(made_up_results()), encoding="utf-8")
    return project, bare_environment(RLHF_PYTHON=sys.executable, RESULTS=str(results), DS_ACCELERATOR="cpu")


def test_run_all_calls_the_stages_through_the_launcher_and_sums_up(fake_project, tmp_path):
    project, environment = fake_project
    row = json.dumps({"instruction": "질문", "output": "답변"}, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(f"{row}\n" * 40, encoding="utf-8")
    words = [
        "--sft_data",
        "mine.jsonl",
        "--output_dir",
        "out here",
        "--num_devices",
        "2",
        "--reward.seed",
        "5",
        "--seed=3",
    ]
    done = bash(project / "training_scripts" / "run_all.sh", *words, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line.split("called ", 1)[1] for line in done.stdout.splitlines() if "called " in line]
    assert len(calls) == 3, "three stages, one call on rank 0 each"
    assert all(call.endswith(f"{project} 2") for call in calls), "stages run in the project's root as a world of two"
    sft = json.loads(calls[0].rsplit("]", 1)[0] + "]")
    assert sft == [
        "--sft_data",
        str(tmp_path / "mine.jsonl"),
        "--output_dir",
        str(tmp_path / "out here"),
        "--seed",
        "3",
    ]
    reward = json.loads(calls[1].rsplit("]", 1)[0] + "]")
    assert "--sft_data" not in reward and reward[-2:] == ["--seed", "5"]
    assert "held-out accuracy" in done.stdout
    written = json.loads((tmp_path / "out here" / "summary.json").read_text(encoding="utf-8"))
    assert written["reward"]["accuracy"] == 0.85


@pytest.mark.parametrize(("variable", "status"), [("STOP_AT", "7"), ("NO_RESULT_AT", "0")])
def test_run_all_stops_at_the_stage_that_fails(fake_project, tmp_path, variable, status):
    project, environment = fake_project
    (tmp_path / "out" / "reward").mkdir(parents=True)
    (tmp_path / "out" / "reward" / "result.json").write_text("{", encoding="utf-8")  # of an earlier run, and damaged
    environment = {**environment, variable: "reward"}
    words = ["--output_dir", "out", "--resume", "auto"]
    done = bash(project / "training_scripts" / "run_all.sh", *words, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    assert f"stage reward (step2_reward/main.py) failed with status {status}" in done.stderr
    assert "1/3" in done.stdout and "2/3" in done.stdout and "3/3" not in done.stdout
    assert "exits with return code" not in done.stdout + done.stderr, "the launcher has nothing to add"
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_bug_shows_its_traceback_whole_and_the_launcher_adds_nothing(fake_project, tmp_path):
    project, environment = fake_project
    words = ["--output_dir", "out", "--stages", "sft"]
    done = bash(project / "training_scripts" / "run_all.sh", *words, env={**environment, "BUG_AT": "sft"}, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    start = lines.index("Traceback (most recent call last):")
    assert "main.py" in lines[start + 1] and lines[-2] == "KeyError: 'a bug'"
    assert lines[-1].startswith("error: stage sft (step1_sft/main.py) failed with status 1; its messages are above")
    assert "launch.py" not in done.stdout + done.stderr


def test_a_signal_during_the_check_ends_it_and_changes_nothing(fake_project, tmp_path):
    project, environment = fake_project
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "result.json").write_text('{"seconds": 1}', encoding="utf-8")
    process = subprocess.Popen(
        ["bash", str(project / "training_scripts" / "run_all.sh"), "--output_dir", "out", "--overwrite"],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = []
    for line in process.stdout:
        said.append(line)
        if "checking every stage" in line:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert process.wait(timeout=30) == 0
    assert said[-1] == "run_all.sh: stopped by SIGINT before anything was changed\n", said
    assert (tmp_path / "out" / "sft" / "result.json").exists()


# ----------------------------------------------------------------------------------------------- the environment


def fake_environment(path):
    """A directory that looks like an environment: its python is this one."""
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)


def stamp_key(project):
    content = (project / "setup.cfg").read_bytes() + (project / "training_scripts" / "constraints.txt").read_bytes()
    done = subprocess.run(["sha256sum"], input=content, capture_output=True, check=True)
    return done.stdout.decode()[:16]


@pytest.fixture
def lacking_project(tmp_path):
    """A project that no running Python satisfies, with an environment stamped as complete."""
    project = tmp_path / "project"
    shutil.copytree(SCRIPTS, project / "training_scripts")
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    text = text.replace("install_requires =\n", "install_requires =\n    no-such-package-anywhere>=1\n")
    (project / "setup.cfg").write_text(text, encoding="utf-8")
    fake_environment(project / ".venv")
    (project / ".venv" / "rlhf.stamp").write_text(f"{stamp_key(project)} quantization\n", encoding="utf-8")
    return project


def test_the_running_python_is_used_when_it_has_everything():
    done = bash("-c", f"source {SCRIPTS}/setup_env.sh && command -v python && echo $PYTHONPATH")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"[setup] using {sys.executable}, which has everything"
    assert Path(lines[1]).parent == Path(sys.executable).parent and lines[2] == str(ROOT)


def test_a_made_environment_is_reused_at_once(lacking_project):
    done = bash(lacking_project / "training_scripts" / "setup_env.sh", env=bare_environment(), timeout=10)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[setup] using {lacking_project}/.venv\n"


def environment_without_compiler(project):
    """A PATH without g++: a set-up that wants to install stops at its first check, before pip is asked for anything."""
    tools = project / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "sha256sum", "cut", "grep", "head", "paste", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return {"HOME": os.environ["HOME"], "PATH": str(tools), "RLHF_PYTHON": sys.executable}


@pytest.mark.parametrize("change", ["setup.cfg", "training_scripts/constraints.txt"])
def test_changed_requirements_or_pins_make_the_environment_anew(lacking_project, change):
    with open(lacking_project / change, "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    environment = environment_without_compiler(lacking_project)
    done = bash(lacking_project / "training_scripts" / "setup_env.sh", env=environment)
    assert done.returncode != 0
    assert "no-such-package-anywhere is not installed" in done.stdout
    assert "no C++ compiler" in done.stderr and "build-essential" in done.stderr


def test_an_environment_without_development_tools_is_not_used_for_tests(lacking_project):
    stamp = lacking_project / ".venv" / "rlhf.stamp"
    stamp.write_text(f"{stamp_key(lacking_project)} quantization,dev\n", encoding="utf-8")
    for words in ([], ["--dev"]):
        done = bash(lacking_project / "training_scripts" / "setup_env.sh", *words, env=bare_environment(), timeout=10)
        assert done.returncode == 0, "an environment for development serves both"
    stamp.write_text(f"{stamp_key(lacking_project)} quantization\n", encoding="utf-8")
    environment = environment_without_compiler(lacking_project)
    done = bash(lacking_project / "training_scripts" / "setup_env.sh", "--dev", env=environment)
    assert done.returncode != 0 and "lacks: no-such-package-anywhere" in done.stdout


def test_a_python_that_is_too_old_or_missing_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    done = bash(SCRIPTS / "setup_env.sh", env=bare_environment(RLHF_PYTHON=str(old)))
    assert done.returncode != 0 and "is not a Python of version 3.11" in done.stderr


def test_an_unknown_option_of_setup_is_refused():
    done = bash(SCRIPTS / "setup_env.sh", "--devel")
    assert done.returncode != 0 and "--dev" in done.stderr
