"""Headers of columns as people write them: the spellings of one header, and guesses at what a column holds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

SAME_HEADER = {
    "prompt": ("프롬프트",),
    "instruction": ("지시문", "지시사항", "명령어", "명령"),
    "input": ("입력",),
    "context": ("맥락", "문맥", "지문", "본문"),
    "output": ("출력",),
    "response": ("응답", "답변"),
    "question": ("질문", "질의", "q"),
    "answer": ("답변", "응답", "답", "대답", "a"),
}
"""The header of a known format -> what else means the same. Only what is certain: the rest is guessed at, not read."""

_ROLE_WORDS = {
    "prompt": "question query prompt instruction input q 질문 질의 문의 물음 지시문 지시 명령어 명령 입력 프롬프트",
    "response": "answer response output completion reply target a 답변 응답 대답 정답 답안 출력 답",
    "chosen": "chosen preferred accepted better winner best 선호 채택",
    "rejected": "rejected dispreferred worse loser worst 비선호 거절 거부 기각",
}
_WORDS = {word: role for role, words in _ROLE_WORDS.items() for word in words.split()}
_SAYS_NOTHING = re.compile(r"([\s_-]*(내용|텍스트|원문|text|content|\d+)|\s*\([^()]*\))+\Z")
"""What may follow the word that says what a column holds: `질문 내용`, `answer_text`, `답변 (검수)`."""


def canonical(header: str) -> str:
    """A header without what does not count: NFC, no white space around it, letters in lower case."""
    return unicodedata.normalize("NFC", header).strip().casefold()


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
    if word.isascii():  # "answer" ends `model_answer`, and "a" does not end `data`
        return not before or not before[-1].isalnum()
    return not before or len(word) > 1  # 답 ends many words
