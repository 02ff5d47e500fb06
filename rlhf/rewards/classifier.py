"""Any sequence classifier of Hugging Face as a reward: what it says of one label, read in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardSources

if TYPE_CHECKING:
    import torch

    from rlhf.types import Responses, RewardOutput, TokenizedPrompt

Reads = Literal["conversation", "pair", "response"]
"""What the classifier is given: the turns and the response in its chat template, prompt and response as a pair of
texts, or the response alone."""
Output = Literal["logit", "log_odds", "probability"]
"""What the score is, of the label: its logit; that less the log-sum-exp of the others; its share of the softmax."""
NO_LIMIT = 1_000_000
"""Tokenizers without a limit name one beyond this."""


class ClassifierReward:
    """Scores of a classifier with one label or several, an encoder or a decoder, of whatever tokenizer.

    `label` is the one that counts, by name or number; a model with a single label needs none. `reads` unset: the
    conversation where the tokenizer has a chat template and the prompts come as turns, else the pair. What is too long
    loses the beginning of the prompt. Every rank loads the whole model; `batch_size` responses are read at a time.
    """

    training_range = None

    def __init__(
        self,
        sources: RewardSources,
        *,
        model: str,
        label: str | int | None = None,
        output: Output = "logit",
        reads: Reads | None = None,
        batch_size: int = 16,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from rlhf.checkpoint.fingerprint import model_fingerprint
        from rlhf.models.directories import explain_read_errors
        from rlhf.models.positions import max_positions

        for name, value, known in (("output", output, Output), ("reads", reads, Reads)):
            if value is not None and value not in get_args(known):
                raise ConfigError(f"classifier: {name}={value!r} is not one of {', '.join(get_args(known))}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"classifier: batch_size={batch_size!r} must be a whole number of at least 1")
        self.path, self.output, self.batch_size = model, output, batch_size
        with explain_read_errors(model, "classifier"):
            self.config = AutoConfig.from_pretrained(model)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.label = self._number_of(label)
        if self.output != "logit" and self.config.num_labels < 2:
            raise ConfigError(f"classifier: output={output} compares labels, and {model} has one: take logit")
        self.reads = reads
        if reads == "conversation" and not self.tokenizer.chat_template:
            raise ConfigError(
                f"classifier: reads=conversation, and {model} has no chat template: take pair or response"
            )
        limits = [self.tokenizer.model_max_length, max_positions(self.config) or NO_LIMIT]
        self.max_tokens = min(limits) if min(limits) < NO_LIMIT else None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "left"
        self.fingerprint = model_fingerprint(model)
        self.model: Any = None

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """ConfigError for a prompt whose turns are asked for and not known, or that the template does not take."""
        if self.reads == "conversation" or (self.reads is None and self.tokenizer.chat_template):
            for prompt in prompts:
                if prompt.messages:
                    self._conversation(prompt, "")
                elif self.reads == "conversation":
                    raise ConfigError(
                        f"classifier {self.path}: prompt {prompt.id!r} came rendered already, so its turns are not "
                        "known; give prompts as messages, or set reads to pair or response"
                    )

    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`."""
        import torch

        from rlhf.types import RewardOutput

        device = responses.rollout.response_ids.device
        pairs = list(zip(responses.prompts, responses.texts, strict=True))
        parts = [
            self._scores(pairs[start : start + self.batch_size], device)
            for start in range(0, len(pairs), self.batch_size)
        ]
        return RewardOutput(torch.cat(parts))

    def _number_of(self, label: str | int | None) -> int:
        """The row of the head that `label` means; ConfigError that lists the labels."""
        names = {int(number): str(name) for number, name in (self.config.id2label or {}).items()}
        told = ", ".join(f"{number} {names.get(number, '')}".strip() for number in range(self.config.num_labels))
        if label is None:
            if self.config.num_labels == 1:
                return 0
            raise ConfigError(f"classifier: {self.path} has the labels {told}: say with `label` which one is rewarded")
        found = [number for number in range(self.config.num_labels) if label in (number, names.get(number))]
        if isinstance(label, bool) or not found:
            raise ConfigError(f"classifier: {self.path} has no label {label!r}; its labels are {told}")
        return found[0]

    def _load(self, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification

        from rlhf.models.directories import explain_read_errors

        with explain_read_errors(self.path, "classifier"):
            model = AutoModelForSequenceClassification.from_pretrained(self.path, dtype="auto")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval().requires_grad_(False)

    def _scores(self, pairs: Sequence[tuple[TokenizedPrompt, str]], device: torch.device) -> torch.Tensor:
        import torch

        if self.model is None:
            self._load(device)
        encoded = self.tokenizer.pad([self.encode(*pair) for pair in pairs], return_tensors="pt").to(device)
        with torch.no_grad():
            logits = self.model(**encoded).logits.float()
        logit = logits[:, self.label]
        if self.output == "logit":
            return logit  # type: ignore[no-any-return]
        if self.output == "probability":
            return logits.softmax(1)[:, self.label]  # type: ignore[no-any-return]
        others = [number for number in range(logits.shape[1]) if number != self.label]
        return logit - logits[:, others].logsumexp(1)  # type: ignore[no-any-return]

    def encode(self, prompt: TokenizedPrompt, response: str) -> dict[str, list[int]]:
        """What the classifier reads of a response: ids and masks, at most as many as it has positions for."""
        from rlhf.data.rendered import asked

        limit: dict[str, Any] = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        if self.reads == "conversation" or (self.reads is None and self.tokenizer.chat_template and prompt.messages):
            text = self._conversation(prompt, response)
            return dict(self.tokenizer(text, add_special_tokens=False, **limit))
        if self.reads == "response":
            return dict(self.tokenizer(response, **limit))
        if self.max_tokens is not None:  # the prompt gives way, and the response only where it is too long by itself
            limit["truncation"] = "only_first"
            room = self.max_tokens - self.tokenizer.num_special_tokens_to_add(pair=True) - 1
            ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
            if len(ids) > room:
                response = str(self.tokenizer.decode(ids[:room]))
        return dict(self.tokenizer(asked(prompt), response, **limit))

    def _conversation(self, prompt: TokenizedPrompt, response: str) -> str:
        from jinja2 import TemplateError

        turns = [*map(dict, prompt.messages), {"role": "assistant", "content": response}]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise ConfigError(
                f"classifier {self.path}: its chat template does not take prompt {prompt.id!r}: {error}"
            ) from error
