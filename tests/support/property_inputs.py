"""What the property tests draw from: hostile texts, JSON values and bytes; and how many cases a property runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from rlhf.data.sources import DataError, DatasetSpec, Row, SkippedRow, read_rows

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "rlhf-hypothesis")  # no folder of its own in the project

CASES = int(os.environ.get("RLHF_PROPERTY_CASES", "0"))
"""Cases of every property, drawn anew in each run; 0 runs the few, always the same, that each property names."""


def cases(count: int) -> settings:
    """The settings of a property: `count` derandomised cases, or `RLHF_PROPERTY_CASES` random ones."""
    return settings(
        max_examples=CASES or count,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


EOS = "<|endoftext|>"
PIECES = (
    "안녕", "한글", "café", "cafe\u0301", "\u1112\u1161\u11ab", "\u212b", "\U0001f468\u200d\U0001f469",  # NFC, NFD
    "\u200b", "\ufeff", "\u2060", "\u3164", "\ufe0f", "\U000e0020", "\u2028", "\u2029", "\x85", "\x1c", "\u3000",
    "\0", "\x01", "\r", "\n", "\r\n", "\n\n", "\t", " ", '"', '""', "'", ",", "|", ";", "[", "]", "{", "}", ":", "\\",
    EOS, "</s>", "### 질문: ", "### 답변:", "### 응답:\n", "\n\nHuman: ", "\n\nAssistant:", "{instruction}", "{input}",
    "- ", "# ", "&a", "*a", "!!", "<<", "null", "true", "no", "010", "1:30", "1_0", "1e3", "1.10", ".nan", "---", "%",
)  # fmt: skip

texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=5).map("".join)
"""Text that holds no half of a surrogate pair."""
broken_texts = st.lists(st.one_of(texts, st.text(st.characters(), max_size=3)), max_size=3).map("".join)
"""The same with surrogates, whole pairs as two halves among them."""
visible_texts = texts.map(lambda text: f"x{text}y")
"""Text with a visible character, which no reader takes for JSON."""
INVISIBLE = (
    "\u200b\u200c\u200d\u2060\u2062\u2064\ufeff\u00ad\u034f\u061c\u115f\u1160\u17b4\u180e\u202a\u202e\u2066\u2069"
)
INVISIBLE += "\u206f\u2800\u3164\ufe00\ufe0f\uffa0\ufff0\U0001d173\U000e0001\U000e0041\U000e0100\0\x01\x1b\x7f\x9f"
unseen_texts = st.lists(
    st.one_of(st.sampled_from([*INVISIBLE, *" \t\n\r\u00a0\u2003\u2028\u3000\x85", EOS, "</s>"])), max_size=6
).map("".join)
"""Text that shows nothing: white space, invisible and control characters; end-of-text tokens in any place."""

numbers = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e308, -1e308, 5e-324])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, broken_texts, st.sampled_from(["[" * 2000, "[1" * 300, "[1]"]))
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(broken_texts, inner, max_size=3)),
    max_leaves=8,
)
json_rows = st.dictionaries(broken_texts, json_values, max_size=4)

FRAGMENTS = (
    b'{"a": 1}', b'{"a": "\\ud800"}', b"[", b"]", b"{", b"}", b'"', b":", b",", b"\t", b"\n", b"\r", b"\r\n", b" ",
    b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xe2\x80\xa8", b"\0", b"\x1f\x8b", b"PAR1", b"null",
    b"NaN", b"1"*5000, b"["*3000, b'{"a":'*1500, b"q,a\n", b"q\ta\n", b"---\n", b"- ", b"&a ", b"*a ",
    b"!!python/object:os.system", b"!!int x", b"!!bool x", b"!!timestamp x", b"2001-99-99", b'"\\U00110000"', b"<<: ",
    b"? ", b"version https://git-lfs", "한".encode("cp949"), "한글".encode("utf-16"), b"{instruction}", b"{input}",
    b'"prompt_no_input"', b"ppo: ", b"steps: ",
)  # fmt: skip
file_bytes = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=3)), max_size=12).map(b"".join),
)


@contextmanager
def written(name: str, content: bytes) -> Iterator[Path]:
    """A file that is there for one case."""
    with tempfile.TemporaryDirectory(prefix="rlhf-property-") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def read(path: Path, on_bad_row: str = "error", **spec: Any) -> tuple[list[Row], list[SkippedRow], str | None]:
    """Rows, skipped rows and the error (which names the file) of one reading; any other exception passes through."""
    rows: list[Row] = []
    skipped: list[SkippedRow] = []
    try:
        for row in read_rows(DatasetSpec(str(path), **spec), on_bad_row, skipped):
            rows.append(row)
    except DataError as error:
        assert str(path) in str(error)
        return rows, skipped, str(error)
    return rows, skipped, None


def read_both_ways(path: Path, **spec: Any) -> tuple[list[Row], list[SkippedRow], str | None]:
    """A reading that skips, after checks: it repeats itself, and agrees with the one that stops at a bad row."""
    strict, nothing, error = read(path, **spec)
    assert repr(read(path, **spec)) == repr((strict, nothing, error)) and not nothing
    rows, skipped, whole_error = read(path, "skip", **spec)
    assert repr(read(path, "skip", **spec)) == repr((rows, skipped, whole_error))
    if error is None:
        assert repr(rows) == repr(strict) and not skipped and whole_error is None
    elif whole_error is None:
        assert error == f"{skipped[0].file}:{skipped[0].line}: {skipped[0].reason}"
        assert repr(rows[: len(strict)]) == repr(strict) and all(
            row.line > skipped[0].line for row in rows[len(strict) :]
        )
    lines = [row.line for row in rows]
    assert lines == sorted(set(lines)) and not set(lines) & {item.line for item in skipped}
    assert len({item.line for item in skipped}) == len(skipped)
    return rows, skipped, whole_error
