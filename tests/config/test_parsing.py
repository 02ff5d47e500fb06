"""The configuration parser: defaults, then the file with its stage sections, then the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from rlhf.algorithms.config import PPOConfig
from rlhf.config import ConfigError, RunConfig, load_config_file, parse_config, save_config, setting
from rlhf.pipeline.stages import parse_stage

SECTIONS = ("sft", "reward", "ppo")


@dataclass
class Shared:
    """Fields every stage has."""

    output_dir: str = "runs/default"
    """A path."""
    steps: int = 10
    """A count."""
    wandb_project: str | None = None
    """May be unset."""
    tensorboard: bool = True
    """A switch."""


@dataclass
class Own:
    """Fields of one stage."""

    base_model: str = setting("default", names_model=True)
    """A name."""
    learning_rate: float = 1e-5
    """A number."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Two numbers."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """A choice."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """A choice of numbers."""
    data: list[str] = field(default_factory=lambda: ["sample"])
    """Names or mappings."""


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv, stage="ppo", **options):
    parts = parse_config(stage, {"shared": Shared, "own": Own}, list(argv), sections=SECTIONS, **options)
    assert list(parts) == ["shared", "own"]
    return tuple(parts.values())


def parse_alone(config_class, *argv):
    return parse_config("ppo", {"it": config_class}, list(argv), sections=SECTIONS)["it"]


# ------------------------------------------------------------------------------------------- what wins over what


def test_defaults_without_any_argument():
    shared, own = parse()
    assert (shared, own) == (Shared(), Own())


def test_the_stages_section_wins_over_shared_fields_and_the_command_line_over_both(config_file):
    path = config_file("steps: 1\nlearning_rate: 1.0e-3\nsft:\n  steps: 2\nppo:\n  steps: 3\n  schedule: linear\n")
    assert parse("--config", path)[0].steps == 3
    assert parse("--config", path, stage="sft")[0].steps == 2
    assert parse("--config", path, stage="reward")[0].steps == 1
    assert parse("--config", path, stage="reward")[1].schedule == "cosine"  # another stage's section stays away
    shared, own = parse("--config", path, "--steps", "4")
    assert shared.steps == 4 and own.schedule == "linear" and own.learning_rate == 1e-3
    assert parse(f"--config={path}", "--steps=4")[0].steps == 4
    assert parse("--steps", "4", "--config", path)[0].steps == 4  # in whatever order they come


def test_the_default_file_is_for_the_default_model_only(config_file):
    default, own = config_file("steps: 77\n", "default.yaml"), config_file("learning_rate: 0.5\n")
    assert parse(default_config=default)[0].steps == 77
    assert parse("--steps", "5", default_config=default)[0].steps == 5
    for option in (["--base_model", "gpt2"], ["--base_model=gpt2"], ["--base-model", "gpt2"], ["--config", own]):
        assert parse(*option, default_config=default)[0].steps == 10


def test_a_saved_configuration_reads_back_as_it_was(tmp_path):
    configs = parse(
        *["--steps", "3", "--adam_betas", "0.8", "0.99", "--output_dir", "출력/a b", "--learning_rate", "3e-7"],
        *["--no_tensorboard", "--zero_stage", "3", "--data", "가.jsonl", '{"path": "b", "weight": 2}'],
    )
    assert configs[1].zero_stage == 3 and configs[0].tensorboard is False
    path = tmp_path / "saved.yaml"
    save_config(path, configs)
    assert parse("--config", str(path)) == configs
    assert "output_dir: 출력/a b\n" in path.read_text(encoding="utf-8"), "a person reads it too"


# ---------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    "argv",
    [
        ["--local_rank=3", "--steps", "4"],
        ["--local_rank", "3", "--steps", "4"],
        ["--steps", "4", "--local-rank=0"],
        ["--steps", "4", "--local-rank", "0"],
    ],
)
def test_the_launchers_local_rank_is_dropped(argv):
    assert parse(*argv)[0].steps == 4


# --------------------------------------------------------------------------------------------------- values


def test_yaml_numbers_and_lists_become_what_the_field_is(config_file):
    text = "learning_rate: 5e-5\nadam_betas: [1, 0.5]\nwandb_project: null\ntensorboard: false\ndata: one\n"
    path = config_file(text)
    shared, own = parse("--config", path)
    assert own.learning_rate == 5e-5 and isinstance(own.learning_rate, float)  # YAML reads 5e-5 as text
    assert own.adam_betas == [1.0, 0.5] and own.data == ["one"]
    assert shared.wandb_project is None and shared.tensorboard is False
    assert parse("--config", config_file("learning_rate: 1\n"))[1].learning_rate == 1.0
    assert parse("--config", config_file("zero_stage: 2\n"))[1].zero_stage == 2


def test_mappings_in_a_list_survive_as_json(config_file):
    path = config_file("data:\n  - plain.jsonl\n  - {path: 한글.jsonl, weight: 2, columns: {prompt: 질문}}\n")
    first, second = parse("--config", path)[1].data
    assert first == "plain.jsonl"
    assert second == '{"path": "한글.jsonl", "weight": 2, "columns": {"prompt": "질문"}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "field `steps` needs int, got 'many'"),
        ("steps: 1.5", "field `steps` needs int, got 1.5"),
        ("steps: true", "field `steps` needs int, got True"),
        ("steps: null", "field `steps` needs int, got None"),
        ("learning_rate: fast", "field `learning_rate` needs float, got 'fast'"),
        ("learning_rate: true", "field `learning_rate` needs float, got True"),
        ("learning_rate: [1]", r"field `learning_rate` needs float, got \[1\]"),
        ("adam_betas: [0.9, x]", r"field `adam_betas` needs list\[float\], got \[0.9, 'x'\]"),
        ("tensorboard: 1", "field `tensorboard` needs true or false, got 1"),
        ("tensorboard: 'yes'", "field `tensorboard` needs true or false, got 'yes'"),
        ("schedule: square", "field `schedule`='square' is not one of cosine, linear"),
        ("zero_stage: 4", "field `zero_stage`=4 is not one of 0, 1, 2, 3"),
        ("output_dir: [a]", "field `output_dir` needs str"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_field_and_type(config_file, text, message):
    path = config_file(text + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        parse("--config", path)
    assert path in str(caught.value)


def test_an_unknown_field_of_the_file_is_an_error_with_near_matches(config_file):
    with pytest.raises(ConfigError, match="unknown field `learning_rte`; did you mean learning_rate"):
        parse("--config", config_file("learning_rte: 1.0\n"))
    with pytest.raises(ConfigError, match="unknown field `schdule`; did you mean schedule"):
        parse("--config", config_file("ppo:\n  schdule: linear\n"))
    with pytest.raises(ConfigError, match="unknown field `xyzzy`; see docs/configuration.md"):
        parse("--config", config_file("xyzzy: 1\n"))


def test_fields_of_another_stage_pass_where_they_are_known(config_file):
    path = config_file("kl_coef: 0.1\nsteps: 6\n")
    assert parse("--config", path, known_fields={"kl_coef"})[0].steps == 6
    with pytest.raises(ConfigError, match="unknown field `kl_coef`"):
        parse("--config", path)


def test_an_unknown_command_line_field_is_an_error_with_near_matches():
    with pytest.raises(ConfigError, match="learning_rte.*did you mean.*learning_rate"):
        parse("--learning_rte", "1.0")
    with pytest.raises(ConfigError, match="unknown field `step`; did you mean steps"):
        parse("--step", "4")  # no abbreviations: a new field must not change what an old command means


def test_a_command_line_value_of_the_wrong_type_is_a_configuration_error():
    with pytest.raises(ConfigError, match="steps.*many"):
        parse("--steps", "many")
    with pytest.raises(ConfigError, match="schedule.*square.*cosine.*linear"):
        parse("--schedule", "square")


# ---------------------------------------------------------------------------------------------------- files


def test_files_that_cannot_be_read_are_named(config_file, tmp_path):
    missing = str(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="not found.*missing.yaml"):
        parse("--config", missing)
    with pytest.raises(ConfigError, match="is not a YAML file"):
        parse("--config", config_file("a: [1\n"))
    with pytest.raises(ConfigError, match="must hold a mapping.*not list"):
        parse("--config", config_file("- a\n"))
    with pytest.raises(ConfigError, match="section `ppo:` must hold a mapping"):
        parse("--config", config_file("ppo: 3\n"))
    with pytest.raises(ConfigError, match="--config needs the path"):
        parse("--config")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        path = tmp_path / "latin1.yaml"
        path.write_bytes("output_dir: \xe9\n".encode("latin-1"))
        parse("--config", str(path))


def test_an_empty_file_and_an_empty_section_change_nothing(config_file):
    assert load_config_file(config_file(""), "ppo", sections=SECTIONS).values == {}
    assert parse("--config", config_file("ppo:\n")) == parse()


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_stage("ppo", ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--kl_coef" in shown and "Weight of the KL penalty" in shown


def test_a_stray_word_is_refused():
    with pytest.raises(ConfigError, match="cannot read 'seed'"):
        parse_stage("sft", ["--epochs", "1", "seed"])


def test_resume_can_be_set_in_a_file_and_read_back_from_a_saved_one(tmp_path):
    file = tmp_path / "run.yaml"
    for written, expected in (("resume: auto", "auto"), ("resume: never", "never"), ("resume: null", None), ("", None)):
        file.write_text(written + "\n")
        run = parse_alone(RunConfig, "--config", str(file))
        assert run.resume == expected
        save_config(tmp_path / "saved.yaml", [run])
        assert parse_alone(RunConfig, "--config", str(tmp_path / "saved.yaml")) == run
    file.write_text("resume: sometimes\n")
    with pytest.raises(ConfigError, match="resume.*auto, never"):
        parse_alone(RunConfig, "--config", str(file))


def test_an_infinite_clip_range_clips_nothing_and_other_numbers_are_finite(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("value_clip_range: .inf\n")
    assert parse_alone(PPOConfig, "--config", str(file)).value_clip_range == float("inf")
    assert parse_alone(PPOConfig, "--clip_range", "inf").clip_range == float("inf")
    for line in ("clip_range: .nan", "kl_coef: .inf"):
        file.write_text(line + "\n")
        with pytest.raises(ConfigError):
            parse_alone(PPOConfig, "--config", str(file))


@pytest.mark.parametrize("name", ["top_k", "top_p", "gather_for_generation"])
def test_a_field_of_an_earlier_release_is_refused_with_what_to_do_instead(name, config_file):
    for argv in ([f"--{name}", "0"], ["--config", config_file(f"ppo:\n  {name}: 0\n")]):
        with pytest.raises(ConfigError, match=f"`{name}` is no field any more: .*(temperature|gathered once)"):
            parse_stage("ppo", argv)


# -------------------------------------------------------------------------------------------------- extending a file


def told(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_file_extends_a_preset_and_its_fields_win(config_file, caplog):
    default = config_file("steps: 77\nlearning_rate: 1.0e-3\nppo:\n  schedule: linear\n  steps: 78\n", "default.yaml")
    middle = config_file("extends: default\nzero_stage: 1\nppo: {zero_stage: 2}\n", "middle.yaml")
    mine = config_file("extends: ./middle.yaml\nsteps: 5\n", "mine.yaml")
    caplog.set_level("INFO", "rlhf")
    shared, own = parse("--config", mine, default_config=default)
    # a shared field of the file wins over a section of the one below
    assert (shared.steps, own.learning_rate, own.schedule, own.zero_stage) == (5, 1e-3, "linear", 2)
    assert parse("--config", mine, "--steps", "6", stage="sft", default_config=default)[1].zero_stage == 1
    assert told(caplog)[0] == f"configuration: {mine}, extending {middle}, extending {default}"
    assert not [line for line in told(caplog) if "not read" in line]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere\n", r"mine.yaml: `extends: nowhere` is not a preset \(default, mine\); .*named with .yaml"),
        ("extends: nowhere.yaml\n", "configuration file not found: .*nowhere.yaml"),
        ("extends: [default]\n", r"`extends` needs the name of a preset or a file, got \['default'\]"),
        ("extends:\n", "`extends` needs the name of a preset or a file, got None"),
        ("ppo: {extends: default}\n", "mine.yaml: `extends` stands at the top level of a file, not in section `ppo:`"),
        ("extends: mine\n", "extend one another in a circle: .*mine.yaml -> .*mine.yaml"),
    ],
)
def test_what_cannot_be_extended_is_named(config_file, text, message):
    default = config_file("steps: 77\n", "default.yaml")
    with pytest.raises(ConfigError, match=message):
        parse("--config", config_file(text, "mine.yaml"), default_config=default)


def test_the_error_of_an_extended_file_names_that_file(config_file):
    config_file("steps: many\n", "base.yaml")
    with pytest.raises(ConfigError, match=r"base.yaml: field `steps` needs int"):
        parse("--config", config_file("extends: base.yaml\nlearning_rate: 1\n", "mine.yaml"))
    config_file("stepz: 1\n", "base.yaml")
    with pytest.raises(ConfigError, match=r"base.yaml: unknown field `stepz`"):
        parse("--config", config_file("extends: base.yaml\n", "mine.yaml"))


def test_what_the_default_file_would_have_set_is_told(config_file, caplog):
    default = config_file("steps: 77\nlearning_rate: 1.0e-3\nadam_betas: [0.9, 0.95]\n", "default.yaml")
    caplog.set_level("INFO", "rlhf")
    parse("--config", config_file("zero_stage: 1\n"), "--steps", "3", default_config=default)
    assert told(caplog)[1:] == [
        "configuration of ppo: default.yaml is not read, hence learning_rate 1e-5 (there 0.001); "
        "`extends: default` in a file keeps them"
    ]
    caplog.clear()
    parse("--base_model", "gpt2", default_config=default)
    assert told(caplog) == [
        "configuration of ppo: default.yaml is not read, hence steps 10 (there 77), learning_rate 1e-5 (there 0.001); "
        "it suits the embedded model"
    ]
    caplog.clear()
    parse("--config", config_file("steps: 1\nlearning_rate: 2\n"), default_config=default)
    assert len(told(caplog)) == 1  # nothing differs


@dataclass
class Sets:
    """Training data and what is held out of it."""

    some_data: list[str] = field(default_factory=lambda: ["a"])
    """Trained on."""
    some_eval_data: list[str] = field(default_factory=list)
    """Held out."""


def test_held_out_data_goes_with_the_training_data_it_belongs_to(config_file, caplog):
    default = config_file("some_data: [x]\nsome_eval_data: [y]\n", "default.yaml")

    def sets(*argv):
        return parse_config("ppo", {"it": Sets}, list(argv), sections=SECTIONS, default_config=default)["it"]

    assert sets() == Sets(["x"], ["y"])
    caplog.set_level("INFO", "rlhf")
    caplog.clear()  # an earlier test may have set the level before
    assert sets("--some_data", "b") == Sets(["b"], [])
    assert "some_eval_data of default.yaml is left out: it belongs to the training data there" in told(caplog)[1]
    mine = config_file("extends: default\nsome_data: [c]\n", "mine.yaml")
    assert sets("--config", mine) == Sets(["c"], [])
    assert sets("--config", mine, "--some_eval_data", "d") == Sets(["c"], ["d"])
    same = config_file("extends: default\nsome_data: x\n", "same.yaml")
    assert sets("--config", same) == Sets(["x"], ["y"])  # the same data: what is held out of it stays
    extending = config_file("extends: default\n", "extending.yaml")
    assert sets("--config", extending) == Sets(["x"], ["y"])
    assert sets("--config", extending, "--some_data", "e") == Sets(["e"], [])
    own = config_file("some_data: [f]\nsome_eval_data: [g]\n", "own.yaml")
    assert sets("--config", own, "--some_data", "h") == Sets(["h"], ["g"])  # what the user's own file says stays


METHODS = {"schedule": ("cosine", "linear")}


def test_the_section_of_the_method_in_force_comes_after_that_of_its_stage(config_file):
    path = config_file("ppo: {steps: 5, learning_rate: 2}\nlinear: {steps: 9}\ncosine: {learning_rate: 3}\n")
    assert parse("--config", path, methods=METHODS) == parse("--steps", "5", "--learning_rate", "3")
    linear = ("--schedule", "linear")
    assert parse("--config", path, *linear, methods=METHODS) == parse("--steps", "9", "--learning_rate", "2", *linear)
    assert parse("--config", path, *linear, "--steps", "1", methods=METHODS) == parse(
        "--steps", "1", "--learning_rate", "2", *linear
    )
    named = config_file("extends: run\nppo: {schedule: linear}\n", "named.yaml")
    default = config_file("steps: 77\n", "default.yaml")
    assert parse("--config", named, methods=METHODS, default_config=default) == parse(
        "--steps", "9", "--learning_rate", "2", *linear
    )
    # What a file says wins over the file that it extends, whichever section it is said in.
    own = config_file("extends: run\nppo: {schedule: linear, steps: 4}\n", "own.yaml")
    assert parse("--config", own, methods=METHODS, default_config=default) == parse(
        "--steps", "4", "--learning_rate", "2", *linear
    )


def test_a_methods_section_holds_fields_and_does_not_choose_the_method(config_file):
    for text, message in (
        ("linear: {schedule: cosine}\nppo: {schedule: linear}\n", "section `linear:` sets schedule.*section `ppo:`"),
        ("cosine: {stepz: 1}\n", "unknown field `stepz`; did you mean steps"),
        ("cosine: 3\n", "section `cosine:` must hold a mapping"),
        ("cosine: {extends: other.yaml}\n", "not in section `cosine:`"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse("--config", config_file(text), methods=METHODS)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps"], r"--steps needs a value after it \(int\)"),
        (["--steps", "1", "2"], "--steps takes one value; cannot read '2' after '1'"),
        (["--data"], "--data needs at least one value after it"),
        (["--tensorboard", "maybe"], "--tensorboard needs true or false, got 'maybe'"),
        (["--learning_rate", "fast"], "--learning_rate needs float, got 'fast'"),
        (["--no_steps"], "unknown field `no_steps`"),
        (["--no_tensorboard", "true"], "unknown field `no_tensorboard`"),
        (["stray"], "cannot read 'stray'"),
        (["--"], "cannot read '--'"),
    ],
)
def test_a_command_line_that_cannot_be_read_says_where(argv, message):
    with pytest.raises(ConfigError, match=f"command line: .*{message}"):
        parse(*argv)


def test_options_are_read_in_every_spelling():
    shared, own = parse("--tensorboard", "--learning-rate=-1e-3", "--adam_betas", "-0.5", "1", "--wandb_project", "")
    assert shared.tensorboard is True and shared.wandb_project == ""
    assert own.learning_rate == -1e-3 and own.adam_betas == [-0.5, 1.0]
    assert parse("--tensorboard", "No")[0].tensorboard is False and parse("--tensorboard=T")[0].tensorboard is True
    assert parse("--steps", "1", "--steps", "2")[0].steps == 2  # the last one wins


# -------------------------------------------------------------------------------------------------------------- help


def test_help_shows_every_field_once_with_its_value_and_where_it_comes_from(config_file, capsys):
    default = config_file("steps: 77\n", "default.yaml")
    with pytest.raises(SystemExit) as stopped:
        parse("--help", "--schedule", "linear", "--no_tensorboard", default_config=default)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "Shared: Fields every stage has." in shown
    assert "  --steps 77  (default.yaml; int)\n      A count.\n" in shown
    assert "  --schedule linear  (command line; cosine, linear)\n" in shown
    assert "  --tensorboard false  (command line; bool)\n" in shown
    assert "  --adam_betas [0.9, 0.95]  (default; list[float])\n" in shown
    for name in ("output_dir", "wandb_project", "base_model", "zero_stage", "data"):
        assert shown.count(f"--{name} ") == 1, name


def test_a_mistake_beside_help_is_still_a_mistake():
    with pytest.raises(ConfigError, match="unknown field `stepz`"):
        parse("--stepz", "1", "--help")
