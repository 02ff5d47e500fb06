"""The board of signs of life: records, verdicts, and processes told from later ones."""

from __future__ import annotations

from dataclasses import replace

from rlhf.distributed import rank_board
from rlhf.distributed.rank_board import RankBoard, own_record, process_state


def test_a_later_process_of_the_same_pid_is_not_the_rank(tmp_path):
    record = own_record(0)
    assert process_state(record) in ("R", "S", "D")
    assert process_state(replace(record, process_started=record.process_started + 1)) == ""
    assert process_state(replace(record, pid=2**22 + 1)) == ""


def test_one_verdict_only(tmp_path):
    board = RankBoard(tmp_path / "board")
    board.clear()
    assert board.verdict(9) is None
    assert board.claim_verdict(3) and not board.claim_verdict(2)
    assert board.verdict(9) == 3
    board.clear()
    assert board.verdict(9) is None and board.claim_verdict(2)


def test_a_long_or_korean_text_fits_into_a_record(tmp_path):
    board = RankBoard(tmp_path)
    record = replace(own_record(3), beat="단계 " * 500, place="x" * 5000)
    board.write(record)
    assert (board.read(3).beat, board.read(3).place) == (("단계 " * 500)[:160], "x" * 160)
    board.write(replace(record, beat="짧다", pulse=2))
    assert (board.read(3).beat, board.read(3).pulse) == ("짧다", 2)
    assert (tmp_path / "rank_00003.json").stat().st_size == rank_board._RECORD_BYTES
