"""Padding, masks and labels of the three kinds of batches."""

import pytest
import torch

from rlhf.data.collate import collate_prompts, collate_rankings, collate_responses
from rlhf.types import TokenizedPrompt, TokenizedRanking, TokenizedResponse

EOS = 7
LONG = TokenizedResponse("a", (1, 2, 3, EOS), prompt_tokens=2)
SHORT = TokenizedResponse("b", (4, 5, EOS), prompt_tokens=1)


def test_labels_cover_the_response_and_its_eos_when_eos_is_also_the_padding():
    batch = collate_responses([LONG, SHORT], pad_id=EOS)
    assert batch.input_ids.tolist() == [[1, 2, 3, EOS], [4, 5, EOS, EOS]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.labels.tolist() == [[-100, -100, 3, EOS], [-100, 5, EOS, -100]]


def test_whole_text_trains_the_prompt_but_not_the_padding():
    batch = collate_responses([LONG, SHORT], pad_id=0, whole_text=True)
    assert batch.labels.tolist() == [[1, 2, 3, EOS], [4, 5, EOS, -100]]
    assert batch.input_ids.tolist() == [[1, 2, 3, EOS], [4, 5, EOS, 0]]


def test_prompts_are_padded_on_the_left():
    examples = [TokenizedPrompt("a", (EOS, 1), "x"), TokenizedPrompt("b", (1, 2, 3), "y")]
    batch = collate_prompts(examples, EOS, [8, 5])
    assert batch.input_ids.tolist() == [[EOS, EOS, 1], [1, 2, 3]]
    assert batch.attention_mask.tolist() == [[False, True, True], [True, True, True]]
    assert batch.row_ids.tolist() == [8, 5]
    with pytest.raises(ValueError, match="2 prompts came with 1 row_ids"):
        collate_prompts(examples, EOS, [1])


def test_rankings_keep_groups_ranks_margins_and_categories_beside_each_row():
    examples = [
        TokenizedRanking("p", (LONG, SHORT), (0, 1), margin=0.5, category="law"),
        TokenizedRanking("q", (SHORT, SHORT, LONG), (2, 0, 0), category="talk"),
    ]
    batch = collate_rankings(examples, 0, {"talk": 0, "law": 1})
    assert batch.input_ids.tolist() == [[1, 2, 3, EOS], [4, 5, EOS, 0], [4, 5, EOS, 0], [4, 5, EOS, 0], [1, 2, 3, EOS]]
    assert batch.attention_mask.sum(1).tolist() == [4, 3, 3, 3, 4]
    assert batch.groups.tolist() == [0, 0, 1, 1, 1]
    assert batch.ranks.tolist() == [0, 1, 2, 0, 0]
    assert batch.margins.tolist() == [0.5, 0.5, 0, 0, 0] and batch.margins.dtype == torch.float32
    assert batch.categories.tolist() == [1, 1, 0, 0, 0]


def test_unknown_category_names_the_known_ones():
    with pytest.raises(ValueError, match="'p' has category 'law'.*known categories: 'talk'"):
        collate_rankings([TokenizedRanking("p", (LONG, SHORT), (0, 1), category="law")], 0, {"talk": 0})


@pytest.mark.parametrize("longer", [(), (TokenizedResponse("c", (6,) * 9, prompt_tokens=2),)])
def test_amount_of_padding_changes_no_loss(longer):
    torch.manual_seed(0)
    table = torch.randn(9, 9)
    batch = collate_responses([LONG, SHORT, *longer], pad_id=0)
    logits = table[batch.input_ids[:2]][:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:2, 1:], reduction="sum")
    expected = sum(-table[a].log_softmax(-1)[b] for a, b in [(2, 3), (3, EOS), (4, 5), (5, EOS)])
    torch.testing.assert_close(loss, expected)


def test_empty_batches_are_errors():
    with pytest.raises(ValueError, match="at least one example"):
        collate_responses([], 0)
