"""Prompt templates: instruction, input and earlier turns -> the text that the model continues.

A template is text with the places {instruction} and {input}. They are filled in one pass without `str.format`, so
braces in a user's text, even a literal "{input}", stay as they are. Every rendering ends where the answer begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.file_bytes import LFS_HEADER
from rlhf.data.json_text import JsonError, parse_json
from rlhf.data.row_values import shown
from rlhf.data.spec import DataError
from rlhf.types import Message

ROLES = ("system", "user", "assistant")

_KULLM_HEAD = "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요."
_KULLM_INPUT_HEAD = (
    "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
    "요청을 적절히 완료하는 응답을 작성하세요."
)
_ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_INPUT_HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
TEXT_TEMPLATES = {
    # KULLM (nlpai-lab/KULLM templates/kullm.json), used by KULLM-RLHF and LawBot
    "kullm": (
        _KULLM_HEAD + "\n\n### 명령어:\n{instruction}\n\n### 응답:\n",
        _KULLM_INPUT_HEAD + "\n\n### 명령어:\n{instruction}\n\n### 입력:\n{input}\n\n### 응답:\n",
    ),
    # Stanford Alpaca, as in Alpaca-LoRA's templates/alpaca.json
    "alpaca": (
        _ALPACA_HEAD + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        _ALPACA_INPUT_HEAD + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    # KoAlpaca, and KULLM's inference
    "koalpaca": (
        "### 질문: {instruction}\n\n### 답변:",
        "### 질문: {instruction}\n\n### 맥락: {input}\n\n### 답변:",
    ),
    "law_polyglot": (
        "### Instruction:\n{instruction}\n\n### Response:",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    # hh-rlhf transcripts (Anthropic)
    "hh": ("\n\nHuman: {instruction}\n\nAssistant:", "\n\nHuman: {instruction}\n{input}\n\nAssistant:"),
    "none": ("{instruction}", "{instruction}\n\n{input}"),
}
"""Name -> (prompt without an input, prompt with one)."""


@dataclass(frozen=True)
class Template:
    """A text template; `ChatTemplate` is the one with a tokenizer's own markers."""

    name: str
    without_input: str
    with_input: str

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of one turn; an empty (or white) `input` is left out with its heading."""
        if input.strip():
            return _fill(self.with_input, {"instruction": instruction, "input": input})
        return _fill(self.without_input, {"instruction": instruction})

    def render_after(self, before: Sequence[Message], instruction: str, input: str = "") -> str:
        """The prompt of an instruction that follows a system text and earlier turns (either may be missing).

        After earlier turns the input follows the instruction after a blank line, under no heading of its own.
        Raises DataError where the roles do not allow it.
        """
        if any(message["role"] != "system" for message in before):
            return self.render_messages([*before, user_message(instruction, input)])
        prompt = self.render(instruction, input)
        system = "\n\n".join(message["content"] for message in before)
        return f"{system}\n\n" + prompt.lstrip("\n") if system else prompt

    def render_messages(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation of {role, content} that ends with the user's turn.

        A single user turn gives the same text as `render`. Later turns follow after a blank line with the
        template's own markers and without its introduction; a system message is put in front of everything.
        Raises DataError where the roles do not allow it.
        """
        head, tail = self.without_input.split("{instruction}")
        turn_head = head.rpartition("\n\n")[2]
        system, turns = _turns(messages)
        text = "\n\n".join([system, head.lstrip("\n")]) if system else head
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                text += turn["content"].rstrip() + "\n\n" + turn_head
            else:
                last = index == len(turns) - 1
                text += turn["content"] + (tail if last else tail or "\n\n")
        return text


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The chat template that comes with a tokenizer; its text already holds the special tokens, bos among them."""

    tokenizer: Any = None

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of one user turn, the input after a blank line."""
        return self.render_messages([user_message(instruction, input)])

    def render_after(self, before: Sequence[Message], instruction: str, input: str = "") -> str:
        """The conversation of the earlier messages and the instruction, in the tokenizer's format."""
        return self.render_messages([*before, user_message(instruction, input)])

    def render_messages(self, messages: Sequence[Message]) -> str:
        """The conversation in the tokenizer's format, up to where the assistant begins."""
        import jinja2

        system, turns = _turns(messages)
        front = [{"role": "system", "content": system}] if system else []
        try:
            text = self.tokenizer.apply_chat_template([*front, *turns], add_generation_prompt=True, tokenize=False)
        except jinja2.exceptions.TemplateError as error:
            raise DataError(f"the tokenizer's chat template does not take this conversation: {error}") from error
        return str(text)


def load_template(name_or_path: str, tokenizer: Any = None) -> Template:
    """A template by name (`TEXT_TEMPLATES`, `chat`) or from a file.

    A JSON file needs `prompt_no_input` and may have `prompt_input`, as KULLM's and Alpaca-LoRA's templates do. A text
    file holds {instruction} and perhaps {input}; the paragraph with {input} is left out where a row has none, and
    the file's last line break does not count. `chat` needs `tokenizer`. Raises DataError for anything else.
    """
    if name_or_path in TEXT_TEMPLATES:
        return Template(name_or_path, *TEXT_TEMPLATES[name_or_path])
    if name_or_path == "chat":
        if tokenizer is None:
            raise DataError("template `chat` is the tokenizer's own; none was given")
        if not getattr(tokenizer, "chat_template", None):
            source = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"template `chat`: the tokenizer {source} has no chat template; use one of {', '.join(TEXT_TEMPLATES)}"
            )
        return ChatTemplate("chat", "{instruction}", "{instruction}\n\n{input}", tokenizer)
    try:
        path = Path(name_or_path).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError):  # a name that is too long (a template's text, perhaps), `~nobody`
        is_file = False
    if not is_file:
        raise DataError(
            f"unknown template `{name_or_path}` (nor is it a file); valid: {', '.join(TEXT_TEMPLATES)}, chat, "
            "or the path of a .json or text file"
        )
    return _template_from_file(path)


def user_message(instruction: str, input: str = "") -> Message:
    """The user's turn that asks `instruction`, with an input that is not white after a blank line."""
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input.strip() else instruction}


def render_messages(messages: Sequence[Message], tokenizer: Any) -> str:
    """A conversation that ends with the user's turn in the tokenizer's own chat template, up to its answer.

    Raises DataError where the tokenizer has no chat template, or its template does not take these roles.
    """
    return load_template("chat", tokenizer).render_messages(messages)


def _fill(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(instruction|input)\}", lambda match: values[match.group(1)], text)


def _turns(messages: Sequence[Message]) -> tuple[str, list[dict[str, str]]]:
    """The system text and the user and assistant turns; neighbours of one role are joined by a blank line."""
    system: list[str] = []
    turns: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f"role {role!r} is not one of {', '.join(ROLES)}")
        if role == "system":
            if turns:
                raise DataError("a system message must come before the first turn")
            system.append(content)
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({"role": role, "content": content})
    if not turns or turns[-1]["role"] != "user":
        last = turns[-1]["role"] if turns else "missing"
        raise DataError(f"a prompt must end with the user's turn; the last turn is {last}")
    if turns[0]["role"] != "user":
        raise DataError("a conversation must begin with the user's turn; the first turn is assistant")
    return "\n\n".join(system), turns


def _template_from_file(path: Path) -> Template:
    try:
        if path.read_bytes().startswith(LFS_HEADER):
            raise DataError(f"template {path}: a git-lfs pointer; run `git lfs pull` where the file came from")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"template {path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"template {path} cannot be read ({error.strerror or error})") from error
    if path.suffix.lower() == ".json":
        try:
            content = parse_json(text)
        except JsonError as error:
            raise DataError(f"template {path} is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("prompt_no_input"), str):
            raise DataError(f"template {path} needs the keys prompt_no_input and prompt_input, both texts")
        without_input = content["prompt_no_input"]
        with_input = content.get("prompt_input", without_input.replace("{instruction}", "{instruction}\n\n{input}"))
    else:
        with_input = text.removesuffix("\n")
        if "{input}" in with_input:
            paragraphs = with_input.split("\n\n")
            kept = [part for part in paragraphs if "{input}" not in part or "{instruction}" in part]
            without_input = "\n\n".join(kept).replace("{input}", "")
        else:
            without_input = with_input
            with_input = without_input.replace("{instruction}", "{instruction}\n\n{input}")
    for part, wanted in ((without_input, ("instruction",)), (with_input, ("instruction", "input"))):
        for place in wanted:
            if not isinstance(part, str) or part.count("{" + place + "}") != 1:
                raise DataError(f"template {path}: {{{place}}} must be there exactly once, in {shown(part)}")
        try:
            part.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"template {path} holds half of a surrogate pair, in {shown(part)}") from None
    if "{input}" in without_input:
        raise DataError(f"template {path}: prompt_no_input must not hold {{input}}")
    return Template(path.stem, without_input, with_input)
