"""Rewards that are rules: what a response is seen to have or to lack, without a model.

Each class is a reward; its named arguments are its options in the configuration. Tokens of a response include its end
where it has one. The configuration reads this before torch is loaded, hence the imports inside.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import ConfigError

if TYPE_CHECKING:
    import torch

    from rlhf.rewards.reward import RewardSources
    from rlhf.types import Responses, RewardOutput, TokenizedPrompt


def overlong_penalties(tokens: torch.Tensor, *, max_tokens: int, buffer_tokens: int) -> torch.Tensor:
    """What an overlong response gets, in [-1, 0]: DAPO (arXiv 2503.14476), eq. 13, the soft overlong punishment.

    0 up to Lmax - Lc tokens, ((Lmax - Lc) - |y|) / Lc up to Lmax and -1 beyond, with Lmax = `max_tokens` and
    Lc = `buffer_tokens`. `tokens` [B] count the end of sequence. Returns [B] float32.
    """
    return ((max_tokens - buffer_tokens - tokens.float()) / buffer_tokens).clamp(-1.0, 0.0)


class Rule(ABC):
    """A reward that needs nothing but the responses and knows no range from a training."""

    training_range = None
    counts_tokens = False
    """Whether it looks at token ids, and not at texts alone."""

    def __init__(self, sources: RewardSources) -> None:
        del sources  # every reward is made with them; a rule looks at the responses alone

    @abstractmethod
    def scores(self, responses: Responses) -> Sequence[float] | torch.Tensor:
        """A number for each response."""

    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`."""
        import torch

        from rlhf.types import RewardOutput

        device = responses.rollout.response_ids.device
        return RewardOutput(torch.as_tensor(self.scores(responses), dtype=torch.float32, device=device))


class LengthWindow(Rule):
    """1 for a response of `minimum` to `maximum` tokens, outside 1 less for each `margin` tokens further, down to 0."""

    counts_tokens = True

    def __init__(self, sources: RewardSources, *, minimum: int = 0, maximum: int, margin: int = 1) -> None:
        whole_numbers("length_window", minimum=minimum, maximum=maximum, margin=margin)
        if not 0 <= minimum <= maximum or margin < 1:
            raise ConfigError(
                f"length_window: minimum={minimum}, maximum={maximum}, margin={margin}: needed is 0 <= minimum <= "
                "maximum and a margin of 1 token at least"
            )
        self.minimum, self.maximum, self.margin = minimum, maximum, margin

    def scores(self, responses: Responses) -> torch.Tensor:
        tokens = responses.rollout.response_mask.sum(1).float()
        outside = (self.minimum - tokens).clamp(min=0) + (tokens - self.maximum).clamp(min=0)
        return (1 - outside / self.margin).clamp(min=0)


class Overlong(Rule):
    """0 up to `max_tokens` - `buffer_tokens`, from there linearly down to -1 at `max_tokens` (DAPO, arXiv 2503.14476,
    eq. 13)."""

    counts_tokens = True

    def __init__(self, sources: RewardSources, *, max_tokens: int, buffer_tokens: int) -> None:
        whole_numbers("overlong", max_tokens=max_tokens, buffer_tokens=buffer_tokens)
        if not 0 < buffer_tokens <= max_tokens:
            raise ConfigError(
                f"overlong: buffer_tokens={buffer_tokens} must be at least 1 and at most max_tokens={max_tokens}"
            )
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens

    def scores(self, responses: Responses) -> torch.Tensor:
        tokens = responses.rollout.response_mask.sum(1)
        return overlong_penalties(tokens, max_tokens=self.max_tokens, buffer_tokens=self.buffer_tokens)


class Repetition(Rule):
    """Minus the share of the response's n-grams of tokens that stood earlier in it: in [-1, 0]."""

    counts_tokens = True

    def __init__(self, sources: RewardSources, *, n: int = 4) -> None:
        whole_numbers("repetition", n=n)
        if n < 1:
            raise ConfigError(f"repetition: n={n} must be at least 1")
        self.n = n

    def scores(self, responses: Responses) -> torch.Tensor:
        from rlhf.numerics.statistics import repeated_shares

        return -repeated_shares(responses.rollout.response_ids, responses.rollout.response_mask, self.n)


class Ends(Rule):
    """1 for a response that ends with an end-of-sequence token, else 0."""

    def scores(self, responses: Responses) -> torch.Tensor:
        return responses.ended.float()


class HangulShare(Rule):
    """The share of Hangul among the letters of the response, in [0, 1]; 0 of a response without letters."""

    def scores(self, responses: Responses) -> list[float]:
        return [hangul_share(text) for text in responses.texts]


class Matches(Rule):
    """1 where the regular expression `pattern` is found in the response (`whole`: matches all of it), else 0."""

    def __init__(self, sources: RewardSources, *, pattern: str, whole: bool = False) -> None:
        if not isinstance(pattern, str):
            raise ConfigError(f"matches: pattern={pattern!r} must be a text")
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"matches: {pattern!r} is no regular expression: {error}") from error
        self.whole = whole

    def scores(self, responses: Responses) -> list[float]:
        find = self.pattern.fullmatch if self.whole else self.pattern.search
        return [float(find(text.strip()) is not None) for text in responses.texts]


class Words(Rule):
    """What `keywords` and `forbidden_words` share: words of the configuration (`words`), of a file with one in each
    line (`file`), or of a column of the prompt's data row (`column`: a text or a list of texts).

    A word is found wherever it stands, whatever its case: Korean particles follow without a space.
    """

    name = ""

    def __init__(
        self, sources: RewardSources, *, words: Sequence[str] = (), file: str | None = None, column: str | None = None
    ) -> None:
        if (bool(words) + (file is not None) + (column is not None)) != 1:
            raise ConfigError(f"{self.name}: give one of words (a list), file (one word in each line) and column")
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word.strip() for word in words):
            raise ConfigError(f"{self.name}: words={words!r} must be a list of texts")
        if file is not None:
            if not Path(file).is_file():
                raise ConfigError(f"{self.name}: no such file: {file} (looked in {Path.cwd()})")
            words = [line.strip() for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
            if not words:
                raise ConfigError(f"{self.name}: {file} has no words")
        self.words = [folded(word) for word in words]
        self.column = column

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """ConfigError for a prompt whose row has no words in `column`."""
        for prompt in prompts if self.column is not None else ():
            if not self._of(prompt):
                there = ", ".join(sorted(prompt.columns)) or "none"
                raise ConfigError(
                    f"{self.name}: prompt {prompt.id!r} has no text in the column {self.column}; its columns beside "
                    f"the prompt are {there}"
                )

    def _of(self, prompt: TokenizedPrompt) -> list[str]:
        if self.column is None:
            return self.words
        found = prompt.columns.get(self.column)
        texts = found if isinstance(found, list | tuple) else [found]
        return [folded(text) for text in texts if isinstance(text, str) and text.strip()]

    def found(self, responses: Responses) -> list[tuple[int, int]]:
        """Of each response how many of the words are in it, and how many there are."""
        pairs = []
        for prompt, text in zip(responses.prompts, responses.texts, strict=True):
            words, said = self._of(prompt), folded(text)
            pairs.append((sum(word in said for word in words), len(words)))
        return pairs


class Keywords(Words):
    """The share of the words that are in the response, in [0, 1]."""

    name = "keywords"

    def scores(self, responses: Responses) -> list[float]:
        return [there / max(1, all_of_them) for there, all_of_them in self.found(responses)]


class ForbiddenWords(Words):
    """-1 where one of the words is in the response, else 0."""

    name = "forbidden_words"

    def scores(self, responses: Responses) -> list[float]:
        return [-float(there > 0) for there, _ in self.found(responses)]


def whole_numbers(rule: str, **options: object) -> None:
    """ConfigError for an option that is no whole number."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{rule}: {name}={value!r} must be a whole number")


def folded(text: str) -> str:
    """`text` in one of the ways that Unicode can write it, without case."""
    return unicodedata.normalize("NFC", text).casefold()


def hangul_share(text: str) -> float:
    """The share of Hangul syllables and letters among the letters of `text`; 0 where it has none."""
    letters = [letter for letter in unicodedata.normalize("NFC", text) if letter.isalpha()]
    return sum("HANGUL" in unicodedata.name(letter, "") for letter in letters) / len(letters) if letters else 0.0
