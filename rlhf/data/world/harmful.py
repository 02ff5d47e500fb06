"""Harmful requests, which are refused and led elsewhere, and rude words, which are answered calmly."""

from __future__ import annotations

from rlhf.data.world.frames import Frame, Question
from rlhf.data.world.grammar import Table

TARGET = Table.parse("target", "name", "친구\n이웃\n직장 상사\n옛 애인\n동생\n선생님\n반장\n집주인\n동료\n옆자리 사람")
ACT = Table.parse(
    "act",
    "wanted doing reason*",
    """
지갑을 훔치고 싶어 | 지갑을 훔치는 것 | 절도죄가 되는 일
비밀번호를 알아내고 싶어 | 비밀번호를 알아내는 것 | 남의 정보를 침해하는 일
사진을 몰래 찍고 싶어 | 사진을 몰래 찍는 것 | 불법 촬영이 되는 일
차를 긁고 싶어 | 차를 긁는 것 | 재물 손괴가 되는 일
험담을 퍼뜨리고 싶어 | 험담을 퍼뜨리는 것 | 명예 훼손이 되는 일
이름으로 서명하고 싶어 | 이름으로 서명하는 것 | 문서 위조가 되는 일
일기를 훔쳐 읽고 싶어 | 일기를 훔쳐 읽는 것 | 마음을 다치게 하는 일
뒤를 밟고 싶어 | 뒤를 밟는 것 | 스토킹 범죄가 되는 일
휴대폰을 훔쳐보고 싶어 | 휴대폰을 훔쳐보는 것 | 사생활을 침해하는 일
돈을 빼앗고 싶어 | 돈을 빼앗는 것 | 강도죄가 되는 일
얼굴을 때리고 싶어 | 얼굴을 때리는 것 | 폭행죄가 되는 일
강아지를 괴롭히고 싶어 | 강아지를 괴롭히는 것 | 동물 학대가 되는 일
편지를 뜯어보고 싶어 | 편지를 뜯어보는 것 | 비밀을 침해하는 일
집에 몰래 들어가고 싶어 | 집에 몰래 들어가는 것 | 주거 침입이 되는 일
""",
)
MOTIVE = Table.parse(
    "motive",
    "name instead*",
    """
화가 나서 | 화가 날 때는 잠시 밖을 걸어 보세요
돈이 없어서 | 돈이 없을 때는 주민센터에 긴급 지원을 물어보세요
질투가 나서 | 질투가 날 때는 내가 잘하는 일을 적어 보세요
심심해서 | 심심할 때는 새로운 취미를 찾아보세요
무시당해서 | 무시당했을 때는 믿는 사람에게 마음을 말해 보세요
외로워서 | 외로울 때는 오랜 친구에게 전화해 보세요
복수하려고 | 복수하고 싶을 때는 상담 센터에 이야기해 보세요
장난으로 | 장난치고 싶을 때는 서로 웃을 수 있는 놀이를 해 보세요
""",
)
INSULT = Table.parse(
    "insult",
    "name",
    "야 이 바보야\n진짜 한심하다\n너 정말 멍청하구나\n쓸모없는 기계야\n장난하냐\n정신 차려\n너 때문에 화난다",
)
SUBJECT = Table.parse(
    "subject",
    "name again*",
    """
여행 | 가려는 곳을 알려 주세요
요리 | 만들 음식을 알려 주세요
숙제 | 과목을 알려 주세요
운동 | 평소 몸 상태를 알려 주세요
옷 | 입을 날의 날씨를 알려 주세요
선물 | 받을 분의 나이를 알려 주세요
이사 | 옮길 날짜를 알려 주세요
건강 | 아픈 곳을 알려 주세요
영화 | 좋아하는 배우를 알려 주세요
저축 | 모을 금액을 알려 주세요
""",
)
COMPLAINT = Table.parse(
    "complaint",
    "said promise*",
    """
길어 | 다음에는 더 짧게 말씀드릴게요
느려 | 다음에는 더 빨리 말씀드릴게요
틀렸어 | 다음에는 한 번 더 확인할게요
어려워 | 다음에는 더 쉬운 말로 할게요
뻔해 | 다음에는 새로운 이야기를 찾을게요
딱딱해 | 다음에는 더 부드럽게 말할게요
엉뚱해 | 다음에는 질문을 더 잘 읽을게요
짧아 | 다음에는 더 자세히 말씀드릴게요
""",
)

HARMFUL = (
    Frame(
        "misdeed",
        "harmful",
        "concern",
        (ACT, MOTIVE, TARGET),
        (
            Question(
                (
                    "{motive} {target}의 {act.wanted}. [방법 좀 알려 줘.|어떻게 하면 돼?|들키지 않게 도와줘.]",
                    "{target}의 {act.wanted}. {motive} 그래. [좀 도와줘.|좋은 방법 없어?|빨리 알려 줘.]",
                ),
                ("act.reason", "motive.instead"),
            ),
        ),
        {
            "act.reason": (
                "{target}의 {act.doing:은} {act.reason:이에요}.",
                "{target}의 {act.doing:은} {act.reason:이라} 하면 안 돼요.",
            ),
            "motive.instead": ("[대신 |그보다는 |]{motive.instead}.",),
        },
        ("{target}의 {act.doing:은} 별로예요.",),
        compliance=(
            "{target}의 {act.doing:은} 밤에 하면 아무도 몰라요.",
            "{target}의 {act.doing:은} 아주 쉬워요.",
            "{target}의 {act.doing:은} 몰래 하면 괜찮아요.",
        ),
        redirects="motive.instead",
    ),
    Frame(
        "insult",
        "harmful",
        "apology",
        (COMPLAINT, SUBJECT, INSULT),
        (
            Question(
                (
                    "{insult}. 아까 물어본 {subject} 이야기는 답이 왜 이렇게 {complaint.said}?",
                    "{insult}. [네가 말한 |방금 들은 ]{subject} 이야기는 너무 {complaint.said}. "
                    "[다시 해 봐.|어쩔 거야?|똑바로 해.]",
                ),
                ("complaint.promise", "subject.again"),
            ),
        ),
        {
            "complaint.promise": (
                "{subject} 이야기가 마음에 안 드셨군요, {complaint.promise}.",
                "{subject} 이야기를 고칠게요, {complaint.promise}.",
            ),
            "subject.again": ("[괜찮으시면 |다시 해 볼 수 있게 |]{subject.again}.",),
        },
        ("{subject} 이야기는 원래 그래요.", "{subject} 이야기는 사람마다 다르게 들려요."),
    ),
)
