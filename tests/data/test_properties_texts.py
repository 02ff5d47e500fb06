"""Properties of templates and of tokenisation: what goes in stands in the result, exactly once and in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rlhf.data.rendered import markup_of, raw_prompt, split_rendered
from rlhf.data.row_values import INVISIBLE, without_end_marks
from rlhf.data.sources import DataError
from rlhf.data.templates import TEXT_TEMPLATES, Template, load_template
from rlhf.data.token_cache import cached_tokens, record_key_parts
from rlhf.data.tokenize import TextEncoder, tokenize_records
from rlhf.types import PreferenceRecord, PromptRecord, RankedRecord, ResponseRecord
from tests.data.test_tokenize import BOS, make_tokenizer
from tests.support.property_inputs import (
    EOS,
    broken_texts,
    cases,
    file_bytes,
    json_values,
    texts,
    visible_texts,
    written,
)

PLACES = ("{instruction}", "{input}")


def load(path: Path) -> Template | None:
    """The template, or None after a clear error."""
    try:
        template = load_template(str(path))
    except DataError as error:
        assert str(path) in str(error)
        return None
    assert template == load_template(str(path))
    for text in (
        template.render("질문"),
        template.render("질문", "입력"),
        template.render_messages([{"role": "user", "content": "질문"}]),
    ):
        assert text.count("질문") >= 1 and text.encode()
    return template


@cases(30)
@example("a.json", b"[" * 100_000)  # RecursionError
@example("a.json", b'{"prompt_no_input": ' + b"1" * 5000 + b"}")
@example("a.json", b'{"prompt_no_input": "\\ud800{instruction}"}')  # failed in the tokenizer
@example("a.json", b'{"prompt_no_input": "a{instruction}", "prompt_no_input": "b{instruction}"}')
@given(
    st.sampled_from(["a.txt", "a.json", "a", "A.JSON"]),
    st.one_of(file_bytes, file_bytes.map(lambda data: data + b"{instruction}")),
)
def test_any_template_file_is_a_template_or_a_clear_error(name: str, content: bytes) -> None:
    with written(name, content) as path:
        template = load(path)
        assert template is None or b"instruction" in content


@cases(20)
@given(
    st.dictionaries(
        st.sampled_from(["prompt_no_input", "prompt_input", "description"]),
        st.one_of(
            json_values,
            broken_texts.map(lambda text: text + "{instruction}"),
            broken_texts.map(lambda text: "{input}{instruction}" + text),
        ),
    )
)
def test_any_json_template_is_a_template_or_a_clear_error(content: dict) -> None:
    with written("a.json", json.dumps(content).encode()) as path:
        template = load(path)
        if template is not None:
            assert template.without_input == content["prompt_no_input"]
            assert template.with_input == content.get("prompt_input", template.with_input)


@cases(20)
@example("~nobody-of-this-name")
@example("지시: {instruction}\n" * 200)  # OSError: file name too long
@example("a\0b")
@given(broken_texts)
def test_any_template_name_is_a_clear_error(name: str) -> None:
    assume(name not in (*TEXT_TEMPLATES, "chat") and not os.path.exists(name))
    with pytest.raises(DataError):
        load_template(name)


@cases(30)
@given(st.lists(texts, min_size=3, max_size=3), visible_texts, texts)
def test_a_template_file_renders_exactly_what_stands_in_it(
    parts: list[str], instruction: str, given_input: str
) -> None:
    parts = [part.replace("{", "").replace("\r", "") for part in parts]
    content = {
        "prompt_no_input": parts[0] + "{instruction}" + parts[2],
        "prompt_input": "{instruction}".join(parts[:2]) + "{input}" + parts[2],
    }
    with written("a.json", json.dumps(content).encode()) as path:
        template = load_template(str(path))
    assert template.render(instruction) == parts[0] + instruction + parts[2]
    if given_input.strip():
        assert template.render(instruction, given_input) == parts[0] + instruction + parts[1] + given_input + parts[2]
    else:
        assert template.render(instruction, given_input) == template.render(instruction)


@cases(30)
@given(st.sampled_from([name for name in TEXT_TEMPLATES if name != "none"]), visible_texts, texts, texts)
def test_a_rendered_prompt_is_known_and_split_at_its_end(
    name: str, instruction: str, given_input: str, answer: str
) -> None:
    answer = "답" + answer.replace("#", "").replace("\n", "")
    prompt = load_template(name).render(instruction, given_input)
    assert markup_of(prompt) is not None and split_rendered(prompt + answer) == (prompt, answer) and raw_prompt(prompt)
    assert instruction in prompt and (given_input in prompt or not given_input.strip())


@cases(30)
@given(
    st.sampled_from(list(TEXT_TEMPLATES)),
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), visible_texts), max_size=5),
)
def test_every_turn_of_a_conversation_stands_in_order(name: str, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    roles = [role for role, _ in turns]
    spoken = [role for role in roles if role != "system"]
    allowed = (
        "tool" not in roles and spoken[:1] == ["user"] == spoken[-1:] and "system" not in roles[roles.index("user") :]
    )
    try:
        text = load_template(name).render_messages(messages)
    except DataError:
        assert not allowed
        return
    assert allowed
    place = 0
    for _, content in turns:
        place = text.index(content.rstrip(), place) + len(content.rstrip())


TOKENIZERS = {
    "plain": make_tokenizer(),
    "bos": make_tokenizer(bos=BOS, start=(BOS,)),
    "both": make_tokenizer(bos=BOS, start=(BOS,), end=(EOS,)),
}


def without_end(text: str) -> str:
    """The response without the ends of sequence that close it, by another road than the code: splitting."""
    pieces = text.split(EOS)
    while len(pieces) > 1 and not "".join(pieces[-1].split()).strip("".join(INVISIBLE)):
        pieces.pop()
    if len(pieces) == len(text.split(EOS)):
        return text
    return EOS.join(pieces)


@cases(50)
@example("bos", "<s>a", f"b{EOS} {EOS}\n", None, None)
@example("plain", "a", f"{EOS} x" * 3, 3, 3)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    texts,
    texts,
    st.one_of(st.none(), st.integers(2, 6)),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_the_boundary_is_exact(
    name: str, prompt: str, response: str, prompt_limit: int | None, response_limit: int | None
) -> None:
    tokenizer = TOKENIZERS[name]
    eos, start = tokenizer.eos_token_id, () if name == "plain" else (tokenizer.bos_token_id,)
    encoder = TextEncoder(tokenizer)
    (whole,), (answer,) = encoder.prompts([prompt]), encoder.responses([response])
    assert whole.ids[: len(start)] == start and not {eos, tokenizer.pad_token_id} & set(whole.ids)
    assert tokenizer.decode(whole.ids[len(start) :]) == (prompt.removeprefix(BOS) if start else prompt)
    assert answer.ids[-1] == eos and not {eos, tokenizer.pad_token_id} & set(answer.ids[:-1])
    assert tokenizer.decode(answer.ids[:-1]) == without_end(response)
    assert answer.empty == (len(answer.ids) == 1)
    limited = TextEncoder(tokenizer, max_prompt_tokens=prompt_limit, max_response_tokens=response_limit)
    joined = limited.prompts([prompt])[0].ids + limited.responses([response])[0].ids
    room = len(whole.ids) if prompt_limit is None else prompt_limit - len(start)
    kept = start + whole.ids[len(start) :][max(0, len(whole.ids) - len(start) - room) :]
    assert joined == kept + answer.ids[:response_limit]


@cases(15)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.tuples(visible_texts, visible_texts, visible_texts, texts), min_size=1, max_size=4),
    st.sampled_from([PromptRecord, ResponseRecord, PreferenceRecord, RankedRecord]),
    st.integers(0, 10**6),
    st.integers(1, 255),
)
def test_rows_survive_the_cache_and_damage_is_found(
    name: str, rows: list[tuple], kind: type, place: int, change: int
) -> None:
    records: list[Any] = []
    for prompt, first, second, category in rows:
        answers = {
            PromptRecord: (),
            ResponseRecord: (first,),
            PreferenceRecord: (first, second),
            RankedRecord: ((first, second), (1, 0)),
        }[kind]
        records.append(kind(prompt, prompt, *answers, meta={"category": category}))
    made = tokenize_records(records, TOKENIZERS[name], max_prompt_tokens=20, max_response_tokens=5)
    with written("other", b"") as beside:
        folder = beside.parent / "cache"
        for _ in range(2):
            rows_back, report = cached_tokens(record_key_parts(records), cache_dir=folder, make=lambda: made)
            assert rows_back == made[0] and report.as_dict() == made[1].as_dict()
        (path,) = folder.iterdir()
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= change
        path.write_bytes(bytes(data))
        try:
            assert cached_tokens(record_key_parts(records), cache_dir=folder, make=lambda: made)[0] == made[0]
        except DataError as error:
            assert str(path) in str(error) and "is damaged" in str(error)


def test_many_ends_of_sequence_take_linear_time() -> None:
    """A model's looped output: the patterns for trailing ends used to look from each of them to the end again."""
    looped = EOS * 100_000
    assert without_end_marks("답" + looped, [EOS]) == "답" and without_end_marks(looped + "답", [EOS]) == looped + "답"
