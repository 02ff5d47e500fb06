"""The shell entry points and the Python behind them: arguments sorted, environments reused, results summed up."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import ConfigError
from rlhf.pipeline.arguments import SHORT_RUN, bash_assignments, sort_arguments
from rlhf.report import summary

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


@pytest.mark.parametrize("script", ["run_all.sh", "run_sft.sh", "run_reward.sh", "run_ppo.sh"])
def test_help_explains_without_an_environment(script, tmp_path):
    done = bash(SCRIPTS / script, "--help", env=bare_environment(RLHF_PYTHON="/nowhere/python"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for option in ("--config", "--base_model", "--preference_data", "--num_devices", "--zero_stage", "--short"):
        assert option in done.stdout
    assert "[setup]" not in done.stdout


def test_run_all_refuses_an_unknown_option_before_any_stage(tmp_path):
    done = bash(SCRIPTS / "run_all.sh", "--learning_rat", "1e-4", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "unknown option --learning_rat" in done.stderr and "--learning_rate" in done.stderr
    assert "===" not in done.stdout and not (tmp_path / "out").exists()


@pytest.fixture
def fake_project(tmp_path):
    """A copy of the project whose stages only write down how they were called."""
    project = tmp_path / "project"
    for folder in ("training_scripts", "rlhf"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", project)
    for stage, folder in (("sft", "step1_sft"), ("reward", "step2_reward"), ("ppo", "step3_ppo")):
        (project / folder).mkdir()
        (project / folder / "main.py").write_text(
            "import json, os, sys\n"
            "from pathlib import Path\n"
            "arguments = [word for word in sys.argv[1:] if not word.startswith('--local_rank')]\n"
            f"directory = Path(arguments[arguments.index('--output_dir') + 1]) / '{stage}'\n"
            "directory.mkdir(parents=True, exist_ok=True)\n"
            "if os.environ['RANK'] != '0': sys.exit(0)\n"
            "print('called', json.dumps(arguments), os.getcwd(), os.environ['WORLD_SIZE'])\n"
            f"if '{stage}' == os.environ.get('STOP_AT'): sys.exit(7)\n"
            f"if '{stage}' == os.environ.get('NO_RESULT_AT'): sys.exit(0)\n"
            f"result = json.loads(Path(os.environ['RESULTS']).read_text())['{stage}']\n"
            "(directory / 'result.json').write_text(json.dumps(result))\n",
            encoding="utf-8",
        )
    results = tmp_path / "results.json"
    results.write_text(json.dumps(made_up_results()), encoding="utf-8")
    return project, bare_environment(RLHF_PYTHON=sys.executable, RESULTS=str(results), DS_ACCELERATOR="cpu")


def test_run_all_calls_the_stages_through_the_launcher_and_sums_up(fake_project, tmp_path):
    project, environment = fake_project
    (tmp_path / "mine.jsonl").write_text("", encoding="utf-8")
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
    (tmp_path / "out" / "reward" / "result.json").write_text("{}", encoding="utf-8")  # of an earlier run
    environment = {**environment, variable: "reward"}
    words = ["--output_dir", "out"]
    done = bash(project / "training_scripts" / "run_all.sh", *words, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    assert f"stage reward (step2_reward/main.py) failed with status {status}" in done.stderr
    assert "1/3" in done.stdout and "2/3" in done.stdout and "3/3" not in done.stdout
    assert not (tmp_path / "out" / "summary.json").exists()


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


# --------------------------------------------------------------------------------------------- pipeline_args


def test_fields_go_to_the_stages_that_have_them(tmp_path):
    words = ["--zero_stage", "2", "--sft_data", "a", "b", "--kl_coef", "0.2", "--output_dir", str(tmp_path / "out")]
    pipeline = sort_arguments(words, user_dir=tmp_path)
    output = ["--output_dir", str(tmp_path / "out")]
    assert pipeline.stage_arguments == {
        "sft": ["--zero_stage", "2", "--sft_data", "a", "b", *output],
        "reward": ["--zero_stage", "2", *output],
        "ppo": ["--zero_stage", "2", "--kl_coef", "0.2", *output],
    }
    assert pipeline.output_dir == str(tmp_path / "out")


def test_a_section_sends_a_field_to_one_stage_and_wins(tmp_path):
    pipeline = sort_arguments(["--ppo.learning_rate", "3e-6", "--learning_rate=1e-4"], user_dir=tmp_path)
    assert pipeline.stage_arguments["sft"] == ["--learning_rate", "1e-4"]
    assert pipeline.stage_arguments["ppo"] == ["--learning_rate", "1e-4", "--learning_rate", "3e-6"]


def test_paths_are_taken_from_where_the_user_is(tmp_path):
    for name in ("pairs.jsonl", "mine.yaml"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "kullm").mkdir()
    mapping = json.dumps({"path": "pairs.jsonl", "columns": {"prompt": "질의"}}, ensure_ascii=False)
    words = ["--config", "mine.yaml", "--preference_data", "pairs.jsonl", mapping, "hub/name", "--output_dir", "out"]
    reward = sort_arguments(words, user_dir=tmp_path).stage_arguments["reward"]
    assert reward[1] == str(tmp_path / "mine.yaml")
    assert reward[3] == str(tmp_path / "pairs.jsonl") and reward[5] == "hub/name"
    assert json.loads(reward[4]) == {"path": str(tmp_path / "pairs.jsonl"), "columns": {"prompt": "질의"}}
    assert reward[7] == str(tmp_path / "out")


def test_the_output_directory_of_the_file_is_used(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("output_dir: runs/mine\n", encoding="utf-8")
    assert sort_arguments(["--config", str(config)], user_dir=tmp_path).output_dir == "runs/mine"
    assert sort_arguments([], user_dir=tmp_path).output_dir == "runs/default"
    config.write_text("ppo:\n  output_dir: runs/elsewhere\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="must share one output_dir"):
        sort_arguments(["--config", str(config)], user_dir=tmp_path)


def test_short_sets_a_few_steps_and_the_user_wins(tmp_path):
    pipeline = sort_arguments(["--short", "--reward.max_steps", "9"], user_dir=tmp_path)
    for name, value in SHORT_RUN["sft"].items():
        assert pipeline.stage_arguments["sft"][pipeline.stage_arguments["sft"].index(f"--{name}") + 1] == value
    assert pipeline.stage_arguments["reward"].count("--max_steps") == 1
    assert pipeline.stage_arguments["reward"][pipeline.stage_arguments["reward"].index("--max_steps") + 1] == "9"


def test_launcher_options_reach_the_launcher_only(tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=8\n", encoding="utf-8")
    pipeline = sort_arguments(["--hostfile", "hosts", "--master_port", "29501"], user_dir=tmp_path)
    assert pipeline.launcher_arguments == ["--hostfile", str(hosts), "--master_port", "29501"]
    assert pipeline.stage_arguments == {"sft": [], "reward": [], "ppo": []}
    assert "--num_gpus" not in sort_arguments([], user_dir=tmp_path).launcher_arguments
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    alone = sort_arguments([], user_dir=tmp_path).launcher_arguments
    assert alone[:2] == ["--num_gpus", "1"] and alone[2] == "--master_port" and int(alone[3]) > 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], r"unknown option --learning_rat; did you mean --learning_rate"),
        (["--qqqqqq", "1"], r"unknown option --qqqqqq; see docs"),
        (["--critic.learning_rate", "1"], r"`critic` is not a stage; the stages are sft, reward, ppo"),
        (["--sft.kl_coef", "1"], r"--sft.kl_coef: stage sft has no field `kl_coef`"),
        (["--stages", "sft", "--kl_coef", "1"], r"--kl_coef is a field of ppo, which this run \(sft\) leaves out"),
        (["--stages", "rm"], r"--stages rm: the stages are sft, reward, ppo"),
        (["stray"], r"`stray` is not an option"),
        (["--num_devices", "two"], r"--num_devices needs a whole number of at least 1, got 'two'"),
        (["--num_devices"], r"--num_devices needs one value"),
        (["--hostfile", "nowhere"], r"--hostfile nowhere: no such file"),
        (["--config", "nowhere.yaml"], r"configuration file not found: nowhere.yaml"),
        (["--ppo.clip_range", "-1"], r"stage ppo: clip_range=-1.0 must be above 0"),
        (["--zero_stage", "7"], r"stage sft: .*--zero_stage.*invalid choice"),
    ],
)
def test_mistakes_are_named_before_any_stage_runs(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        sort_arguments(words, user_dir=tmp_path)


def test_assignments_survive_bash(tmp_path):
    awkward = str(tmp_path / "a 'b' $HOME \"c\"")
    pipeline = sort_arguments(
        ["--stages", "sft", "--sft_data", awkward, "", "--output_dir", awkward], user_dir=tmp_path
    )
    text = bash_assignments(pipeline)
    script = f'set -eu; eval {shlex.quote(text)}; printf "%s\\n" "$OUTPUT_DIR" "${{SFT_ARGS[@]}}" "${{#PPO_ARGS[@]}}"'
    done = bash("-c", script)
    assert done.stdout.splitlines() == [awkward, "--sft_data", awkward, "", "--output_dir", awkward, "0"]


# --------------------------------------------------------------------------------------------------- summary


def made_up_results():
    sample = {"prompt": "안녕?", "sft": "응", "ppo": "안녕하세요!\n반가워요", "score_sft": -0.5, "score_ppo": 1.25}
    ppo = dict.fromkeys(summary.SUMMARY_KEYS["ppo"], 0.5) | {"score_before": 0.1, "score_after": 1.3}
    healthy = {"healthy": True, "lines": 3, "findings": []}
    results = {
        "sft": {"eval_loss_before": 3.0, "eval_loss_after": 2.0, "best_step": 7, "seconds": 10.0, "seed": 3},
        "reward": {
            "accuracy": 0.85,
            "length_baseline_accuracy": 0.5,
            "accuracy_by_category": {"일상 대화": 0.9, "law": 0.8},
            "mean_margin": 1.5,
            "seconds": 20.0,
            "seed": 3,
        },
        "ppo": {**ppo, "samples": [{**sample, "id": "extra"}], "seconds": 30.5, "seed": 3},
    }
    return {stage: {**result, "health": healthy} for stage, result in results.items()}


def write_results(directory, results):
    for stage, result in results.items():
        (directory / stage).mkdir(parents=True, exist_ok=True)
        (directory / stage / "result.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


def test_summary_of_a_run_that_held_nothing_out(tmp_path, capsys):
    results = made_up_results()
    for stage, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, float) and name != "seconds":
                results[stage][name] = None
    results["reward"]["accuracy_by_category"] = {}
    results["ppo"]["samples"] = []
    write_results(tmp_path, results)
    assert summary.main([str(tmp_path)]) == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_summary_has_exactly_the_promised_schema(tmp_path, capsys):
    write_results(tmp_path, made_up_results())
    assert summary.main([str(tmp_path)]) == 0
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert list(written) == ["sft", "reward", "ppo", "samples", "seconds", "seed", "health"]
    assert written["sft"] == {"eval_loss_before": 3.0, "eval_loss_after": 2.0}
    assert set(written["reward"]) == {"accuracy", "length_baseline_accuracy", "accuracy_by_category", "mean_margin"}
    assert set(written["ppo"]) == {
        *("score_before", "score_after", "score_std_before", "kl_per_token", "eos_rate_before", "eos_rate_after"),
        *("mean_response_tokens_before", "mean_response_tokens_after"),
    }
    assert [set(sample) for sample in written["samples"]] == [{"prompt", "sft", "ppo", "score_sft", "score_ppo"}]
    assert written["seconds"] == {"sft": 10.0, "reward": 20.0, "ppo": 30.5, "total": 60.5}
    assert written["seed"] == 3
    table = capsys.readouterr().out
    assert "choosing the longer response: 0.500" in table
    assert "+1.200 = +2.40 standard deviations" in table, "1.2 over a standard deviation of 0.5"
    assert "안녕하세요! 반가워요" in table and "seed 3" in table
    assert "doctor: nothing found in sft, reward, ppo" in table


def test_the_table_ends_with_what_the_doctor_found(tmp_path):
    results = made_up_results()
    entry = {"check": "kl_explodes", "severity": "critical", "since": 7, "until": None, "message": "9 nats per token"}
    results["ppo"]["health"] = {"healthy": False, "lines": 12, "findings": [entry]}
    write_results(tmp_path, results)
    table = summary.closing_table(summary.summarize(tmp_path))
    assert "doctor: ppo since step 7: 9 nats per token" in table
    assert "nothing found" not in table


def test_table_columns_line_up_with_korean_labels(tmp_path):
    write_results(tmp_path, made_up_results())
    lines = summary.closing_table(summary.summarize(tmp_path)).splitlines()
    korean = next(line for line in lines if "일상 대화" in line)
    law = next(line for line in lines if line.split()[:1] == ["law"])
    assert law.index("0.800") - korean.index("0.900") == 4, "four letters of two columns each"


def test_a_long_prompt_shows_its_end_and_a_long_response_its_beginning(tmp_path):
    results = made_up_results()
    sample = results["ppo"]["samples"][0]
    results["ppo"]["samples"] = [{**sample, "prompt": "template " * 30 + "질문의 끝", "sft": "처음 " + "말 " * 100}]
    write_results(tmp_path, results)
    lines = summary.closing_table(summary.summarize(tmp_path), width=60).splitlines()
    prompt = next(line for line in lines if line.startswith("prompt"))
    response = next(line for line in lines if line.startswith("SFT ") and "처음" in line)
    assert prompt.endswith("질문의 끝") and "..." in prompt
    assert response.endswith("...") and all(summary._columns(line) <= 60 for line in (prompt, response))


def without(results, stage, key):
    return {**results, stage: {name: value for name, value in results[stage].items() if name != key}}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({key: made_up_results()[key] for key in ("sft", "ppo")}, r"stage reward has left no result: .*step2_reward"),
        (without(made_up_results(), "ppo", "kl_per_token"), r"ppo/result.json lacks kl_per_token"),
        (without(made_up_results(), "sft", "seed"), r"sft/result.json lacks seed"),
        (without(made_up_results(), "ppo", "samples"), r"lacks samples"),
        ({**made_up_results(), "sft": {**made_up_results()["sft"], "seed": 4}}, r"different seeds: .*'sft': 4"),
        (
            {**made_up_results(), "ppo": {**made_up_results()["ppo"], "samples": [{"prompt": ""}]}},
            r"sample 0 lacks sft",
        ),
    ],
)
def test_a_missing_or_incomplete_result_is_named(tmp_path, results, message, capsys):
    write_results(tmp_path, results)
    with pytest.raises(summary.SummaryError, match=message):
        summary.summarize(tmp_path)
    assert summary.main([str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_result_that_is_not_json_is_named(tmp_path):
    write_results(tmp_path, made_up_results())
    (tmp_path / "reward" / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(summary.SummaryError, match=r"reward/result.json is not JSON"):
        summary.summarize(tmp_path)
