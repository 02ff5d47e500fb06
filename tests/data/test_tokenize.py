"""Exact boundaries, one end of sequence, honest truncation."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data.spec import DataError
from rlhf.data.tokenize import TextEncoder, TokenReport, tokenize_records
from rlhf.types import PreferenceRecord, PromptRecord, RankedRecord, ResponseRecord

EOS, PAD, BOS = "<|endoftext|>", "<|pad|>", "<s>"
CORPUS = ["### 질문: 안녕하세요, 잘 지내세요?", "답: 네 잘 지내요 고마워요.", "hello world end of text pad"] * 20


def make_tokenizer(eos=EOS, bos=None, start=(), end=(), **options):
    """A real byte-level BPE fast tokenizer; `start` and `end` are what it adds around a text by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[EOS, PAD, BOS, "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*start, "$A", *end]),
            special_tokens=[(text, backend.token_to_id(text)) for text in {*start, *end}],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=PAD, bos_token=bos, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def plain(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer, prompt, response, prompt_limit=None, response_limit=None, special=False, append_eos=True):
    encoder = TextEncoder(
        tokenizer,
        max_prompt_tokens=prompt_limit,
        max_response_tokens=response_limit,
        prompt_has_special_tokens=special,
    )
    return encoder.prompts([prompt])[0].ids, encoder.responses([response], append_eos=append_eos)[0].ids


def test_boundary_is_where_the_prompt_ends_even_when_a_merge_would_cross_it(tokenizer):
    prompt, response = "### 질문: 안녕하세", "요, 잘 지내세요?"
    joined = plain(tokenizer, prompt + response)
    prompt_ids, response_ids = encode(tokenizer, prompt, response)
    assert prompt_ids + response_ids[:-1] != joined  # the joined text really merges across the boundary
    assert tokenizer.decode(prompt_ids) == prompt
    assert response_ids == (*plain(tokenizer, response), tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "ending", ["", EOS, EOS * 3, f"{EOS} {EOS}\n", f"{EOS}\n\n{EOS}", f"{EOS}\u200b", f"{EOS}\ufeff {EOS}\u2060"]
)
def test_exactly_one_eos_ends_a_response(tokenizer, ending):
    _, ids = encode(tokenizer, "질문", "네 잘 지내요" + ending)
    assert ids == (*plain(tokenizer, "네 잘 지내요"), tokenizer.eos_token_id)


def test_invisible_characters_stay_where_no_eos_stands(tokenizer):
    for text in ("네 ❤\ufe0f", "네\u200b", "❤\ufe0f <|endof"):
        assert tokenizer.decode(encode(tokenizer, "질문", text)[1][:-1]) == text
    assert tokenizer.decode(encode(tokenizer, "질문", f"❤\ufe0f{EOS}\u200b")[1][:-1]) == "❤\ufe0f"


def test_own_eos_and_the_common_one_are_stripped_but_other_text_is_kept():
    tokenizer = make_tokenizer(eos="</s>")
    expected = (*plain(tokenizer, "네 "), tokenizer.convert_tokens_to_ids("</s>"))
    assert encode(tokenizer, "q", f"네 </s>{EOS}</s>")[1] == expected
    other = make_tokenizer(eos=EOS)
    assert other.decode(encode(other, "q", "<s>x</s>")[1][:-1]) == "<s>x</s>"


def test_literal_eos_inside_text_stays_text(tokenizer):
    text = f"앞 {EOS} 뒤"
    assert tokenizer.eos_token_id in plain(tokenizer, text)  # the plain call does read it as an end
    prompt_ids, response_ids = encode(tokenizer, text, text)
    assert tokenizer.eos_token_id not in prompt_ids
    assert response_ids.count(tokenizer.eos_token_id) == 1 and response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt_ids) == text and tokenizer.decode(response_ids[:-1]) == text
    assert tokenizer.eos_token_id in plain(tokenizer, text)  # and the tokenizer is left as it was


def test_literal_eos_stays_text_where_the_tokenizer_cannot_split_it(tokenizer):
    class NeverSplits:
        """A tokenizer that ignores `split_special_tokens` and emits token types."""

        eos_token, pad_token, bos_token = EOS, PAD, None
        eos_token_id, bos_token_id = tokenizer.eos_token_id, None
        convert_tokens_to_ids = staticmethod(tokenizer.convert_tokens_to_ids)

        def __call__(self, text, split_special_tokens=False, return_token_type_ids=None, **options):
            return {**tokenizer(text, **options), "token_type_ids": [0]}

    text = f"앞 {EOS}{PAD} 뒤 {EOS}요"
    prompt_ids, response_ids = encode(NeverSplits(), text, text)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & {*prompt_ids, *response_ids[:-1]}
    assert tokenizer.decode(prompt_ids) == text and tokenizer.decode(response_ids[:-1]) == text


def test_an_end_that_a_tokenizer_cannot_leave_out_is_taken_off(tokenizer):
    """Some end every text with it, also when told to add no special tokens."""

    class AlwaysEnds:
        eos_token, pad_token, bos_token = EOS, PAD, None
        eos_token_id, bos_token_id = tokenizer.eos_token_id, None
        convert_tokens_to_ids = staticmethod(tokenizer.convert_tokens_to_ids)

        def __call__(self, text, **options):
            ids = tokenizer(text, **options)["input_ids"]
            alone = isinstance(text, str)
            return {"input_ids": [*ids, self.eos_token_id] if alone else [[*row, self.eos_token_id] for row in ids]}

    found = encode(AlwaysEnds(), "안녕", "네 잘 지내요")
    assert found == encode(tokenizer, "안녕", "네 잘 지내요") and tokenizer.eos_token_id not in found[0]
    assert encode(AlwaysEnds(), "안녕", "네", append_eos=False)[1] == plain(tokenizer, "네"), (
        "cut off, so without an end"
    )


def test_template_special_tokens_are_read_in_the_prompt_only(tokenizer):
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    prompt_ids, response_ids = encode(tokenizer, "<|user|>안녕", "<|user|>네", special=True)
    assert prompt_ids[0] == user and user not in response_ids
    assert user not in encode(tokenizer, "<|user|>안녕", "네")[0]


@pytest.mark.parametrize("prompt", ["안녕", "<s>안녕"])
@pytest.mark.parametrize("read_special", [False, True])
def test_bos_once_and_no_eos_after_the_prompt(prompt, read_special):
    tokenizer = make_tokenizer(bos=BOS, start=(BOS,), end=(EOS,))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt_ids, response_ids = encode(tokenizer, prompt, "네", special=read_special)
    assert prompt_ids == (bos, *plain(tokenizer, "안녕"))
    assert response_ids == (*plain(tokenizer, "네"), eos)


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = make_tokenizer(bos=BOS)
    assert tokenizer.bos_token_id not in encode(tokenizer, "안녕", "네")[0]


def test_long_prompt_keeps_its_end_and_its_bos():
    tokenizer = make_tokenizer(bos=BOS, start=(BOS,))
    text = "### 질문: 안녕하세요, 잘 지내세요?"
    whole = plain(tokenizer, text)
    assert len(whole) > 5
    assert encode(tokenizer, text, "네", prompt_limit=5)[0] == (tokenizer.bos_token_id, *whole[-4:])
    with pytest.raises(DataError, match="max_prompt_tokens=1 .* at least 2"):
        encode(tokenizer, text, "네", prompt_limit=1)


@pytest.mark.parametrize("spare, truncated", [(1, 0), (0, 1), (-2, 1)])
def test_response_limit_includes_eos(tokenizer, spare, truncated):
    body = plain(tokenizer, "답: 네 잘 지내요 고마워요.")
    limit = len(body) + spare
    records = [ResponseRecord("r", "질문", "답: 네 잘 지내요 고마워요.")]
    rows, report = tokenize_records(records, tokenizer, max_prompt_tokens=50, max_response_tokens=limit)
    response_ids = rows[0].input_ids[rows[0].prompt_tokens :]
    assert response_ids == ((*body, tokenizer.eos_token_id) if spare == 1 else body[:limit])
    assert report.truncated_responses == truncated and report.response_tokens == len(response_ids)


def test_a_cut_off_response_does_not_look_finished(tokenizer):
    assert encode(tokenizer, "질문", "네 잘", append_eos=False)[1] == plain(tokenizer, "네 잘")


def test_one_row_is_encoded_as_training_data_is(tokenizer):
    prompt, response = "### 질문: 안녕하세", "요, 잘 지내세요?" + EOS
    (row,), _ = tokenize_records(
        [ResponseRecord("r", prompt, response)], tokenizer, max_prompt_tokens=5, max_response_tokens=7
    )
    prompt_ids, response_ids = encode(tokenizer, prompt, response, prompt_limit=5, response_limit=7)
    assert prompt_ids + response_ids == row.input_ids and len(prompt_ids) == row.prompt_tokens
    assert prompt_ids == plain(tokenizer, prompt)[-5:]
    assert response_ids == (*plain(tokenizer, "요, 잘 지내세요?"), tokenizer.eos_token_id)[:7]


def test_records_of_every_kind(tokenizer):
    records = [
        PromptRecord("p", "hello world hello end", {"category": "law"}),
        ResponseRecord("s", "안녕", "네", {"category": "talk"}),
        PreferenceRecord("c", "안녕", "고마워요.", "hello", margin=0.5),
        RankedRecord("k", "안녕", ("네", "hello", "world"), (1, 0, 1)),
        ResponseRecord("e", "안녕", EOS),
    ]
    rows, report = tokenize_records(records, tokenizer, max_prompt_tokens=3, max_response_tokens=50)
    eos = (tokenizer.eos_token_id,)
    assert [row.id for row in rows] == ["p", "s", "c", "k", "e"]
    assert rows[0].input_ids == plain(tokenizer, "hello world hello end")[-3:] and rows[0].category == "law"
    assert rows[0].text == " hello end"
    assert rows[1].category == "talk"
    assert rows[2].ranks == (0, 1) and rows[2].margin == 0.5
    texts = [tokenizer.decode(c.input_ids[c.prompt_tokens :]) for row in rows[2:4] for c in row.candidates]
    assert texts == [text + EOS for text in ("고마워요.", "hello", "네", "hello", "world")]
    assert rows[3].ranks == (1, 0, 1)
    assert rows[4].input_ids[rows[4].prompt_tokens :] == eos
    prompt_ids = plain(tokenizer, "안녕")[-3:]
    answers = ("네", "고마워요.", "hello", "네", "hello", "world")
    lengths = [len(plain(tokenizer, text)) + 1 for text in answers]
    assert report == TokenReport(
        rows=5,
        responses=7,
        truncated_prompts=1 + 4 * (len(plain(tokenizer, "안녕")) > 3),
        truncated_responses=0,
        empty_responses=1,
        prompt_tokens=3 + 4 * len(prompt_ids),
        response_tokens=sum(lengths) + 1,
        longest_prompt_tokens=3,
        longest_response_tokens=max(lengths),
    )


def test_more_texts_than_one_call_keep_their_order(tokenizer, monkeypatch):
    monkeypatch.setattr("rlhf.data.tokenize.TEXTS_PER_CALL", 3)
    records = [ResponseRecord(str(n), f"질문 {n}", f"답 {n}") for n in range(10)]
    rows, _ = tokenize_records(records, tokenizer, max_prompt_tokens=50, max_response_tokens=50)
    assert [tokenizer.decode(row.input_ids) for row in rows] == [f"질문 {n}답 {n}{EOS}" for n in range(10)]


def test_empty_prompt_and_missing_eos_are_errors(tokenizer):
    with pytest.raises(DataError, match="'p' has no tokens"):
        tokenize_records([PromptRecord("p", "")], tokenizer, max_prompt_tokens=9, max_response_tokens=9)
    with pytest.raises(DataError, match="no eos_token"):
        encode(make_tokenizer(eos=None), "a", "b")
