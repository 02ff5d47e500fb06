"""Templates against the published texts, and against hostile input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.data.rendered import markup_of, raw_prompt, split_rendered
from rlhf.data.sources import DataError
from rlhf.data.templates import TEXT_TEMPLATES, load_template
from tests.support.published import published

EXPECTED = {
    "kullm": (
        "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요.\n\n"
        "### 명령어:\nA\n\n### 응답:\n",
        "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
        "요청을 적절히 완료하는 응답을 작성하세요.\n\n### 명령어:\nA\n\n### 입력:\nB\n\n### 응답:\n",
    ),
    "koalpaca": ("### 질문: A\n\n### 답변:", "### 질문: A\n\n### 맥락: B\n\n### 답변:"),
    "law_polyglot": (
        "### Instruction:\nA\n\n### Response:",
        "### Instruction:\nA\n\n### Input:\nB\n\n### Response:",
    ),
    "hh": ("\n\nHuman: A\n\nAssistant:", "\n\nHuman: A\nB\n\nAssistant:"),
    "none": ("A", "A\n\nB"),
}


class ChatTokenizer:
    """A stand-in with a real jinja chat template."""

    chat_template = (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    name_or_path = "tiny-chat"

    def apply_chat_template(self, messages: list, add_generation_prompt: bool, tokenize: bool) -> str:
        import jinja2

        def raise_exception(text: str) -> None:
            raise jinja2.exceptions.TemplateError(text)

        assert not tokenize
        template = jinja2.Environment().from_string(self.chat_template)
        return template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=raise_exception
        )


@pytest.mark.parametrize("name", EXPECTED)
def test_rendering(name: str) -> None:
    template = load_template(name)
    assert (template.render("A"), template.render("A", "B")) == EXPECTED[name]
    assert template.render("A", " \n") == EXPECTED[name][0]


@pytest.mark.parametrize("name", ["kullm", "alpaca", "alpaca_short", "vigogne"])
def test_published_template_files(name: str) -> None:
    path = published(f"kullm/{name}.json")
    template, original = load_template(str(path)), json.loads(path.read_text(encoding="utf-8"))
    assert template.render("{x} {0}") == original["prompt_no_input"].replace("{instruction}", "{x} {0}")
    assert template.render("A", "B") == original["prompt_input"].format(instruction="A", input="B")
    if name in TEXT_TEMPLATES:
        assert template.render("A", "B") == load_template(name).render("A", "B")
        assert template.render("A") == load_template(name).render("A")


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_braces_and_places_in_user_text_stay(name: str) -> None:
    hostile = "{} {0} {input} {instruction} {{name}} %s \\1 {prompt!r:>9}"
    rendered = load_template(name).render(hostile, "{instruction} {")
    assert rendered.count(hostile) == 1 and "{instruction} {" in rendered.replace(hostile, "")
    assert load_template(name).render("A", "B").replace("A", "").count("{") == 0


@pytest.mark.parametrize("name", [*TEXT_TEMPLATES, "chat"])
def test_one_user_turn_is_the_same_as_render(name: str) -> None:
    template = load_template(name, ChatTokenizer())
    assert template.render_messages([{"role": "user", "content": "질문 {input}"}]) == template.render("질문 {input}")


CONVERSATION = [
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hh", "\n\nHuman: U1\n\nAssistant:A1\n\nHuman: U2\n\nAssistant:"),
        ("koalpaca", "### 질문: U1\n\n### 답변:A1\n\n### 질문: U2\n\n### 답변:"),
        ("none", "U1\n\nA1\n\nU2"),
        (
            "kullm",
            "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요.\n\n"
            "### 명령어:\nU1\n\n### 응답:\nA1\n\n### 명령어:\nU2\n\n### 응답:\n",
        ),
    ],
)
def test_turns(name: str, expected: str) -> None:
    template = load_template(name)
    assert template.render_messages(CONVERSATION) == expected
    with_system = template.render_messages([{"role": "system", "content": "S"}, *CONVERSATION])
    assert with_system == "S\n\n" + expected.lstrip("\n")


def test_neighbouring_turns_are_joined_and_wrong_orders_are_errors() -> None:
    template = load_template("hh")
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert template.render_messages(two) == "\n\nHuman: a\n\nb\n\nAssistant:"
    with pytest.raises(DataError, match="last turn is assistant"):
        template.render_messages(CONVERSATION[:2])
    with pytest.raises(DataError, match="last turn is missing"):
        template.render_messages([{"role": "system", "content": "S"}])
    with pytest.raises(DataError, match="first turn is assistant"):
        template.render_messages(CONVERSATION[1:])
    with pytest.raises(DataError, match="role 'tool' is not one of system, user, assistant"):
        template.render_messages([{"role": "tool", "content": "x"}, *two])


def test_chat_template() -> None:
    template = load_template("chat", ChatTokenizer())
    assert template.render("질문", "맥락") == "<s>[user]질문\n\n맥락[assistant]"
    assert template.render_messages(CONVERSATION) == "<s>[user]U1[assistant]A1[user]U2[assistant]"
    with pytest.raises(DataError, match="does not take this conversation: no system role"):
        template.render_messages([{"role": "system", "content": "S"}, *CONVERSATION])


def test_choices_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="unknown template `kulm`.*kullm, alpaca, koalpaca, law_polyglot, hh, none, chat"
    ):
        load_template("kulm")
    with pytest.raises(DataError, match="none was given"):
        load_template("chat")
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(DataError, match="tiny-chat has no chat template; use one of kullm"):
        load_template("chat", tokenizer)


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff지시: {instruction}\r\n\r\n참고: {input}\r\n\r\n답:\r\n".encode())
    template = load_template(str(path))
    assert template.render("가{input}", "나") == "지시: 가{input}\n\n참고: 나\n\n답:"
    assert template.render("가") == "지시: 가\n\n답:"
    path.write_text("Q: {instruction}\nA:", encoding="utf-8")
    assert load_template(str(path)).render("가", "나") == "Q: 가\n\n나\nA:"
    assert load_template(str(path)).render_messages(CONVERSATION) == "Q: U1\nA:A1\n\nQ: U2\nA:"
    path.write_text("[{instruction} {input}] ", encoding="utf-8")
    assert load_template(str(path)).render("가") == "[가 ] "
    path.write_text('{"role": {}} {instruction} {other}', encoding="utf-8")
    assert load_template(str(path)).render("{input}", "나") == '{"role": {}} {input}\n\n나 {other}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "no places", r"\{instruction\} must be there exactly once"),
        ("a.txt", "{instruction} {instruction}", "exactly once"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "needs the keys prompt_no_input and prompt_input"),
        ("a.json", '{"prompt_no_input": "{instruction}", "prompt_input": "{instruction}"}', r"\{input\} must be there"),
        ("a.json", '{"prompt_no_input": "{instruction}{input}"}', "exactly once|must not hold"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_template(str(path))


@pytest.mark.parametrize("name", [name for name in [*TEXT_TEMPLATES] if name != "none"])
def test_rendered_prompts_are_known_and_taken_apart(name: str) -> None:
    template = load_template(name)
    prompt = template.render("질문은\n두 줄", "맥락")
    assert markup_of(prompt) is not None and raw_prompt(prompt).split() == ["질문은", "두", "줄", "맥락"]
    assert split_rendered(prompt + "답 하나") == (prompt, "답 하나")
    assert markup_of(prompt + "답 하나") is None


def test_plain_prompts_are_not_taken_for_rendered_ones() -> None:
    for text in ("안녕?", "### 질문: 이 표기는 뭐예요?", "무엇을 쓸까요 ### 답변:", "Human: hello"):
        assert markup_of(text) is None
    assert split_rendered("그냥 글") is None
