"""Headers in every spelling, files that two columns of answers make ambiguous, and the option that an error prints."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from pathlib import Path

import pytest
import yaml

from rlhf.config import DataConfig
from rlhf.data import DataError, load_stage_data
from rlhf.data.column_options import json_text
from rlhf.data.formats import layout_of
from rlhf.data.headers import SAME_HEADER, guessed_role
from rlhf.data.sources import read_rows
from rlhf.data.spec import DatasetSpec, Row
from rlhf.pipeline.stages import parse_stage
from tests.support.published import published
from tests.support.tiny_models import make_tokenizer

ROOT = Path(__file__).parents[2]
STAGES = {
    "response": ("sft", "sft_data"),
    "comparison": ("reward", "preference_data"),
    "prompt": ("ppo", "prompt_data"),
}


def layout(kind: str, *headers: str):
    return layout_of([Row({header: "글" for header in headers}, "a.csv", 2)], kind, DatasetSpec("a.csv"))


@pytest.mark.parametrize(
    ("headers", "row_format"),
    [
        (("질문", "답변"), "question_answer"),
        (("질의", "응답"), "question_answer"),
        (("질문", "응답"), "question_answer"),
        (("질의", "답변"), "question_answer"),
        (("question", "answer"), "question_answer"),
        (("QUESTION", " Answer "), "question_answer"),
        (("Q", "A"), "question_answer"),
        (("지시문", "응답"), "alpaca_response"),
        (("명령어", "응답"), "alpaca_response"),
        (("Instruction", "Output"), "alpaca"),
        (("프롬프트", "응답"), "response"),
        (("프롬프트", "답변"), "response"),
        (("prompt", "answer"), "prompt_answer"),
        (("Ｑｕｅｓｔｉｏｎ", "an\u200bswer\ufeff"), "question_answer"),
        (("입력", "출력"), "input_output"),
        ((unicodedata.normalize("NFD", "질문"), unicodedata.normalize("NFD", "답변 ")), "question_answer"),
        (("\u3000질문", "답변\t"), "question_answer"),
    ],
)
def test_headers_of_answers_are_recognised(headers: tuple[str, str], row_format: str) -> None:
    for beside in ((), ("분야",)):
        found = layout("response", *headers, *beside)
        assert found.format == row_format
        assert dict(found.columns) == {"prompt": headers[0], "response": headers[1]}
        assert found.ignored == beside
    for there in (headers, headers[:1]):
        if there == headers or row_format not in ("input_output",):
            prompts = layout("prompt", *there)
            assert prompts.columns["prompt"] == headers[0] and prompts.ignored == ()


def test_the_input_of_a_korean_instruction_is_read() -> None:
    assert dict(layout("response", "지시문", "입력", "출력").columns) == {
        "prompt": "지시문", "input": "입력", "response": "출력"
    }  # fmt: skip
    assert dict(layout("response", "질문", "맥락", "답변").columns)["input"] == "맥락"
    assert dict(layout("comparison", "질문", "Chosen", "rejected").columns) == {
        "prompt": "질문", "chosen": "Chosen", "rejected": "rejected"
    }  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        ("질문", "답변", "응답"),
        ("question", "answer", "질문", "답변"),
        ("question", "answer", "response"),
        ("질문", "답변", "출력"),
        ("프롬프트", "응답", "답변"),
        ("Prompt", "prompt", "response"),
        ("instruction", "질문", "답변"),
        ("prompt", "질문", "답변"),
        ("prompt", "question", "answer"),
    ],
)
def test_two_columns_for_one_thing_are_both_named(headers: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="ambiguous") as caught:
        layout("response", *headers)
    for header in headers:
        assert f"= {header}" in str(caught.value)
    assert layout("prompt", "질문", "답변", "응답").columns["prompt"] == "질문"  # whichever answers it


def test_a_question_beside_another_prompt_is_not_taken_for_the_prompt() -> None:
    """It may be a title, or what a later turn asks."""
    assert dict(layout("prompt", "question").columns) == {"prompt": "question"}
    assert dict(layout("prompt", "conversations", "question").columns) == {"messages": "conversations"}
    with pytest.raises(DataError, match="no known format"):
        layout("prompt", "query", "question")


GUARDS = (
    "label", "라벨", "레이블", "acceptable?", "is_correct", "correct", "정답 여부", "순위", "rank", "상태", "정답",
    "오답", "option_a", "Option B", "choice1", "choices", "choice_text", "보기", "보기1", "보기 4", "선택지1", "B",
    "(2)", "text",
)  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
def test_labels_and_options_beside_a_question_are_not_passed_over(guard: str) -> None:
    answer = "답" if guard == "정답" else "답변"
    with pytest.raises(DataError, match="no known format") as caught:
        layout("response", "질문", answer, guard)
    assert f"beside `{guard}`" in str(caught.value)
    with pytest.raises(DataError, match=f"`{re.escape(guard)}`"):
        layout("response", "prompt", "answer", guard)


def test_a_column_of_two_labels_is_not_passed_over() -> None:
    def found(header: str, values: tuple[object, ...], prompt: str = "질문", response: str = "답변"):
        rows = [Row({prompt: "글", response: "예", header: value}, "a.csv", 2) for value in values]
        return layout_of(rows, "response", DatasetSpec("a.csv"))

    for header, values in (("점수", (1, 0, 1)), ("score", ("0", "1", "0")), ("검수", (True, False, True))):
        with pytest.raises(DataError, match=f"beside `{header}`"):
            found(header, values)
    for header, values in (("점수", (1, 3, 0)), ("점수", (1, 1, 1)), ("번호", (0, 1)), ("검수", ("완료", "대기"))):
        assert found(header, values).ignored == (header,)
    for pair in (("instruction", "output"), ("prompt", "completion"), ("prompt", "response")):
        with pytest.raises(DataError, match="beside `is_correct`"):
            found("is_correct", (True, False), *pair)
        assert found("is_english", (True, False), *pair).ignored == ("is_english",)
        assert found("status", ("done", "done"), *pair).ignored == ("status",)
    assert found("라벨", (True, False), "prompt", "response").format == "labelled_response"


def options_of(kind: str, headers: str, tmp_path: Path, **keys: object) -> tuple[list[dict], str]:
    """The data sets that the error of a file with these headers offers, and the error."""
    (tmp_path / "a.csv").write_text(f"{headers}\n{','.join(f'글{i}' for i in range(headers.count(',') + 1))}\n")
    text = json.dumps({"path": str(tmp_path / "a.csv"), **keys})
    with pytest.raises(DataError) as caught:
        loaded(kind, [text], tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    pasted = [shlex.split(line)[1] for line in lines if line.startswith(f"--{STAGES[kind][1]} ")]
    return [json.loads(text) for text in pasted], str(caught.value)


@pytest.mark.parametrize("headers", ["가,나,다", "번호,종류,질문", "제목,질문,답변", "질문,답변1,답변2,답변3"])
def test_which_answer_is_better_is_never_made_up(headers: str, tmp_path: Path) -> None:
    (option,), error = options_of("comparison", headers, tmp_path)
    assert option["columns"]["chosen"] == "<column of the better answer>"
    assert option["columns"]["rejected"] == "<column of the worse answer>"
    assert "`chosen`, `rejected` to be put in" in error
    with pytest.raises(DataError, match="placeholder '<column of the better answer>' for `chosen`"):
        loaded("comparison", [json.dumps(option)], tmp_path)
    half = {**option, "columns": {**option["columns"], "chosen": headers.split(",")[1]}}
    with pytest.raises(DataError, match="placeholder '<column of the worse answer>' for `rejected`"):
        loaded("comparison", [json.dumps(half)], tmp_path)


def test_a_pair_of_too_few_columns_gets_no_option(tmp_path: Path) -> None:
    assert options_of("comparison", "질문,답변", tmp_path)[0] == []


def test_a_letter_of_an_option_is_no_answer(tmp_path: Path) -> None:
    for headers in ("Q,A,B,C,D", "question,A,B,C,D"):
        assert options_of("response", headers, tmp_path)[0] == []
    with pytest.raises(DataError, match="beside `A`, `B`, `C`"):
        layout("response", "question", "answer", "A", "B", "C")


def test_two_answers_are_offered_both_ways_round(tmp_path: Path) -> None:
    options, error = options_of("comparison", "번호,종류,질의,사람 답변,모델 답변", tmp_path)
    assert [(option["columns"]["chosen"], option["columns"]["rejected"]) for option in options] == [
        ("사람 답변", "모델 답변"), ("모델 답변", "사람 답변")
    ]  # fmt: skip
    assert "not read: `번호`, `종류`" in error


def test_of_several_readings_each_option_says_what_it_leaves_unread(tmp_path: Path) -> None:
    options, error = options_of("response", "질문,답변,응답,번호", tmp_path)
    assert [option["columns"]["response"] for option in options] == ["답변", "응답"]
    assert error.count("not read: ") == 2
    assert "not read: `응답`, `번호`" in error and "not read: `답변`, `번호`" in error


@pytest.mark.parametrize(
    ("headers", "columns", "unread"),
    [
        ("질문,지문,답변,text", {"prompt": "질문", "response": "답변", "input": "지문"}, "`text`"),
        ("Text,Question,Answer", {"prompt": "Question", "response": "Answer", "input": "Text"}, None),
        (
            "id,system_prompt,question,response",
            {"prompt": "question", "response": "response", "system": "system_prompt"},
            None,
        ),
        ("질의 내용,분야,답변", {"prompt": "질의 내용", "response": "답변"}, "`분야`"),
        ("상담 질의,input,답변 내용", {"prompt": "상담 질의", "response": "답변 내용", "input": "input"}, None),
        ("question,A,B,C,D,answer", {"prompt": "question", "response": "answer"}, "`A`, `B`, `C`, `D`"),
    ],
)
def test_the_option_reads_what_belongs_to_the_prompt(headers: str, columns: dict, unread: str | None, tmp_path) -> None:
    (option,), error = options_of("response", headers, tmp_path)
    assert option["columns"] == columns
    assert (f"not read: {unread})" in error) if unread else ("not read" not in error)


def test_the_option_reads_no_column_twice(tmp_path: Path) -> None:
    (option,), _ = options_of("response", "질의 내용,지문,기관 답변", tmp_path, columns={"system": "지문"})
    assert option["columns"] == {"system": "지문", "prompt": "질의 내용", "response": "기관 답변"}


def test_the_option_keeps_the_file_format(tmp_path: Path) -> None:
    headers = "prompt,completion_0,completion_1,ranking,chosen,rejected"
    options, _ = options_of("comparison", headers, tmp_path, format="csv")
    assert {"prompt": "prompt", "responses": "completion_0, completion_1", "ranks": "ranking"} in [
        option["columns"] for option in options
    ]
    assert [option["format"] for option in options] == ["csv"] * 2
    headers = "prompt,response1,sum1,response2,sum2,chosen,rejected"
    (option,), error = options_of("comparison", headers, tmp_path, format="csv")
    assert option["format"] == "csv" and option["columns"]["chosen"] == "chosen"
    assert 'by "format": "scored_pair" in place of "csv": first give the file the suffix .csv' in error


def test_json_shows_letters_that_can_be_seen_and_escapes_the_rest() -> None:
    shown = {"질문 é 👨": ["a b", "\u3000"], "\u200b\x85\uffff\U000e0001": "\U0001f469", "줄\n": None}
    text = json_text(shown)
    assert text == (
        r'{"질문 é 👨": ["a b", "\u3000"], "\u200b\u0085\uffff' "\U000e0001" r'": "' "\U0001f469" r'", "줄\n": null}'
    )
    assert json.loads(text) == shown
    assert json_text("half \ud83d 가") == r'"half \ud83d \uac00"', "no file can hold half a letter"


def test_invisible_characters_of_a_header_are_written_out(tmp_path: Path) -> None:
    (option,), error = options_of("response", "\u200b상담 질의,기관\u3000답변", tmp_path)
    assert option["columns"] == {"prompt": "\u200b상담 질의", "response": "기관\u3000답변"}
    assert r'"\u200b상담 질의"' in error and r'"기관\u3000답변"' in error


@pytest.mark.parametrize(
    "headers",
    [
        ("ID", "Text", "Question", "Answer"),  # KoBEST BoolQ: the question is about the text
        ("ID", "sentence", "question", "1", "2", "Answer"),
        ("Q", "A", "B", "C", "D"),
        ("질문", "답변", "label"),  # acceptable or not, or a topic
        ("질문", "답변자"),
        ("question", "response"),  # SQuARe: `acceptable` stands beside it
        ("질문 내용", "답변 내용"),
    ],
)
def test_what_is_not_certain_is_not_read(headers: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no known format"):
        layout("response", *headers)


def test_columns_may_be_spelt_otherwise() -> None:
    header = unicodedata.normalize("NFD", "상담 질의")
    spec = DatasetSpec("a.csv", columns={"prompt": "상담 질의", "response": "GROUNDED"})
    found = layout_of([Row({header: "글", " Grounded": "글"}, "a.csv", 2)], "response", spec)
    assert dict(found.columns) == {"prompt": header, "response": " Grounded"}


@pytest.mark.parametrize(
    ("header", "role"),
    [
        ("질문 내용", "prompt"),
        ("상담례, 결정례 기반 답변", "response"),
        ("model_answer", "response"),
        ("질문에 대한 답변 (검수)", "response"),
        ("비선호 답변", "response"),
        ("답변 A", "response"),
        ("model a", None),
        ("비선호", "rejected"),
        ("선호", "chosen"),
        ("data", None),
        ("답변자", None),
        ("question_en", None),
    ],
)
def test_guesses(header: str, role: str | None) -> None:
    found = guessed_role(header)
    assert (found and found[0]) == role


CASES = {
    "guessed": ("response", "번호,질의 내용,분야,기관 답변\n1,소음?,생활,신고하세요\n2,누수?,주택,고치세요\n", 1),
    "filled": ("response", "가,나\n첫째 글,둘째 글\n셋째 글,넷째 글\n", 1),
    "two answers": ("response", "질의,사람 답변,모델 답변\n소음?,신고하세요,몰라요\n", 2),
    "ambiguous": ("response", "질문,답변,응답\n소음?,신고하세요,몰라요\n", 2),
    "quotes": ("response", "it's a \"글\" $HOME,`b` 글\n소음?,신고하세요\n", 1),
    "comma": ("response", "질의,\"상담례, 결정례 기반 답변\"\n소음?,신고하세요\n", 1),
    "prompt": ("prompt", "번호,민원\n1,소음이 심해요\n2,물이 새요\n", 1),
    "pair": ("comparison", "질의 내용,선호,비선호\n소음?,신고하세요,몰라요\n누수?,고치세요,참으세요\n", 1),
    "two answers to compare": ("comparison", "질문,답변1,답변2,종류\n소음?,신고하세요,몰라요,생활\n", 2),
    "labels for sft": ("response", "질문,답변,is_correct\n소음?,신고하세요,1\n소음?,참으세요,0\n", 2),
    "passage": ("response", "질문,지문,답변,text\n누가?,김 씨가 왔다.,김 씨,가\n언제?,어제 왔다.,어제,나\n", 1),
    "invisible": ("response", "\u200b상담 질의\u3000내용,기관\ufeff답변\n소음?,신고하세요\n", 1),
    "two letters": ("response", "질문,답변 A,답변 B\n소음?,신고하세요,몰라요\n", 2),
    "two prompts": ("response", "instruction,질문,답변\n답해 줘,소음?,신고하세요\n", 2),
    "labels": ("comparison", "질의 내용,모델 응답,적절\n소음?,신고하세요,1\n소음?,참으세요,0\n", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [0, 1])
def test_the_printed_option_is_pasted_and_reads_the_file(name: str, place: int, tmp_path, monkeypatch) -> None:
    kind, content, choices = CASES[name]
    monkeypatch.setenv("FOLDER", str(tmp_path))
    (tmp_path / "상담's.csv").write_text(content, encoding="utf-8")
    plain = "${FOLDER}/상담's.csv"
    text = plain if place == 0 else json.dumps({"path": plain, "weight": 2.0}, ensure_ascii=False)
    samples = {"response": "sft_train", "comparison": "preference_train", "prompt": "prompts_train"}
    texts = [f"sample:{samples[kind]}", text][1 - place :]
    with pytest.raises(DataError) as caught:
        loaded(kind, texts, tmp_path)
    stage, field = STAGES[kind]
    lines = [line.strip() for line in str(caught.value).splitlines()]
    options = [line for line in lines if line.startswith(f"--{field} ")]
    assert len(options) == choices
    for option in options:
        argv = shlex.split(option)
        given = getattr(parse_stage(stage, [*argv, "--output_dir", str(tmp_path)]).data, field)
        assert len(given) == len(texts)
        rows = loaded(kind, given, tmp_path)
        assert any(dataset["path"].endswith("상담's.csv") and dataset["read"] for dataset in rows.report["datasets"])
        if place == 1:
            assert rows.report["datasets"][1]["weight"] == 2.0, "the other keys stay"
    in_files = [line for line in lines if line.startswith("in a configuration file")]
    for line, option in zip(in_files, options, strict=True):
        config = tmp_path / "run.yaml"
        config.write_text(line.removeprefix("in a configuration file") + "\n", encoding="utf-8")
        assert list(yaml.safe_load(config.read_text(encoding="utf-8"))) == [field]
        from_file = parse_stage(stage, ["--config", str(config), "--output_dir", str(tmp_path)])
        pasted = parse_stage(stage, [*shlex.split(option), "--output_dir", str(tmp_path)])
        specs = [[DatasetSpec.parse(text) for text in getattr(config.data, field)] for config in (from_file, pasted)]
        assert specs[0] == specs[1]
    marked = {"filled", "prompt", "quotes"}
    assert ("only filled in" in str(caught.value)) == (name in marked)


def loaded(kind: str, texts: list[str], directory: Path):
    return load_stage_data(
        kind, texts, [], config=DataConfig(eval_fraction=0.0), stage=STAGES[kind][0], tokenizer=make_tokenizer(),
        seed=0, cache_dir=directory / "cache", report_dir=directory / "report",
    )  # fmt: skip


def test_the_option_is_that_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("가,나\n하나,둘\n", encoding="utf-8")
    options = {"config": DataConfig(), "tokenizer": make_tokenizer(), "seed": 0, "cache_dir": tmp_path / "c"}
    with pytest.raises(DataError, match=r"--sft_eval_data '\{"):
        load_stage_data("response", ["sample:sft_train"], [str(path)], stage="sft", report_dir=tmp_path, **options)
    with pytest.raises(DataError, match=r"--ptx_data '\{"):
        load_stage_data("response", [str(path)], [], stage="sft", report_dir=tmp_path, field="ptx_data", **options)


def test_a_file_with_too_few_columns_gets_no_option(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("가\n하나\n", encoding="utf-8")
    with pytest.raises(DataError, match="no known format") as caught:
        loaded("response", [str(tmp_path / "a.csv")], tmp_path)
    assert "--sft_data" not in str(caught.value)


def test_the_page_lists_the_headers_that_mean_the_same() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("### Headers")[2].partition("\n## ")[0]
    listed = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            name, *others = re.findall(r"`([^`]+)`", line)
            listed[name] = tuple(others)
    assert listed == SAME_HEADER


@pytest.mark.parametrize(
    ("name", "kind", "columns"),
    [
        ("hrc_human_rights/humane_right_copus_v1.jsonl.json", "response", {"prompt": "질의"}),
        ("songys_chatbot/ChatbotData.csv", "response", {"prompt": "Q", "response": "A"}),
        ("naver_square_kosbi/square_response_iter0.json", "comparison", {"prompt": "question", "response": "response"}),
        ("kobest_v1/BoolQ/dev.tsv", "response", {"prompt": "Question"}),
    ],
)
def test_published_files_get_an_option_that_reads_them(name: str, kind: str, columns: dict[str, str], tmp_path) -> None:
    path = str(published(name))
    with pytest.raises(DataError) as caught:
        layout_of(list(read_rows(DatasetSpec(path), "skip")), kind, DatasetSpec(path))
    error = caught.value.with_option("data", [path], 0)
    options = re.findall(r"^  --data (.*)$", str(error), flags=re.MULTILINE)
    assert options
    for option in options:
        spec = DatasetSpec.parse(shlex.split(option)[0])
        assert columns.items() <= spec.columns.items()
        layout_of(list(read_rows(spec, "skip")), kind, spec)
