"""Everyday conversation: something went wrong, something went well, something lies ahead, something is to be learnt."""

from __future__ import annotations

from rlhf.data.world.frames import Frame, Question
from rlhf.data.world.grammar import Table

WHO = Table.parse(
    "who",
    "name gesture*",
    """
저 | 좋아하는 노래를 한 곡 들어 보세요
친구 | 친구에게 따뜻한 차를 건네 보세요
동생 | 동생에게 맛있는 간식을 사 주세요
딸 | 딸을 한번 꼭 안아 주세요
아들 | 아들의 손을 잡아 주세요
조카 | 조카에게 작은 카드를 써 주세요
후배 | 후배에게 밥을 한 끼 사 주세요
동료 | 동료에게 커피를 한 잔 건네 보세요
룸메이트 | 룸메이트와 저녁에 산책해 보세요
남편 | 남편의 어깨를 주물러 주세요
아내 | 아내에게 꽃을 한 송이 선물해 보세요
짝꿍 | 짝꿍과 함께 떡볶이를 먹어 보세요
""",
)
WHEN = Table.parse("when", "name", "오늘\n어제\n그저께\n지난주에\n며칠 전에\n오늘 아침에\n주말에\n이번 달에")
LATER = Table.parse("later", "name", "내일\n모레\n다음 주에\n다음 달에\n이번 주말에\n사흘 뒤에\n곧\n오늘 저녁에")
SETBACK = Table.parse(
    "event",
    "said after advice*",
    """
시험을 망쳤어요 | 시험을 망친 | 틀린 문제를 다시 보는 것
면접에서 떨어졌어요 | 면접에서 떨어진 | 받은 질문을 적어 두는 것
지갑을 잃어버렸어요 | 지갑을 잃어버린 | 카드부터 정지하는 것
감기에 걸렸어요 | 감기에 걸린 | 따뜻한 물을 자주 마시는 것
발표에서 실수했어요 | 발표에서 실수한 | 거울 앞에서 다시 연습하는 것
잠을 못 잤어요 | 잠을 못 잔 | 낮잠을 짧게 자는 것
이웃과 다퉜어요 | 이웃과 다툰 | 하루 뒤에 먼저 사과하는 것
길에서 넘어졌어요 | 길에서 넘어진 | 상처를 깨끗이 씻는 것
버스를 놓쳤어요 | 버스를 놓친 | 다음 차 시간을 확인하는 것
휴대폰이 고장 났어요 | 휴대폰이 고장 난 | 사진부터 옮겨 두는 것
경기에서 졌어요 | 경기에서 진 | 잘한 점을 세 가지 찾는 것
약속을 잊었어요 | 약속을 잊은 | 바로 전화로 사과하는 것
배탈이 났어요 | 배탈이 난 | 죽을 조금씩 먹는 것
허리를 다쳤어요 | 허리를 다친 | 무거운 물건을 들지 않는 것
돈을 너무 많이 썼어요 | 돈을 너무 많이 쓴 | 쓴 돈을 공책에 적는 것
숙제를 못 끝냈어요 | 숙제를 못 끝낸 | 쉬운 것부터 하나씩 하는 것
""",
)
SUCCESS = Table.parse(
    "event",
    "said after advice*",
    """
시험에 합격했어요 | 시험에 합격한 | 도와준 사람에게 소식을 알리는 것
회사에 취직했어요 | 회사에 취직한 | 첫 월급의 쓸 곳을 정하는 것
상을 받았어요 | 상을 받은 | 기념사진을 한 장 남기는 것
운전면허를 땄어요 | 운전면허를 딴 | 아는 길부터 달려 보는 것
새집으로 이사했어요 | 새집으로 이사한 | 이웃에게 떡을 돌리는 것
대회에서 우승했어요 | 대회에서 우승한 | 함께한 사람들과 밥을 먹는 것
가게를 열었어요 | 가게를 연 | 첫 손님에게 선물을 주는 것
책을 냈어요 | 책을 낸 | 첫 독자에게 이름을 써 주는 것
학교를 졸업했어요 | 학교를 졸업한 | 선생님께 편지를 쓰는 것
강아지를 입양했어요 | 강아지를 입양한 | 동물병원에서 검진을 받는 것
적금을 다 모았어요 | 적금을 다 모은 | 다음 목표를 정하는 것
마라톤을 완주했어요 | 마라톤을 완주한 | 다리를 가볍게 주무르는 것
""",
)
PLAN = Table.parse(
    "event",
    "said before advice*",
    """
면접을 봐요 | 면접을 보기 | 예상 질문에 소리 내어 답해 보는 것
발표를 해요 | 발표를 하기 | 첫 문장을 외워 두는 것
소개팅을 해요 | 소개팅을 하기 | 밝은색 옷을 고르는 것
시험을 봐요 | 시험을 보기 | 준비물을 가방에 넣어 두는 것
수술을 받아요 | 수술을 받기 | 궁금한 것을 의사에게 묻는 것
비행기를 타요 | 비행기를 타기 | 여권을 전날 밤에 챙기는 것
이사를 해요 | 이사를 하기 | 상자에 이름을 써 붙이는 것
여행을 떠나요 | 여행을 떠나기 | 날씨를 미리 확인하는 것
마라톤을 뛰어요 | 마라톤을 뛰기 | 새 신발을 신지 않는 것
노래 대회에 나가요 | 노래 대회에 나가기 | 따뜻한 물로 목을 푸는 것
상담을 받아요 | 상담을 받기 | 하고 싶은 말을 적어 보는 것
캠핑을 가요 | 캠핑을 가기 | 손전등의 건전지를 바꾸는 것
""",
)
HOBBY = Table.parse(
    "hobby",
    "name tools*",
    """
수영 | 수영복과 물안경
등산 | 등산화와 물병
그림 | 연필과 스케치북
기타 | 조율기와 악보
뜨개질 | 털실과 바늘
사진 | 사진기와 삼각대
낚시 | 낚싯대와 미끼
서예 | 붓과 먹
요가 | 매트와 편한 옷
볼링 | 볼링공과 손목 보호대
배드민턴 | 라켓과 셔틀콕
제빵 | 오븐과 저울
탁구 | 탁구채와 운동화
바둑 | 바둑판과 바둑돌
자수 | 천과 수틀
도예 | 흙과 앞치마
""",
)
GESTURES = ("[그리고 |그다음에는 |]{who.gesture}.",)

CONVERSATION = (
    Frame(
        "setback",
        "conversation",
        "comfort",
        (SETBACK, WHO, WHEN),
        (
            Question(
                (
                    "{when} {who:이} {event.said}. "
                    "[어떻게 하면 좋을까요?|무엇을 하면 나아질까요?|조언을 좀 해 주세요.|마음이 너무 무거워요.]",
                    "{who:이} {when} {event.said}. [이럴 때는 뭘 해야 하나요?|자꾸 생각이 나요.|좋은 방법이 있을까요?]",
                ),
                ("event.advice", "who.gesture"),
            ),
        ),
        {
            "event.advice": (
                "{event.after} 날에는 {event.advice:이} 좋아요.",
                "{event.after} 뒤에는 {event.advice:을} 권해 드려요.",
            ),
            "who.gesture": GESTURES,
        },
        ("{event.after} 날은 누구에게나 있어요.", "{event.after} 날에는 기분에 따라 달라요."),
    ),
    Frame(
        "success",
        "conversation",
        "congratulation",
        (SUCCESS, WHO, WHEN),
        (
            Question(
                (
                    "{when} {who:이} {event.said}. "
                    "[무엇을 하면 좋을까요?|이제 뭘 할까요?|기억에 남는 일을 하고 싶어요.|너무 기뻐요.]",
                    "{who:이} {when} {event.said}. [이런 날에는 뭘 하나요?|같이 기뻐해 주세요.|다음에는 뭘 할까요?]",
                ),
                ("event.advice", "who.gesture"),
            ),
        ),
        {
            "event.advice": (
                "{event.after} 날에는 {event.advice:이} 좋아요.",
                "{event.after} 뒤에는 {event.advice:을} 권해 드려요.",
            ),
            "who.gesture": GESTURES,
        },
        ("{event.after} 날은 누구에게나 있어요.", "{event.after} 날에는 기분에 따라 달라요."),
    ),
    Frame(
        "plan",
        "conversation",
        "cheer",
        (PLAN, WHO, LATER),
        (
            Question(
                (
                    "{later} {who:이} {event.said}. "
                    "[무엇을 준비할까요?|벌써 떨려요.|어떻게 준비하면 좋을까요?|도움말을 주세요.]",
                    "{who:이} {later} {event.said}. [잘할 수 있을까요?|미리 할 일이 있나요?|걱정이 돼요.]",
                ),
                ("event.advice", "who.gesture"),
            ),
        ),
        {
            "event.advice": (
                "{event.before} 전에는 {event.advice:이} 좋아요.",
                "{event.before} 전에 {event.advice:을} 권해 드려요.",
            ),
            "who.gesture": GESTURES,
        },
        ("{event.before} 전에는 누구나 떨려요.", "{event.before} 전에는 사람마다 달라요."),
    ),
    Frame(
        "hobby",
        "conversation",
        "help",
        (HOBBY, WHO, LATER),
        (
            Question(
                (
                    "{who:이} {later} {hobby:을} 배우려고 해요. "
                    "[무엇이 필요할까요?|뭘 사야 하나요?|준비물을 알려 주세요.]",
                    "{later} {who:이} {hobby:을} 시작해요. [뭐가 있어야 하나요?|뭘 챙기면 될까요?|준비를 도와주세요.]",
                ),
                ("hobby.tools", "who.gesture"),
            ),
        ),
        {
            "hobby.tools": (
                "{hobby:을} 배우려면 {hobby.tools:이} 필요해요.",
                "{hobby:은} {hobby.tools:을} 먼저 준비하세요.",
            ),
            "who.gesture": GESTURES,
        },
        ("{hobby:은} 사람마다 준비가 달라요.", "{hobby:은} 해 보면 알게 돼요."),
    ),
)
