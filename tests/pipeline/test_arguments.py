"""A pipeline's command line, sorted by stage and checked before any stage starts."""

import json
import re
import shlex
import subprocess

import pytest

from rlhf.config import ConfigError
from rlhf.pipeline.arguments import all_fields, bash_assignments, main, sort_arguments
from rlhf.pipeline.stages import STAGES
from tests.support.results import made_up_results, write_results


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


def test_a_trial_writes_beside_the_run_it_tries_out(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"output_dir: {tmp_path}/mine\n", encoding="utf-8")
    pipeline = sort_arguments(["--config", str(config), "--short"], user_dir=tmp_path)
    assert pipeline.output_dir == f"{tmp_path}/mine-short"
    assert pipeline.overwrite_stages == pipeline.stages, "an earlier trial is overwritten unasked"
    for arguments in pipeline.stage_arguments.values():
        assert arguments[-2:] == ["--output_dir", f"{tmp_path}/mine-short"]
    again = sort_arguments(["--config", str(config), "--short", "--resume", "auto"], user_dir=tmp_path)
    assert again.output_dir == pipeline.output_dir and again.overwrite_stages == ()
    assert again.resume_stages == again.stages


@pytest.mark.parametrize("option", ["--output_dir", "--sft.output_dir"])
def test_a_trial_in_a_directory_that_was_asked_for_uses_it_as_it_is(tmp_path, option):
    pipeline = sort_arguments(["--short", "--stages", "sft", option, str(tmp_path / "out")], user_dir=tmp_path)
    assert pipeline.output_dir == str(tmp_path / "out") and pipeline.overwrite_stages == ()
    write_results(tmp_path / "out", {"sft": {"seed": 1}})
    with pytest.raises(ConfigError, match="holds a finished run"):
        sort_arguments(["--short", "--stages", "sft", option, str(tmp_path / "out")], user_dir=tmp_path)


def test_overwriting_is_a_fact_of_each_stage(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("overwrite: true\nsft:\n  overwrite: false\n", encoding="utf-8")
    assert sort_arguments(["--config", str(config)], user_dir=tmp_path).overwrite_stages == ("reward", "ppo")
    assert sort_arguments([], user_dir=tmp_path).overwrite_stages == ()
    pipeline = sort_arguments(["--overwrite"], user_dir=tmp_path)
    assert "OVERWRITE_STAGES=(sft reward ppo)" in bash_assignments(pipeline).splitlines()


def test_short_sets_a_few_steps_and_the_user_wins(tmp_path):
    pipeline = sort_arguments(["--short", "--reward.max_steps", "9"], user_dir=tmp_path)
    for name, value in STAGES["sft"].short_run.items():
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
        (["stray"], r"cannot read .stray.; fields are given as `--name value`"),
        (["--sft_data", "a", "--sft_data", "b"], r"--sft_data is given twice; a list takes all its values after one"),
        (["--short", "maybe"], r"--short needs true or false, got 'maybe'"),
        (["--num_devices", "two"], r"--num_devices needs a whole number of at least 1, got 'two'"),
        (["--num_devices"], r"--num_devices needs one value"),
        (["--hostfile", "nowhere"], r"--hostfile nowhere: no such file"),
        (["--config", "nowhere.yaml"], r"configuration file not found: nowhere.yaml"),
        (["--ppo.clip_range", "-1"], r"stage ppo: clip_range=-1.0 must be above 0"),
        (["--zero_stage", "7"], r"stage sft: .*--zero_stage .7. is not one of 0, 1, 2, 3"),
        (["--overwrite", "--ppo.resume", "auto"], r"stage ppo: overwrite and resume=auto contradict each other"),
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
    shown = '"$OUTPUT_DIR" "${ARGS_sft[@]}" "${#ARGS_ppo[@]}" "$SCRIPT_ppo"'
    script = f'set -eu; eval {shlex.quote(text)}; printf "%s\\n" {shown}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        awkward,
        "--sft_data",
        awkward,
        "",
        "--output_dir",
        awkward,
        "0",
        "step3_ppo/main.py",
    ]


def test_one_process_on_this_machine_needs_no_launcher(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=1\n", encoding="utf-8")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for words, alone in (
        ([], True),
        (["--num_devices", "1", "--master_port", "29512"], True),
        (["--num_devices", "2"], False),
        (["--num_devices", "1", "--master_port", "29512", "--hostfile", "hosts"], False),
        (["--num_devices", "1", "--num_nodes", "2"], False),
    ):
        pipeline = sort_arguments(words, user_dir=tmp_path)
        assert pipeline.single_process is alone, words
        assert f"SINGLE_PROCESS={'yes' if alone else ''}\n" in bash_assignments(pipeline)
    monkeypatch.delenv("DS_ACCELERATOR")
    assert not sort_arguments([], user_dir=tmp_path).single_process  # every GPU there is


def test_short_may_be_false_and_names_are_no_paths(tmp_path):
    assert sort_arguments(["--short", "false"], user_dir=tmp_path).stage_arguments["sft"] == []
    for name in ("default", "kullm"):
        (tmp_path / name).mkdir()
    words = ["--base_model", "default", "--template", "kullm"]
    assert sort_arguments(words, user_dir=tmp_path).stage_arguments["sft"] == words


def test_every_field_is_shown_although_a_run_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "out", made_up_results())
    shown = all_fields(["--sft.learning_rate", "0.25", "--output_dir", str(tmp_path / "out")])
    assert re.search(r"--learning_rate sft 0\.25 .*, reward \S+ \(default\.yaml\), ppo \S+ \(default\.yaml\)", shown)


def test_the_words_behind_the_scripts_name_are_the_arguments(monkeypatch, capsys):
    words = ["--zero_stage", "1", "--output_dir", "there", "--master_port", "29511"]
    assert main(words) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["arguments.py", *words])
    assert main() == 0 and capsys.readouterr().out == expected


def test_the_whole_of_what_run_all_evaluates(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = ["--stages", "ppo,,sft", "--zero_stage", "1", "--ppo.resume", "auto", "--sft.overwrite", "--max_restarts",
             "3", "--master_port", "29511", "--num_devices", "2", "--output_dir", "o ut", "--short",
             "--kl_coef", "1"]  # fmt: skip
    out = f"{tmp_path}/o ut"
    assert (
        bash_assignments(sort_arguments(words, user_dir=tmp_path))
        == f"""\
STAGES=(sft ppo)
RESUME_STAGES=(ppo)
OVERWRITE_STAGES=(sft)
SUMMARISED=
OUTPUT_DIR='{out}'
MAX_RESTARTS=3
SINGLE_PROCESS=
LAUNCHER_ARGS=(--master_port 29511 --num_gpus 2)
SCRIPT_sft=step1_sft/main.py
TITLE_sft='supervised fine-tuning'
ARGS_sft=(--zero_stage 1 --output_dir '{out}' --overwrite --max_steps 4)
SCRIPT_reward=step2_reward/main.py
TITLE_reward='reward model'
ARGS_reward=()
SCRIPT_ppo=step3_ppo/main.py
TITLE_ppo=PPO
ARGS_ppo=(--zero_stage 1 --output_dir '{out}' --kl_coef 1 --resume auto --max_steps 2)
SCRIPT_offline=step3_ppo/offline.py
TITLE_offline='preference optimisation without sampling'
ARGS_offline=()"""
    )


def test_an_offline_alignment_takes_the_place_of_reward_model_and_ppo(tmp_path):
    found = sort_arguments(["--align", "ipo", "--beta", "0.3", "--output_dir", "out"], user_dir=tmp_path)
    assert found.stages == ("sft", "offline") and "SUMMARISED=yes" in bash_assignments(found)
    words = found.stage_arguments["offline"]
    assert words[words.index("--algorithm") + 1] == "ipo" and words[words.index("--beta") + 1] == "0.3"
    whole = sort_arguments(["--align", "ppo", "--output_dir", "out"], user_dir=tmp_path)
    assert whole.stages == ("sft", "reward", "ppo") and "SUMMARISED=yes" in bash_assignments(whole)
    for words, told in (
        (["--align", "kahneman"], "--align kahneman: choose ppo or one of dpo, ipo, kto, rrhf, orpo, simpo"),
        (["--align", "dpo", "--stages", "sft"], "--align dpo says which stages run: leave --stages out"),
        (["--align", "dpo", "--kl_coef", "0.1"], "--kl_coef is a field of ppo, which this run"),
    ):
        with pytest.raises(ConfigError, match=told):
            sort_arguments(words, user_dir=tmp_path)


@pytest.mark.parametrize(("words", "refused"), [
    ([], True), (["--resume", "auto"], False), (["--resume", "never"], False), (["--overwrite"], False),
    (["--ppo.resume", "auto"], False), (["--stages", "sft"], False),
])  # fmt: skip
def test_an_unfinished_stage_is_not_lost_unasked(tmp_path, words, refused):
    (tmp_path / "out" / "ppo" / "states" / "step-00000004").mkdir(parents=True)
    words = [*words, "--output_dir", "out"]
    said = None
    try:
        sort_arguments(words, user_dir=tmp_path)
    except ConfigError as error:
        said = str(error)
    expected = (
        f"{tmp_path}/out/ppo holds an unfinished run: go on with --resume auto, start anew and lose it with --resume "
        "never, or choose another --output_dir"
    )
    assert said == (expected if refused else None)
    assert sort_arguments(words, user_dir=tmp_path, over_an_earlier_run=True).output_dir == f"{tmp_path}/out"


def test_a_finished_stage_is_not_an_unfinished_one(tmp_path):
    (tmp_path / "out" / "ppo" / "states" / "step-00000004").mkdir(parents=True)
    write_results(tmp_path / "out", {"ppo": {"seed": 1}})
    with pytest.raises(ConfigError, match="out/ppo holds a finished run"):
        sort_arguments(["--output_dir", "out"], user_dir=tmp_path)


@pytest.mark.parametrize(("words", "message"), [
    (["--max_restarts", "-1"], "--max_restarts needs a whole number of at least 0, got '-1'"),
    (["--num_nodes", "0"], "--num_nodes needs a whole number of at least 1, got '0'"),
    (["--master_port", "0"], "--master_port needs a whole number of at least 1, got '0'"),
    (["--max_restarts", "1", "2"], "--max_restarts needs one value, got ['1', '2']"),
    (["--sft.output_dir", "a", "--reward.output_dir", "b", "--stages", "sft,reward"],
     "the stages must share one output_dir, got {'sft': 'HERE/a', 'reward': 'HERE/b'}; set it at the file's top level"),
    (["--stages", ","], "--stages : the stages are sft, reward, ppo, offline, separated by commas"),
    (["--stages", "sft", "--reward.kl_coef", "1"],
     "--reward.kl_coef: stage reward has no field `kl_coef`; see docs/configuration.md"),
])  # fmt: skip
def test_a_mistake_is_said_in_one_whole_sentence(tmp_path, words, message):
    with pytest.raises(ConfigError) as error:
        sort_arguments(words, user_dir=tmp_path)
    assert str(error.value).replace(str(tmp_path), "HERE") == message


def test_files_of_the_home_directory_and_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "here").mkdir()
    words = ["--sft_data", "~/rows.jsonl", "../rows.jsonl", "{broken", '{"path": 3}', "", "--cache_dir", "~/cache"]
    sft = sort_arguments(words, user_dir=tmp_path / "here").stage_arguments["sft"]
    home = str(tmp_path)
    assert sft[:6] == ["--sft_data", f"{home}/rows.jsonl", f"{home}/here/../rows.jsonl", "{broken", '{"path": 3}', ""]
    assert sft[6:] == ["--cache_dir", f"{home}/cache"]
