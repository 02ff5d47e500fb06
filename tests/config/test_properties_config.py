"""Properties of configuration: a file or command line is read as it stands, or a ConfigError names what is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rlhf.config import ConfigError, load_config_file, parse_config, save_config
from tests.support.property_inputs import broken_texts, cases, file_bytes, json_values, numbers, texts, written

SECTIONS = ("sft", "reward", "ppo")


@dataclass
class Options:
    """One field of each kind there is."""

    name: str = "default"
    """A text."""
    count: int = 1
    """A whole number."""
    rate: float = 0.5
    """A number."""
    switch: bool = True
    """A switch."""
    project: str | None = None
    """May be unset."""
    betas: list[float] = field(default_factory=lambda: [0.9])
    """Numbers."""
    data: list[str] = field(default_factory=lambda: ["sample"])
    """Names or mappings."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """A choice."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """A choice of numbers."""


def parse(*argv: str) -> Options:
    """The configuration, after checks that hold for each."""
    options = parse_config("ppo", {"options": Options}, list(argv), sections=SECTIONS)["options"]
    for item in fields(Options):
        value = getattr(options, item.name)
        kind = type(getattr(Options(), item.name))
        assert type(value) is kind or (item.name == "project" and type(value) is str), item.name
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, float):
                assert math.isfinite(entry)
            if isinstance(entry, str):
                assert b"\0" not in os.fsencode(entry)
    assert options.schedule in ("cosine", "linear") and options.zero_stage in range(4)
    assert all(type(entry) is str for entry in options.data) and all(type(entry) is float for entry in options.betas)
    return options


def parse_file(content: bytes) -> Options | None:
    """The configuration of a file, or None after a ConfigError that names it."""
    with written("run.yaml", content) as path:
        try:
            options = parse("--config", str(path))
        except ConfigError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            with pytest.raises(ConfigError) as again:
                parse("--config", str(path))
            assert str(again.value) == str(error)
            return None
        assert parse("--config", str(path)) == options
        return options


names = st.sampled_from([item.name for item in fields(Options)])
SCRAPS = (
    "name: ", "count: ", "rate: ", "data: ", "betas: ", "ppo:\n  ", "\n", "- ", "{", "}", "[", "]", ": ", ", ",
    "&a ", "*a", "%YAML 1.", "%TAG ! ", "--- ", "...", "# ",
    "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ", "!!str ", "!x ",
    "<<: ", "? ", "| ", "> ", '"\\U00110000"', '"\\ud800"', '"\\0"', "'", '"',
    "\ufeff", "2001-99-99", "0x_", "0b_", "1:99", ".nan", "-.inf", "1e999",
)  # fmt: skip
scraps = st.one_of(st.sampled_from(SCRAPS), texts, numbers.map(str))


@cases(60)
@example(b"count: " + b"[" * 5000)  # RecursionError
@example(b"name: 2001-99-99")  # ValueError: month must be in 1..12
@example(b"count: 0x_")
@example(b"count: !!int x")
@example(b"switch: !!bool x")  # KeyError
@example(b"name: !!timestamp x")  # AttributeError
@example(b'name: "\\U00110000"')  # ValueError: chr() arg not in range
@example(b"count: " + b"1" * 5000)
@example(b"rate: " + b"1" * 400)  # OverflowError
@example(b"rate: .nan")  # passed every check of a range
@example(b"rate: !!binary MS41")  # was 1.5
@example(b"data: [{path: a, category: 2024-01-01}]")  # TypeError: not JSON serializable
@example(b"data: &a [{path: *a}]")  # ValueError: circular reference
@example(b"count: 1\ncount: 2")  # was 2
@example(b'name: "\\ud800"')
@example(b"%YAML 1." + b"1" * 5000 + b"\n--- {}")
@given(st.one_of(file_bytes, st.lists(scraps, max_size=10).map(lambda pieces: "".join(pieces).encode())))
def test_any_file_is_a_configuration_or_a_clear_error(content: bytes) -> None:
    parse_file(content)


@cases(40)
@example("data", {"\U00010000": None})  # JSON's two escapes of one character were two characters
@example("data", {"\ud800": None})
@given(names, st.one_of(json_values, numbers))
def test_any_value_of_a_field_is_itself_or_a_clear_error(name: str, value: Any) -> None:
    options = parse_file(json.dumps({name: value}).encode())  # JSON is YAML
    if options is None:
        assert name in ("switch", "schedule", "zero_stage", "count") or not isinstance(value, str) or name != "data"
        return
    found = getattr(options, name)
    if isinstance(value, str) and name in ("name", "project"):
        assert found == value
    elif name == "count":
        assert found == value and not isinstance(value, bool)
    elif name == "rate":
        assert found == float(value) and not isinstance(value, bool)
    elif name == "data":
        wanted = [entry for entry in (value if isinstance(value, list) else [value])]
        assert len(found) == len(wanted)
        for entry, written_entry in zip(found, wanted, strict=True):
            assert (
                entry == written_entry
                if isinstance(written_entry, str)
                else json.loads(entry) == written_entry or repr(json.loads(entry)) == repr(written_entry)
            )


PLAIN_SCALARS = (
    "2024_10",
    "1.10",
    "010",
    "0x1F",
    "0b11",
    "1:30",
    "1:30.5",
    "2024-10-05",
    "1e3",
    "+5",
    "-0",
    "1_0.5",
    ".5",
    "5.",
    "0.10",
    "00",
    "12345678901234567890123",
    "0o7",
    "1__0",
    "6.0e+2",
)


@cases(25)
@given(st.one_of(st.sampled_from(PLAIN_SCALARS), st.text("0123456789_.:-+exboTZ", min_size=1, max_size=8)))
@example("2024_10")  # was 202410
@example("010")  # was 8
@example("1:30")  # was 90
@example("1.10")  # was 1.1
def test_a_plain_name_is_what_stands_there_and_a_number_is_decimal(text: str) -> None:
    assume(not re.search(r":$|^-$|^[-.]{3}$|^[-:]|^\.(nan|inf)", text))
    options = parse_file(f"name: {text}\nproject: {text}\ndata: [{text}]\n".encode())
    assert options is not None and (options.name, options.project, options.data) == (text, text, [text])
    counted = parse_file(f"count: {text}\n".encode())
    assert counted is None or (counted.count == int(text) and not re.match(r"[-+]?0[0-9]", text))
    rated = parse_file(f"rate: {text}\n".encode())
    assert rated is None or rated.rate == float(text)


written_texts = st.one_of(texts, st.sampled_from(PLAIN_SCALARS), st.just("\udcff")).map(
    lambda text: text.replace("\0", "")
)


@cases(30)
@example(Options(data=["\x85"], name="a\u2028b"))  # was a blank
@given(
    st.builds(
        Options,
        name=written_texts,
        count=st.integers(-(10**30), 10**30),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        switch=st.booleans(),
        project=st.one_of(st.none(), written_texts),
        betas=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        data=st.lists(st.one_of(written_texts, json_values.map(lambda value: json.dumps({"path": value}))), max_size=3),
        schedule=st.sampled_from(["cosine", "linear"]),
        zero_stage=st.integers(0, 3),
    )
)
def test_a_saved_configuration_reads_back_as_it_was(options: Options) -> None:
    with written("other", b"") as beside:
        path = beside.with_name("saved.yaml")
        save_config(path, [options])
        assert repr(parse("--config", str(path))) == repr(options)


@cases(30)
@example("count: 1\nppo:\n  name: a\n  rate: 1\n  name: b\n")
@given(st.lists(st.tuples(names, st.sampled_from(["1", "x", "null", "[1]"])), max_size=5))
def test_a_repeated_key_names_its_line(entries: Any) -> None:
    text = entries if isinstance(entries, str) else "".join(f"{name}: {value}\n" for name, value in entries)
    keys = [line.split(":")[0] for line in text.splitlines()]
    with written("run.yaml", text.encode()) as path:
        if len(set(keys)) == len(keys):
            assert list(load_config_file(path, "ppo", sections=SECTIONS).values) == keys
            return
        second = next(number for number, key in enumerate(keys, start=1) if key in keys[: number - 1])
        with pytest.raises(ConfigError, match=f"is there twice(.|\n)*line {second}, column"):
            load_config_file(path, "ppo", sections=SECTIONS)


FLAGS = ("--", "-", "--no_switch", "--no-switch", "--config", "--config=", "--local_rank", "--=", "-1", "--count=1_0")
words = st.one_of(broken_texts, numbers.map(str))
options_with_values = st.tuples(names, words).map("--{0[0]}={0[1]}".format)
arguments = st.lists(
    st.one_of(names.map("--{}".format), options_with_values, st.sampled_from(FLAGS), words), max_size=5
)


@cases(50)
@example(["--rate", "nan"])
@example(["--betas", "0.9", "inf"])
@example(["--name", "\ud800"])
@example(["--name=a\0b"])
@example(["--count", "1" * 5000])
@given(arguments)
def test_any_command_line_is_a_configuration_or_a_clear_error(argv: list[str]) -> None:
    assume(not {"-h", "--help"} & set(argv))
    try:
        options = parse(*argv)
    except ConfigError as error:
        assert str(error)
        return
    assert parse(*argv) == options


def bomb(kind: str) -> str:
    """A document of a few hundred bytes that stands for 10**20 values."""
    use = {"list": "[{0}]", "mapping": "{{k: [{0}]}}", "merge": "{{<<: [{0}]}}"}[kind]
    lines = [f"a{n}: &a{n} {use.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, 21)]
    return "\n".join(["a0: &a0 {x: 1}", *lines, "data: *a20"])


@pytest.mark.parametrize("kind", ["list", "mapping", "merge"])
def test_aliases_that_multiply_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(bomb(kind), encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(ConfigError, match="more than 10000 values"):
        parse("--config", str(path))
    assert time.monotonic() - start < 5


def test_anchors_and_merge_keys_work_where_they_are_few(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("ppo: &shared\n  name: a\n  rate: 1\nsft:\n  <<: *shared\n  name: b\n", encoding="utf-8")
    assert load_config_file(path, "sft", sections=SECTIONS).values == {"name": "b", "rate": 1}


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir", "!!python/module:os"]
    + ["!x", "!!set", "!!omap", "!!binary"],
)
def test_no_tag_makes_an_object(tag: str, tmp_path: Path) -> None:
    path, made = tmp_path / "run.yaml", tmp_path / "made"
    path.write_text(f"name: {tag} [{made}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="run.yaml is not a YAML file(.|\n)*could not determine a constructor"):
        parse("--config", str(path))
    assert not made.exists()


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# model weights\n" * 20_000, encoding="utf-8")
    with pytest.raises(ConfigError, match="more than 200000 bytes"):
        parse("--config", str(path))


def test_yaml_and_json_read_the_project_presets_alike() -> None:
    """Our loader and the plain one agree on every preset: it is stricter, not another language."""
    presets = sorted((Path(__file__).parents[2] / "training_scripts" / "configs").glob("*.yaml"))
    assert presets
    for path in presets:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        for stage in ("sft", "reward", "ppo"):
            shared = {name: value for name, value in plain.items() if name not in ("sft", "reward", "ppo")}
            assert load_config_file(path, stage, sections=SECTIONS).values == {**shared, **(plain.get(stage) or {})}
