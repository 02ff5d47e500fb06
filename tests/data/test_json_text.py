"""JSON text beside Python's own parser: the same values, the same places of errors, and what only ours refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.json_text import JsonError, parse_elements, parse_json

SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
WHITE = st.text(alphabet=" \t\n\r", max_size=3)


@given(st.lists(VALUES, max_size=4), WHITE, WHITE, st.sampled_from([None, 1]), st.booleans())
def test_values_are_those_of_pythons_parser(values, before, after, indent, escaped):
    text = before + json.dumps(values, indent=indent, ensure_ascii=escaped) + after
    assert parse_json(text) == json.loads(text) == values
    assert list(parse_elements(text)) == [(value, None) for value in values]


WRONG = [
    "", "   ", "{", '{"a"', '{"a": }', '{"a": 1', '\n {"a":\n  oops}', "[1, 2] x", '{"a": 1}\n\n {"b": 2}', "'a'",
    '"open', '"tab\t"', '{"a": 1,}', '\r\n["a",\r\n]', "nul",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_the_place_of_an_error_is_that_of_pythons_parser(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(JsonError) as found:
        parse_json(text)
    seen = found.value
    assert (seen.reason, seen.line, seen.column) == (
        expected.value.msg,
        expected.value.lineno,
        expected.value.colno,
    )
    assert str(seen) == f"{expected.value.msg}, column {expected.value.colno}"


@pytest.mark.parametrize(("text", "read", "reason", "line", "column"), [
    ("{}", 0, "Expecting '['", 1, 1),
    ("\n x", 0, "Expecting '['", 2, 2),
    ("[1, 2\n 3]", 2, "Expecting ',' delimiter", 2, 2),
    ("[1, 2", 2, "Expecting ',' delimiter", 1, 6),
    ("[1]\n2", 1, "Extra data", 2, 1),
    ("[] []", 0, "Extra data", 1, 4),
    ("[1,\n oops]", 1, "Expecting value", 2, 2),
    ("[1,]", 1, "Expecting value", 1, 4),
])  # fmt: skip
def test_an_array_gives_what_stands_before_an_error(text, read, reason, line, column):
    got = []
    with pytest.raises(JsonError) as found:
        for value, wrong in parse_elements(text):
            assert wrong is None
            got.append(value)
    assert len(got) == read
    assert (found.value.reason, found.value.line, found.value.column) == (reason, line, column)


MAX_DEPTH = 100  # docs/data.md


def nested(levels: int, kind: str) -> str:
    return "[" * levels + "]" * levels if kind == "lists" else '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_what_is_nested_up_to_the_limit_is_read_and_deeper_is_not(kind):
    assert parse_json(nested(MAX_DEPTH, kind)) == json.loads(nested(MAX_DEPTH, kind))
    assert list(parse_elements(f"[{nested(MAX_DEPTH, kind)}]")) == [(json.loads(nested(MAX_DEPTH, kind)), None)]
    beside = f"[{nested(MAX_DEPTH - 1, kind)}, [], []]"  # more brackets than levels
    assert parse_json(beside) == json.loads(beside)
    for levels in (MAX_DEPTH + 1, 100_000):
        for text, parse in ((nested(levels, kind), parse_json), (f"[{nested(levels, kind)}]", parse_elements)):
            with pytest.raises(JsonError, match=f"nested deeper than {MAX_DEPTH} levels") as found:
                list(parse(text))
            assert found.value.line is None and found.value.column is None


def test_brackets_side_by_side_and_in_texts_are_no_depth():
    for value in ([[]] * (2 * MAX_DEPTH), ["[{" * MAX_DEPTH], {str(number): {} for number in range(2 * MAX_DEPTH)}):
        assert parse_json(json.dumps(value)) == value


def test_a_key_that_stands_twice_is_named_and_its_neighbours_are_read():
    with pytest.raises(JsonError, match="an object has the key `a` twice") as found:
        parse_json('{"b": 1, "a": {"b": 2}, "a": 3}')
    assert found.value.line is None
    assert list(parse_elements('[{"a": 1}, {"x": {"k": 1, "k": 2}}, 7]')) == [
        ({"a": 1}, None),
        ({"x": {"k": 2}}, "an object has the key `k` twice"),
        (7, None),
    ]
    with pytest.raises(JsonError) as found:
        parse_json(json.dumps({"k" * 80: 1})[:-1] + f', "{"k" * 80}": 2}}')
    assert found.value.reason == f"an object has the key `{'k' * 60}` twice"


def test_what_python_leaves_with_errors_of_its_own():
    with pytest.raises(JsonError, match="an integer has more digits than can be read"):
        parse_json("9" * 5000)
    with pytest.raises(JsonError, match="a byte-order mark that does not begin the file") as found:
        parse_json("\ufeff{}")
    assert (found.value.line, found.value.column) == (1, 1)
