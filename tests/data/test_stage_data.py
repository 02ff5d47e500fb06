"""A stage's data from files to tokens, with what was left out reported."""

import json
from collections import Counter

import pytest

from rlhf.config import DataConfig
from rlhf.data.embedded import embedded_corpus
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec
from rlhf.data.stage_data import load_stage_data, reads_special_tokens
from rlhf.data.templates import load_template
from rlhf.data.world.situations import read_situation
from rlhf.models.tiny_base import train_tokenizer
from rlhf.types import TokenizedPrompt, TokenizedRanking, TokenizedResponse


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["### 명령어:\n질문 하나\n\n### 응답:\n대답 둘", "아래는 작업을 설명하는 명령어입니다."] * 5, 400
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tokenizer, tmp_path):
    def call(kind, specs, eval_specs=(), *, stage="sft", seed=0, tokenizer=tokenizer, name="data", apart=(), **config):
        return load_stage_data(
            kind,
            specs,
            eval_specs,
            config=DataConfig(**{"template": "koalpaca", "eval_fraction": 0.0, **config}),
            stage=stage,
            tokenizer=tokenizer,
            seed=seed,
            cache_dir=tmp_path / "cache",
            report_dir=tmp_path / "report",
            report_name=name,
            stages=("sft", "reward", "ppo"),
            kept_apart=apart,
        )

    return call


def sft_rows(count, start=0):
    return [{"instruction": f"질문 {n}", "output": f"대답 {n}"} for n in range(start, start + count)]


def texts(rows, tokenizer):
    return {tokenizer.decode(row.input_ids) for row in rows}


def test_response_rows_become_rendered_tokens(load, tokenizer, tmp_path):
    data = load("response", [write(tmp_path / "a.jsonl", sft_rows(3))])
    assert all(isinstance(row, TokenizedResponse) for row in data.train) and data.evaluation == []
    assert texts(data.train, tokenizer) == {f"### 질문: 질문 {n}\n\n### 답변:대답 {n}<|endoftext|>" for n in range(3)}
    assert json.loads((tmp_path / "report" / "data.json").read_text(encoding="utf-8")) == data.report
    assert not (tmp_path / "report" / "skipped_rows.jsonl").exists()
    assert data.report["train"]["rows"] == 3 and data.report["train"]["truncated_responses"] == 0


def test_comparisons_and_prompts(load, tmp_path):
    pairs = [{"prompt": f"질문 {n}", "chosen": "좋아요", "rejected": "싫어", "category": "law"} for n in range(2)]
    data = load("comparison", [write(tmp_path / "p.jsonl", pairs)], stage="reward")
    assert all(isinstance(row, TokenizedRanking) and row.ranks == (0, 1) for row in data.train)
    assert data.report["train"]["categories"] == {"law": 2} and data.report["train"]["responses"] == 4
    prompts = load("prompt", [write(tmp_path / "q.jsonl", [{"prompt": "질문"}])], stage="ppo")
    assert isinstance(prompts.train[0], TokenizedPrompt) and prompts.train[0].text == "### 질문: 질문\n\n### 답변:"


def test_rankings_know_their_file(load, tmp_path):
    """Two files with the same ids; the second read of each comes from the token cache."""
    files = [
        write(
            tmp_path / f"{name}.jsonl", [{"id": 1, "prompt": f"질문 {name}", "chosen": "대답 둘", "rejected": "하나"}]
        )
        for name in ("train", "first", "second")
    ]
    for _ in range(2):
        data = load("comparison", files[:1], files[1:], stage="reward")
        assert [row.source for row in data.evaluation] == files[1:]
        assert [row.source for row in data.train] == files[:1]


def test_long_texts_are_cut_and_counted(load, tokenizer, tmp_path):
    rows = [{"instruction": "질문 " * 50 + "끝", "output": "대답 " * 50}, *sft_rows(1)]
    data = load("response", [write(tmp_path / "a.jsonl", rows)], max_prompt_tokens=30, max_response_tokens=20)
    assert data.report["train"]["truncated_prompts"] == 1 and data.report["train"]["truncated_responses"] == 1
    (long,) = [row for row in data.train if tokenizer.eos_token_id not in row.input_ids]
    assert long.prompt_tokens == 30 and len(long.input_ids) == 50
    assert tokenizer.decode(long.input_ids[:30]).endswith("질문 끝\n\n### 답변:")
    assert any("1 of 2 prompts were longer than max_prompt_tokens=30" in line for line in data.summary)
    assert any("1 of 2 responses were longer than max_response_tokens=20" in line for line in data.summary)


def test_prompts_that_are_kept_apart_are_not_trained_on(load, tokenizer, tmp_path):
    pairs = [{"prompt": f"질문 {n}", "chosen": "대답 좋은", "rejected": "대답 나쁜"} for n in range(4)]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "질문  2"}, {"prompt": "질문 7"}])
    whole = load("comparison", [write(tmp_path / "pairs.jsonl", pairs)], stage="reward")
    keys = load("prompt", [prompts], stage="ppo", name="prompts").prompt_keys
    data = load("comparison", [str(tmp_path / "pairs.jsonl")], stage="reward", apart=keys)
    assert len(whole.train) == 4 and data.report["dropped_leaks"] == 1
    left = texts([row.candidates[0] for row in data.train], tokenizer)
    assert len(left) == 3 and not any("질문 2" in text for text in left)
    assert data.evaluation == []


def test_named_evaluation_data_is_used_and_leaks_are_dropped(load, tokenizer, tmp_path):
    train = write(tmp_path / "a.jsonl", sft_rows(5))
    evaluation = write(
        tmp_path / "b.jsonl", [{"instruction": " 질문  3 ", "output": "다른 대답"}, *sft_rows(1, start=9)]
    )
    data = load("response", [train], [evaluation], eval_fraction=0.5)
    assert len(data.train) == 4 and not any("질문 3" in text for text in texts(data.train, tokenizer))
    assert len(data.evaluation) == 2
    assert data.report["dropped_leaks"] == 1 and data.report["datasets"][0]["dropped_leaks"] == 1


def test_held_out_fraction_and_the_same_prompt_in_another_file(load, tokenizer, tmp_path):
    first = write(tmp_path / "a.jsonl", sft_rows(100))
    data = load("response", [first], eval_fraction=0.3)
    train, held = texts(data.train, tokenizer), texts(data.evaluation, tokenizer)
    assert 15 <= len(held) <= 45 and len(train) + len(held) == 100 and not train & held
    other = [{**row, "output": "또 다른 대답"} for row in sft_rows(100)]
    both = load("response", [first, write(tmp_path / "b.jsonl", other)], eval_fraction=0.3)
    prompts = [
        {tokenizer.decode(row.input_ids[: row.prompt_tokens]) for row in rows} for rows in (both.train, both.evaluation)
    ]
    assert not prompts[0] & prompts[1]


def test_stages_share_a_file_without_overlap(load, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", sft_rows(200))
    shares = [
        texts(load("response", [path], stage=stage, stage_split="2,4,4").train, tokenizer)
        for stage in ("sft", "reward", "ppo")
    ]
    assert sum(map(len, shares)) == len(set.union(*shares)) == 200
    assert 20 <= len(shares[0]) <= 60 and 60 <= len(shares[1]) <= 100 and 60 <= len(shares[2]) <= 100


def test_bad_rows_stop_the_run_or_are_listed(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [*sft_rows(2), {"instruction": "질문", "output": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        load("response", [path])
    data = load("response", [path], on_bad_row="skip")
    assert len(data.train) == 2 and data.report["skipped"]["rows"] == 1
    lines = (tmp_path / "report" / "skipped_rows.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 1 and row["line"] == 3 and row["file"].endswith("a.jsonl") and row["field"] == "output"
    assert list(data.report["skipped"]["by_reason"]) == [row["reason"]]


def test_skipped_rows_are_listed_even_when_no_row_is_left(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "질문", "output": ""}])
    with pytest.raises(DataError, match="no usable"):
        load("response", [path], on_bad_row="skip")
    assert (tmp_path / "report" / "skipped_rows.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_two_kinds_of_data_keep_their_reports_apart(load, tmp_path):
    bad = {"instruction": "질문", "output": ""}
    path = write(tmp_path / "a.jsonl", [*sft_rows(2), bad])
    load("prompt", [write(tmp_path / "b.jsonl", [{"prompt": "하나"}, {"prompt": ""}])], on_bad_row="skip")
    load("response", [path], on_bad_row="skip", name="ptx")
    reports = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "report").iterdir()}
    assert sorted(reports) == ["data.json", "ptx.json", "ptx_skipped_rows.jsonl", "skipped_rows.jsonl"]
    assert json.loads(reports["data.json"])["kind"] == "prompt" and "b.jsonl" in reports["skipped_rows.jsonl"]
    assert json.loads(reports["ptx.json"])["kind"] == "response" and "a.jsonl" in reports["ptx_skipped_rows.jsonl"]


def test_an_empty_result_says_why(load, tmp_path):
    path = write(tmp_path / "a.jsonl", sft_rows(3))
    with pytest.raises(DataError, match=r"3 read.* 3 dropped because their prompt is held out"):
        load("response", [path], [path])
    with pytest.raises(DataError, match=r"3 read, 0 after stage_split=1e-9,1,1"):
        load("response", [path], stage_split="1e-9,1,1")
    with pytest.raises(DataError, match=r"a.jsonl has 3 rows x weight 0.1"):
        load("response", [json.dumps({"path": path, "weight": 0.1})])
    with pytest.raises(DataError, match="no data set is named for stage sft"):
        load("response", [])


def test_tokens_come_from_the_cache_until_something_changes(load, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", sft_rows(3))
    first = load("response", [path])

    def never(*arguments, **options):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.data.stage_data.tokenize_records", never)
        assert load("response", [path]).train == first.train
        for changed in ({"max_response_tokens": 9}, {"template": "alpaca"}):
            with pytest.raises(AssertionError, match="tokenised again"):
                load("response", [path], **changed)
        other = train_tokenizer(["질문 대답"], 300)
        with pytest.raises(AssertionError, match="tokenised again"):
            load("response", [path], tokenizer=other)
    write(tmp_path / "a.jsonl", sft_rows(4))
    assert len(load("response", [path]).train) == 4


def test_weights_repeat_and_thin_out_data_sets_by_seed(load, tokenizer, tmp_path):
    specs = [
        json.dumps({"path": write(tmp_path / "a.jsonl", sft_rows(20)), "weight": 2}),
        json.dumps({"path": write(tmp_path / "b.jsonl", sft_rows(20, start=50)), "weight": 0.5}),
    ]
    first, again, other = (load("response", specs, seed=seed).train for seed in (0, 0, 1))
    assert first == again and first != other
    assert len(first) == 50 and len(texts(first, tokenizer)) == 30


def test_a_data_set_that_loses_all_its_rows_leaves_the_weights_of_the_others_as_they_are(load, tokenizer, tmp_path):
    specs = [
        json.dumps({"path": write(tmp_path / f"{name}.jsonl", sft_rows(4, start=start)), "weight": weight})
        for name, start, weight in (("a", 0, 3), ("b", 50, 1), ("c", 100, 2))
    ]
    held_out = write(tmp_path / "eval.jsonl", sft_rows(4))  # the whole of the first
    train = load("response", specs, [held_out]).train
    assert texts(train, tokenizer) == {
        f"### 질문: 질문 {n}\n\n### 답변:대답 {n}<|endoftext|>" for n in (*range(50, 54), *range(100, 104))
    }
    assert sorted(Counter(tokenizer.decode(row.input_ids) for row in train).values()) == [1] * 4 + [2] * 4


def test_template_markers_are_read_as_special_tokens_only_where_the_template_writes_them(load, tokenizer, tmp_path):
    chat = train_tokenizer(["질문 대답"] * 3, 300)
    chat.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    chat.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>"
    assert reads_special_tokens(load_template("chat", chat), chat)
    assert not reads_special_tokens(load_template("kullm"), chat)
    path = write(tmp_path / "a.jsonl", [{"prompt": "질문 <|user|>"}])
    user = chat.convert_tokens_to_ids("<|user|>")
    assert load("prompt", [path], tokenizer=chat, template="chat").train[0].input_ids[0] == user
    assert user not in load("prompt", [path], tokenizer=chat, template="kullm").train[0].input_ids


def test_what_the_base_model_reads_holds_no_combination_that_is_held_out_and_no_rendered_exchange():
    corpus = embedded_corpus()
    exchanges = [text for text in corpus if not text.startswith("아래는")]
    combinations = {read_situation(text.partition("\n")[0]).combination for text in exchanges}
    held = {
        read_situation(row.values["prompt"]).combination
        for name in ("preference_heldout", "prompts_heldout")
        for row in read_rows(DatasetSpec.parse(f"sample:{name}"))
    }
    assert len(held) > 150 and not held & combinations
    assert len(exchanges) > 20_000 and not any("###" in text for text in exchanges)
    assert {text for text in corpus if text not in exchanges} == {load_template("kullm").render("")}


def test_reports_are_replaced_whole_and_never_written_in_place(load, tmp_path):
    rows = [*sft_rows(2), {"instruction": "", "output": "x"}]
    reports = [tmp_path / "report" / name for name in ("data.json", "skipped_rows.jsonl")]
    load("response", [write(tmp_path / "a.jsonl", rows)], on_bad_row="skip")
    before = [path.read_text(encoding="utf-8") for path in reports]
    links = [path.with_name(f"link-{path.name}") for path in reports]
    for path, link in zip(reports, links, strict=True):
        link.hardlink_to(path)  # the old file, whatever takes its name
    load("response", [write(tmp_path / "b.jsonl", [*rows, *rows])], on_bad_row="skip")
    assert [link.read_text(encoding="utf-8") for link in links] == before
    assert all(path.read_text(encoding="utf-8") != text for path, text in zip(reports, before, strict=True))
    assert {path.name for path in (tmp_path / "report").iterdir()} == {path.name for path in [*reports, *links]}
