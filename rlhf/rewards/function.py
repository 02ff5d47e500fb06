"""A Python function as a reward: `f(prompts, responses, **columns)`, one number for each response."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardError, RewardSources, Score, reward_output

if TYPE_CHECKING:
    from rlhf.types import Responses, RewardOutput, TokenizedPrompt

GIVEN = ("prompts", "responses")
"""What every reward function takes, by these names."""
ASKED_FOR = ("messages", "rendered_prompts", "ended", "ids")
"""What one that names it is given beside: the turns of each prompt, the text that the actor read, whether the response
ended, the id of the data row. A column of the data under such a name comes first."""


class FunctionReward:
    """Scores that a user's function gives.

    It is called with lists, an element for each response: `prompts` (the user's last turn), `responses` (text without
    special tokens), the data row's other columns that it names, or all of them where it takes `**columns` (None where a
    row lacks one), and what it names of `ASKED_FOR`. It returns a number for each response; or for each a list of
    numbers, one for every token of the response, its end included: the rewards of those tokens. The score is then 0 and
    the part `tokens` their sum.
    """

    training_range = None

    def __init__(self, sources: RewardSources, *, path: str) -> None:
        self.name = path
        self.function = load_function(path)
        self.named, self.takes_all = _parameters(self.function, path)
        self.fingerprint = _fingerprint(self.function, path)

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """ConfigError for a column without a default that the function names and no prompt has."""
        columns = {name for prompt in prompts for name in prompt.columns}
        needed = {name for name, optional in self.named.items() if not optional} - {*GIVEN, *ASKED_FOR}
        if missing := sorted(needed - columns):
            raise ConfigError(
                f"reward {self.name} takes {', '.join(missing)}, which the prompts have no column for; their columns "
                f"beside the prompt are {', '.join(sorted(columns)) or 'none'}. Name the column as the file does, or "
                "give the parameter a default"
            )

    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`. RewardError, with the prompt's id, for what is no score."""
        try:
            found = self.function(**self._arguments(responses))
        except Exception as error:
            raise RewardError(f"reward {self.name} failed on {_rows(responses)}: {_place(error)}") from error
        return self._output(found, responses)

    def _arguments(self, responses: Responses) -> dict[str, list[Any]]:
        from rlhf.data.rendered import asked

        prompts = responses.prompts
        columns = {name for prompt in prompts for name in prompt.columns}
        wanted = columns if self.takes_all else columns & self.named.keys()
        given: dict[str, list[Any]] = {
            "messages": [list(prompt.messages) for prompt in prompts],
            "rendered_prompts": [prompt.text for prompt in prompts],
            "ended": responses.ended.tolist(),
            "ids": [prompt.id for prompt in prompts],
        }
        given = {name: values for name, values in given.items() if name in self.named}
        given |= {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(wanted)}
        return {**given, "prompts": [asked(prompt) for prompt in prompts], "responses": list(responses.texts)}

    def _output(self, found: Any, responses: Responses) -> RewardOutput:
        if hasattr(found, "tolist"):
            found = found.tolist()
        if isinstance(found, str | bytes) or not isinstance(found, Iterable):
            raise RewardError(f"reward {self.name} gave {found!r:.80}: needed is a list of {len(responses)} numbers")
        rows = list(found)
        if len(rows) != len(responses):
            raise RewardError(
                f"reward {self.name} gave {len(rows)} scores for {len(responses)} responses: one for each is needed"
            )
        rows = [each.tolist() if hasattr(each, "tolist") else each for each in rows]
        by_token = [isinstance(each, list | tuple) for each in rows]
        if any(by_token) and not all(by_token):
            raise RewardError(f"reward {self.name} gave numbers for some responses and lists for others")
        return self._checked(rows, responses, by_token=any(by_token))

    def _checked(self, rows: list[Any], responses: Responses, *, by_token: bool) -> RewardOutput:
        """The rows as tensors. RewardError that names those which have no score."""
        tokens = responses.rollout.response_mask.sum(1).tolist()
        scores: list[Score] = []
        wrong: list[tuple[int, str]] = []
        for row, each in enumerate(rows):
            numbers = list(each) if by_token else [each]
            if strange := [one for one in numbers if not _is_number(one)]:
                wrong.append(
                    (row, f"{strange[0]!r:.80} for the response to {_named(responses, row)}: needed is a finite number")
                )
            elif by_token and len(numbers) != tokens[row]:
                told = (
                    f"{len(numbers)} numbers for the {tokens[row]} tokens of the response to {_named(responses, row)}"
                )
                wrong.append((row, f"{told}, its end included"))
            else:
                numbers = [float(one) for one in numbers]
                scores.append(numbers if by_token else numbers[0])
                continue
            scores.append([] if by_token else float("nan"))
        output = reward_output(scores, responses)
        if wrong:
            raise RewardError(f"reward {self.name} gave {wrong[0][1]}", rows=[row for row, _ in wrong], output=output)
        return output


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")  # not for nan either


def load_function(path: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `module:function` names; ConfigError that says what is missing."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"reward {path!r}: needed is file.py:function or module:function")
    module = _module(place, path)
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ConfigError(f"reward {path}: {place} has no function {name}; there are {', '.join(there) or 'none'}")
    found: Callable[..., Any] = function
    return found


def _module(place: str, path: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        file = Path(place)
        if not file.is_file():
            raise ConfigError(f"reward {path}: no such file: {place} (looked in {Path.cwd()})")
        return _run_once(file.resolve(), file.read_bytes())
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"reward {path}: {place} cannot be imported: {_place(error)}") from error


@cache
def _run_once(file: Path, content: bytes) -> Any:
    """The module that a file makes, run anew only when its content is another."""
    name = f"rlhf_reward_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"  # two folders may have such a file
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _parameters(function: Callable[..., Any], path: str) -> tuple[dict[str, bool], bool]:
    """The named parameters and whether each may be left out, and whether it takes all columns."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    named = {
        each.name: each.default is not kinds.empty
        for each in parameters
        if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    if missing := [name for name in GIVEN if name not in named]:
        raise ConfigError(
            f"reward {path} is {path.rpartition(':')[2]}{inspect.signature(function)} and takes no "
            f"{' and no '.join(missing)}: needed is def {path.rpartition(':')[2]}(prompts, responses, **columns)"
        )
    return named, any(each.kind is kinds.VAR_KEYWORD for each in parameters)


def _fingerprint(function: Callable[..., Any], path: str) -> str:
    """A checksum of the file that the function, or the class of a callable object, is in, in a notebook of its own
    lines; `path` where neither is known."""
    source = function if inspect.isroutine(function) else type(function)
    try:
        content = Path(inspect.getfile(source)).read_bytes()
    except (TypeError, OSError):
        try:
            content = inspect.getsource(source).encode()
        except (TypeError, OSError):
            return path
    return hashlib.sha256(content).hexdigest()[:16]


def _rows(responses: Responses) -> str:
    return f"{len(responses)} responses, the first to {_named(responses, 0)}"


def _named(responses: Responses, row: int) -> str:
    return f"prompt {responses.prompts[row].id!r}"


def _place(error: Exception) -> str:
    """What was raised and the line that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
