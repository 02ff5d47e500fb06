"""A classifier of Hugging Face as a reward, an encoder that reads pairs and a decoder that reads chats."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rlhf.config import ConfigError
from rlhf.rewards.classifier import ClassifierReward
from rlhf.rewards.table import NO_SOURCES, RewardSpec, check_rewards, reward_fingerprints
from rlhf.types import Responses, Rollout, TokenizedPrompt

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *["a", "b", "c", "d", "e", "f", "g"]]
POSITIONS = 10
CHAT = "{% for turn in messages %}{{ turn['role'][0] }} {{ turn['content'] }} {% endfor %}"


def words_tokenizer(chat: str | None = None):
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", *([] if chat else ["token_type_ids"]), "attention_mask"],
    )  # fmt: skip
    made.chat_template = chat
    return made


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of three labels that reads 10 tokens."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=POSITIONS, id2label={0: "rude", 1: "plain", 2: "kind"},
        label2id={"rude": 0, "plain": 1, "kind": 2}, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    words_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A GPT-2 of one label with a chat template."""
    path = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.GPT2ForSequenceClassification(config).save_pretrained(path)
    words_tokenizer(CHAT).save_pretrained(path)
    return str(path)


def responses(texts=("a b", "c"), asked=("d", "e f g")) -> Responses:
    ids = torch.ones(len(texts), 2, dtype=torch.long)
    rollout = Rollout(ids, ids.bool(), ids, ids.bool(), torch.zeros(len(texts), 2))
    prompts = [
        TokenizedPrompt(f"p{row}", (1,), f"<{text}>", messages=({"role": "user", "content": text},))
        for row, text in enumerate(asked)
    ]
    return Responses(rollout, prompts, list(texts), torch.ones(len(texts), dtype=torch.bool))


@torch.no_grad()
def logits_of(path: str, ids: list[int], types: list[int] | None = None) -> torch.Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    kinds = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return model(torch.tensor([ids]), **kinds).logits[0]


def word_ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_an_encoder_reads_prompt_and_response_as_a_pair(encoder):
    found = ClassifierReward(NO_SOURCES, model=encoder, label="kind").score(responses()).scores
    first = logits_of(encoder, word_ids("[CLS] d [SEP] a b [SEP]"), [0, 0, 0, 1, 1, 1])
    second = logits_of(encoder, word_ids("[CLS] e f g [SEP] c [SEP]"), [0] * 5 + [1, 1])
    assert found.tolist() == pytest.approx([float(first[2]), float(second[2])], abs=1e-6)


def test_what_is_said_of_the_label_is_a_logit_its_odds_or_its_share(encoder):
    logits = logits_of(encoder, word_ids("[CLS] a b [SEP]"))
    expected = {
        "logit": logits[0],
        "probability": logits.softmax(0)[0],
        "log_odds": logits[0] - logits[1:].logsumexp(0),
    }
    for output, value in expected.items():
        reward = ClassifierReward(NO_SOURCES, model=encoder, label=0, output=output, reads="response")
        assert float(reward.score(responses()).scores[0]) == pytest.approx(float(value), abs=1e-6), output


def test_a_decoder_reads_the_conversation_in_its_own_template(decoder):
    reward = ClassifierReward(NO_SOURCES, model=decoder)
    found = reward.score(responses(("a b", "c")))
    for row, text in enumerate(("[UNK] d a a b", "[UNK] e f g a c")):  # user -> u is no word, assistant -> a is one
        assert float(found.scores[row]) == pytest.approx(float(logits_of(decoder, word_ids(text))[0]), abs=1e-6)


def test_the_size_of_a_batch_changes_no_score(decoder, encoder):
    given = responses(("a", "b c d", "e", "f g", "a"), ("a", "b", "c d e", "f", "g"))
    for path, options in ((decoder, {}), (encoder, {"label": 1})):
        scores = [
            ClassifierReward(NO_SOURCES, model=path, batch_size=size, **options).score(given).scores
            for size in (1, 2, 16)
        ]
        for other in scores[1:]:
            torch.testing.assert_close(scores[0], other, atol=1e-6, rtol=1e-5)


def test_what_is_too_long_loses_the_beginning_of_the_prompt_then_the_end_of_the_response(encoder):
    reward = ClassifierReward(NO_SOURCES, model=encoder, label=1)
    prompt = responses(asked=("a b c d e f g", "a")).prompts[0]
    assert reward.tokenizer.convert_ids_to_tokens(reward.encode(prompt, "a b c")["input_ids"]) == [
        "[CLS]", *["d", "e", "f", "g"], "[SEP]", *["a", "b", "c"], "[SEP]",
    ]  # fmt: skip
    long = reward.encode(prompt, "a b c d e f g a b c d e f g")["input_ids"]
    assert reward.tokenizer.convert_ids_to_tokens(long) == [
        "[CLS]",
        "g",
        "[SEP]",
        *["a", "b", "c", "d", "e", "f"],
        "[SEP]",
    ]
    assert reward.score(responses(("a " * 30, "b"), ("c " * 30, "d"))).scores.isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "has the labels 0 rude, 1 plain, 2 kind: say with `label` which one is rewarded"),
        ({"label": "nice"}, "has no label 'nice'; its labels are 0 rude, 1 plain, 2 kind"),
        ({"label": 3}, "has no label 3"),
        ({"label": True}, "has no label True"),
        ({"label": 0, "output": "odds"}, "output='odds' is not one of logit, log_odds, probability"),
        ({"label": 0, "reads": "chat"}, "reads='chat' is not one of conversation, pair, response"),
        ({"label": 0, "reads": "conversation"}, "has no chat template: take pair or response"),
        ({"label": 0, "batch_size": 0}, "batch_size=0 must be a whole number"),
    ],
)
def test_options_that_do_not_fit_the_classifier_are_refused(encoder, options, told):
    with pytest.raises(ConfigError, match=told):
        ClassifierReward(NO_SOURCES, model=encoder, **options)


def test_odds_need_another_label(decoder):
    with pytest.raises(ConfigError, match="output=probability compares labels, and .* has one: take logit"):
        ClassifierReward(NO_SOURCES, model=decoder, output="probability")


def test_it_is_looked_at_before_anything_trains_and_belongs_to_the_run(decoder, tmp_path):
    specs = [RewardSpec.parse('{"name": "classifier", "model": "' + decoder + '", "reads": "conversation"}')]
    check_rewards(specs, responses().prompts)
    with pytest.raises(ConfigError, match="prompt 'raw' came rendered already, so its turns are not known"):
        check_rewards(specs, [TokenizedPrompt("raw", (1,), "text")])
    (fingerprint,) = reward_fingerprints(specs)
    assert fingerprint and fingerprint == reward_fingerprints(specs)[0]
    with pytest.raises(ConfigError, match="cannot load the classifier nowhere/at/all"):
        check_rewards([RewardSpec.parse('{"name": "classifier", "model": "nowhere/at/all"}')], [])
