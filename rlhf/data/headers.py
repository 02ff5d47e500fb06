"""Headers of columns as people write them: the spellings of one header, and guesses at what a column holds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

SAME_HEADER = {
    "prompt": ("프롬프트",),
    "instruction": ("지시문", "지시사항", "명령어", "명령"),
    "input": ("입력",),
    "context": ("맥락", "문맥", "지문", "본문"),
    "output": ("출력",),
    "response": ("응답", "답변"),
    "question": ("질문", "질의", "q"),
    "answer": ("답변", "응답", "답", "대답", "a"),
    "label": ("라벨", "레이블"),
}
"""The header of a known format -> what else means the same. Only what is certain: the rest is guessed at, not read."""

_ROLE_WORDS = {
    "prompt": "question query prompt instruction input q 질문 질의 문의 물음 지시문 지시 명령어 명령 입력 프롬프트",
    "response": "answer response output completion reply target a 답변 응답 대답 정답 답안 출력 답",
    "chosen": "chosen preferred accepted better winner best 선호 채택",
    "rejected": "rejected dispreferred worse loser worst 비선호 거절 거부 기각",
}
_WORDS = {word: role for role, words in _ROLE_WORDS.items() for word in words.split()}
_SAYS_NOTHING = re.compile(r"([\s_-]*(내용|텍스트|원문|text|content|\d+)|[\s_-]+[a-z]|\s*\([^()]*\))+\Z")
"""What may follow the word that says what a column holds: `질문 내용`, `answer_text`, `답변 A`, `답변 (검수)`."""
_LABEL = re.compile(
    r"(label|라벨|레이블)(s|ed|링|명|값|[\s_-].*)?|(is[\s_-]?)?((in)?correct|(un)?acceptable|accepted|wrong|(in)?valid|(un)?safe)"
    r"|(in)?correctness|acceptability|verdict|status|rank(s|ing|ings)?|순위|등수|상태|판정|평가|오답"
    r"|(정답|적절|적합|채택|정오|합격)([\s_-]?(성|여부))?|모범\s?답안|(in)?correct[\s_-]answers?|wrong[\s_-]answers?"
)
"""Headers that tell good answers from bad ones, or hold the answer that is right: all rows are not to be imitated."""
_PART = re.compile(
    r"text|sentence|passage|paragraph|보기.*|선택지.*|선지.*|choice.*|options?([\s_.-].*|\d+|[a-z])?"
    r"|distractors?([\s_.-].*|\d+)?|\(?([1-9]|[b-e])[.)]?"
)
"""Headers of reading comprehension and multiple choice: the question alone cannot be answered there."""
_NUMBERS_ROWS = re.compile(r"(row[\s_-]?)?id\d*|no\.?|idx|index|번호|순번|연번|(unnamed: \d+)?")
_PASSAGES = ("passage", "paragraph", "text", "sentence")


def canonical(header: str) -> str:
    """A header without what does not count: NFKC, no invisible characters, no white space around, lower case."""
    visible = "".join(character for character in header if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).strip().casefold())


def is_label(header: str) -> bool:
    """Whether a header says that the column tells good answers from bad ones."""
    return _LABEL.fullmatch(canonical(header).rstrip(" ?")) is not None


def parts_among(headers: Collection[str]) -> list[str]:
    """The columns whose header says that they hold a passage or an option of the question; A is one beside B."""
    spelt = {header: canonical(header) for header in headers}
    lettered = {"b", "b."} & set(spelt.values())
    return [
        header for header, said in spelt.items() if _PART.fullmatch(said) or (lettered and said in ("a", "a.", "(a)"))
    ]


def numbers_rows(header: str) -> bool:
    """Whether a column numbers the rows, whatever its values look like."""
    return _NUMBERS_ROWS.fullmatch(canonical(header)) is not None


def passage_among(there: Iterable[str]) -> str | None:
    """The column whose header says that it is the passage that a question is about."""
    alike = {canonical(column): column for column in there}
    return next((alike[name] for name in _PASSAGES if name in alike), None)


def columns_named(name: str, there: Iterable[str]) -> list[str]:
    """The columns whose header is `name` or means the same."""
    spellings = (name, *SAME_HEADER.get(name, ()))
    return [column for column in there if canonical(column) in spellings]


def column_spelt(name: str, there: Iterable[str]) -> str | None:
    """The column that `name` is meant to be: the same text, else the only one that differs in what does not count."""
    alike = [column for column in there if canonical(column) == canonical(name)]
    if name in alike:
        return name
    return alike[0] if len(alike) == 1 else None


def guessed_roles(headers: Collection[str]) -> dict[str, tuple[str, bool]]:
    """`guessed_role` of each header that has one; Q and A only beside each other, and without an option B."""
    roles = {header: role for header in headers if (role := guessed_role(header)) is not None}
    spelt = {canonical(header) for header in headers}
    if {"q", "a"} <= spelt and "b" not in spelt:
        return roles
    return {header: role for header, role in roles.items() if canonical(header) not in ("q", "a")}


def guessed_role(header: str) -> tuple[str, bool] | None:
    """What a column may hold (`prompt`, `response`, `chosen`, `rejected`), and whether its header says nothing else.

    The last word of a header counts, in Korean as in English: `질문 답변` is an answer.
    """
    said = _SAYS_NOTHING.sub("", canonical(header))
    ending = max((word for word in _WORDS if _ends_with_word(said, word)), key=len, default=None)
    return None if ending is None else (_WORDS[ending], ending == said)


def _ends_with_word(said: str, word: str) -> bool:
    before = said[: -len(word)]
    if not said.endswith(word):
        return False
    if not before or len(word) == 1:  # 답, a and q end many words
        return not before
    return not word.isascii() or not before[-1].isalnum()  # "answer" ends `model_answer`, and not `reanswer`
