"""Rewards: the table, sums of several, and a reward model that reads other tokens than the actor."""

from __future__ import annotations

import pytest
import torch
import transformers

from rlhf.algorithms.config import PPOConfig
from rlhf.config import ConfigError
from rlhf.models.scalar import ScalarModel
from rlhf.rewards import table
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.reward_model import RewardModel
from rlhf.rewards.table import REWARDS, RewardKind, RewardSpec, build_reward, needs_reward_model
from rlhf.types import Responses, RewardOutput, Rollout, TokenizedPrompt

EOS = 0


class Fixed:
    """Gives the same score to every response, and half of it to each token when asked to."""

    training_range = None

    def __init__(self, sources: RewardSources, *, value: float = 1.0, by_token: bool = False) -> None:
        self.value = value
        self.by_token = by_token

    def score(self, responses: Responses) -> RewardOutput:
        scores = torch.full((len(responses),), self.value)
        per_token = torch.full(responses.rollout.response_ids.shape, self.value / 2) if self.by_token else None
        return RewardOutput(scores, per_token, {"raw": scores * 10})


def responses(rows: int = 2) -> Responses:
    ids = torch.ones(rows, 3, dtype=torch.long)
    rollout = Rollout(ids, ids.bool(), ids, ids.bool(), torch.zeros(rows, 3))
    prompts = [TokenizedPrompt(str(row), (1,), f"prompt {row}") for row in range(rows)]
    return Responses(rollout, prompts, ["a"] * rows, torch.ones(rows, dtype=torch.bool))


@pytest.fixture
def sources() -> RewardSources:
    return RewardSources(tokenizer=None, eos_ids=(EOS,))


def test_an_unknown_reward_lists_the_names_there_are():
    with pytest.raises(ConfigError, match="'rewards_model' is not a reward; the rewards are reward_model"):
        RewardSpec.parse("rewards_model")
    with pytest.raises(ConfigError, match="neither a name nor a mapping"):
        RewardSpec.parse("{broken")
    with pytest.raises(ConfigError, match=r"\['a'\] is not a reward"):
        RewardSpec.parse('{"name": ["a"]}')
    for weight in ('"much"', "NaN", "true"):
        with pytest.raises(ConfigError, match="the weight of reward_model is .*; give a finite number"):
            RewardSpec.parse('{"name": "reward_model", "weight": ' + weight + "}")


def test_a_new_reward_is_a_row_and_takes_its_options_from_the_configuration(monkeypatch, sources):
    monkeypatch.setitem(REWARDS, "fixed", RewardKind(Fixed))
    spec = RewardSpec.parse('{"name": "fixed", "value": 3.0}')
    assert build_reward([spec], sources).score(responses()).scores.tolist() == [3.0, 3.0]
    assert not needs_reward_model([spec]) and needs_reward_model([spec, RewardSpec.parse("reward_model")])
    with pytest.raises(ConfigError, match="fixed does not take these options: .*worth"):
        RewardSpec.parse('{"name": "fixed", "worth": 3.0}')
    with pytest.raises(ConfigError, match="rewards is empty: name at least one"):
        PPOConfig(rewards=[])


def test_a_mistake_inside_a_reward_is_not_called_a_wrong_option(monkeypatch, sources):
    def broken(sources, **options):
        raise TypeError("a bug of the reward's own")

    monkeypatch.setitem(REWARDS, "broken", RewardKind(broken))
    with pytest.raises(TypeError, match="a bug of the reward's own"):
        build_reward([RewardSpec.parse("broken")], sources)


def test_several_rewards_are_a_weighted_sum_with_their_parts_named(monkeypatch, sources):
    monkeypatch.setitem(table.REWARDS, "fixed", RewardKind(Fixed))
    texts = ['{"name": "fixed", "value": 3.0, "weight": 2}', '{"name": "fixed", "value": 0.5, "by_token": true}']
    output = build_reward([RewardSpec.parse(text) for text in texts], sources).score(responses())
    assert output.scores.tolist() == [6.5, 6.5]
    assert output.per_token is not None and output.per_token.tolist() == [[0.25] * 3] * 2
    assert {name: part[0].item() for name, part in output.parts.items()} == {
        "fixed": 3.0, "fixed/raw": 30.0, "fixed_2": 0.5, "fixed_2/raw": 5.0,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- chats

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    """A tokenizer of other ids with a chat template whose markers are special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set(tokenizer.get_vocab()) - {tokenizer.eos_token}, reverse=True)
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(["</s>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    markers = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    made.add_special_tokens({"additional_special_tokens": markers})
    made.chat_template = TEMPLATE
    return made


def chat_responses(tokenizer, messages) -> Responses:
    """A response "yes" that ended, to a prompt which the actor read in markup of its own."""
    text = "".join(f"[{turn['role']}]{turn['content']}" for turn in messages) or "[user]Hi"
    prompt, response = tokenizer(text)["input_ids"], [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]
    asked, said = torch.tensor([prompt]), torch.tensor([response])
    rollout = Rollout(asked, torch.ones_like(asked).bool(), said, torch.ones_like(said).bool(), torch.zeros(said.shape))
    example = TokenizedPrompt("row 7", tuple(prompt), text, messages=tuple(messages))
    return Responses(rollout, [example], ["yes"], torch.tensor([True]))


@torch.no_grad()
def test_a_chat_is_rendered_with_the_reward_models_own_template(tiny_models, tokenizer, chat_tokenizer):
    """Its markers arrive as single ids; the actor's markup does not arrive at all."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["gpt_neox"], dtype=torch.float32)
    base.resize_token_embeddings(len(chat_tokenizer))
    model = ScalarModel(base.base_model, seed=3).eval()
    reward = RewardModel(RewardSources(tokenizer, (tokenizer.eos_token_id,), model, chat_tokenizer, chat=True))
    said = (("user", "Hi"), ("assistant", "Yo"), ("user", "Q"))
    given = chat_responses(tokenizer, [{"role": role, "content": content} for role, content in said])
    user, assistant, end = chat_tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])

    def letters(text):
        return chat_tokenizer(text, add_special_tokens=False)["input_ids"]

    wanted = [user, *letters("Hi"), end, assistant, *letters("Yo"), end, user, *letters("Q"), end, assistant]
    wanted += [*letters("yes"), chat_tokenizer.eos_token_id]
    row = torch.tensor([wanted])
    expected = model(row, torch.ones_like(row))[0, -1]
    torch.testing.assert_close(reward.score(given).scores[0], expected, atol=2e-5, rtol=1e-5)


def test_a_chat_that_cannot_be_rendered_is_refused_with_what_to_do(tiny_models, tokenizer, chat_tokenizer):
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3)
    reward = RewardModel(RewardSources(tokenizer, (EOS,), model, chat_tokenizer, chat=True))
    with pytest.raises(ConfigError, match="prompt 'row 7' came rendered already.*give prompts as messages"):
        reward.score(chat_responses(tokenizer, []))
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>"
    )
    with pytest.raises(ConfigError, match="has no chat template.*template=kullm"):
        RewardModel(RewardSources(tokenizer, (EOS,), model, plain, chat=True))


@torch.no_grad()
def test_a_response_that_the_reward_model_has_no_positions_for_loses_its_end(tiny_models, tokenizer, chat_tokenizer):
    """With another tokenizer a text may have many more tokens: GPT-2 would fail in the middle of a run."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"], dtype=torch.float32)
    base.resize_token_embeddings(len(chat_tokenizer))
    model = ScalarModel(base.base_model, seed=3).eval()
    positions = model.config.max_position_embeddings
    reward = RewardModel(RewardSources(tokenizer, (tokenizer.eos_token_id,), model, chat_tokenizer))
    given = chat_responses(tokenizer, [{"role": "user", "content": "Hi"}])
    long = Responses(given.rollout, given.prompts, ["no" * positions], given.ended)
    kept = chat_tokenizer(given.prompts[0].text, add_special_tokens=False)["input_ids"][-1:]
    kept += chat_tokenizer(long.texts[0], add_special_tokens=False)["input_ids"]
    row = torch.tensor([kept[:positions]])
    expected = model(row, torch.ones_like(row))[0, -1]
    torch.testing.assert_close(reward.score(long).scores[0], expected, atol=2e-5, rtol=1e-5)
    assert reward.told
