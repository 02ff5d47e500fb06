"""Everyday law in Korea, as general guidance: where to turn, what to bring, and by when."""

from __future__ import annotations

from rlhf.data.world.frames import Frame, Question
from rlhf.data.world.grammar import Table

WORRY = Table.parse(
    "worry",
    "said tip*",
    """
혼자 가기 무서워요 | 가족과 함께 가 보세요
시간이 없어요 | 전화로 먼저 상담하세요
변호사 비용이 없어요 | 법률구조공단의 무료 상담을 받으세요
말을 잘 못해요 | 할 말을 종이에 적어 가세요
일이 커질까 봐 걱정돼요 | 먼저 조용히 상담만 받아 보세요
상대가 연락을 안 받아요 | 내용증명을 보내 두세요
처음이라 떨려요 | 담당자에게 순서를 물어보세요
너무 멀어요 | 인터넷으로 신청하세요
""",
)
SINCE = Table.parse("since", "name", "어제\n지난주에\n한 달 전에\n두 달 전에\n지난달에\n며칠 전에\n얼마 전에\n올해")
WHOSE = Table.parse("whose", "name", "제\n친구의\n동생의\n어머니의\n아들의\n딸의\n이웃의\n동료의")
DISPUTE = Table.parse(
    "dispute",
    "said matter office* proof*",
    """
월급을 못 받았어요 | 월급 문제 | 노동청 | 근로계약서
해고를 당했어요 | 해고 문제 | 노동위원회 | 해고 통지서
일하다 다쳤어요 | 산재 문제 | 근로복지공단 | 진단서
보증금을 못 받았어요 | 보증금 문제 | 임대차분쟁조정위원회 | 임대차 계약서
산 물건을 환불받지 못했어요 | 환불 문제 | 소비자원 | 영수증
중고 거래에서 사기를 당했어요 | 중고 사기 | 경찰서 | 송금 내역
위층 소음이 심해졌어요 | 층간소음 | 이웃사이센터 | 소음 기록
개인정보가 새어 나갔어요 | 개인정보 문제 | 개인정보침해신고센터 | 안내 문자
수술이 잘못되었어요 | 의료 사고 | 의료분쟁조정중재원 | 진료 기록
글을 도둑맞았어요 | 저작권 문제 | 저작권위원회 | 원본 파일
빌려준 돈을 못 받았어요 | 빌려준 돈 | 지방법원 | 차용증
양육비를 못 받았어요 | 양육비 문제 | 양육비이행관리원 | 이혼 판결문
차 사고를 당했어요 | 교통사고 | 보험사 | 사고 사진
인터넷에서 욕을 들었어요 | 악성 댓글 | 사이버수사대 | 화면 사진
보이스피싱을 당했어요 | 보이스피싱 | 은행 | 통화 기록
학교에서 괴롭힘을 당했어요 | 학교폭력 | 학교폭력신고센터 | 상담 일지
세금이 잘못 나왔어요 | 세금 문제 | 세무서 | 고지서
차별을 당했어요 | 차별 문제 | 국가인권위원회 | 녹음 파일
""",
)
DEADLINE = Table.parse(
    "duty",
    "name within*",
    """
상속 포기 | 석 달 안에
전입신고 | 십사 일 안에
출생신고 | 한 달 안에
사망신고 | 한 달 안에
부당해고 구제 신청 | 석 달 안에
인터넷 구매 취소 | 칠 일 안에
밀린 월급 청구 | 삼 년 안에
이혼 재산 분할 청구 | 이 년 안에
자동차 이전 등록 | 십오 일 안에
행정심판 청구 | 구십 일 안에
민사 판결 항소 | 이 주 안에
형사 판결 항소 | 칠 일 안에
상속세 신고 | 여섯 달 안에
취득세 신고 | 육십 일 안에
""",
)
TIPS = ("[그리고 |걱정되시면 |]{worry.tip}.",)

LAW = (
    Frame(
        "dispute",
        "law",
        "worry",
        (DISPUTE, WORRY, SINCE),
        (
            Question(
                (
                    "{since} {dispute.said}. {worry.said}. [어디에 상담하나요?|어디로 가야 해요?|어디에 신고하나요?]",
                    "{since} {dispute.said}. [어디에 말해야 할까요?|찾아갈 곳이 있나요?] {worry.said}.",
                ),
                ("dispute.office", "worry.tip"),
            ),
            Question(
                (
                    "{since} {dispute.said}. {worry.said}. "
                    "[무엇을 준비하나요?|뭘 가져가야 해요?|어떤 서류가 필요해요?]",
                    "{since} {dispute.said}. [뭘 챙겨야 할까요?|증거로 뭐가 필요해요?] {worry.said}.",
                ),
                ("dispute.proof", "worry.tip"),
            ),
        ),
        {
            "dispute.office": (
                "{dispute.matter:은} {dispute.office}에 상담하세요.",
                "{dispute.matter:은} {dispute.office}에서 도와줘요.",
            ),
            "dispute.proof": (
                "{dispute.matter:은} {dispute.proof:을} 준비하세요.",
                "{dispute.matter}에는 {dispute.proof:이} 필요해요.",
            ),
            "worry.tip": TIPS,
        },
        ("{dispute.matter:은} 흔한 일이에요.", "{dispute.matter:은} 법에 따라 달라요."),
    ),
    Frame(
        "deadline",
        "law",
        "worry",
        (DEADLINE, WORRY, WHOSE),
        (
            Question(
                (
                    "{whose} {duty:을} 해야 해요. {worry.said}. [언제까지 하나요?|기한이 있나요?|며칠이나 남았을까요?]",
                    "{whose} {duty:은} [언제까지 해야 해요?|기한이 얼마예요?] {worry.said}.",
                ),
                ("duty.within", "worry.tip"),
            ),
        ),
        {
            "duty.within": ("{duty:은} {duty.within} 하셔야 해요.", "{duty:은} {duty.within} 하지 않으면 늦어요."),
            "worry.tip": TIPS,
        },
        ("{duty:은} 미루지 않는 게 좋아요.", "{duty:은} 때에 따라 달라요."),
    ),
)
