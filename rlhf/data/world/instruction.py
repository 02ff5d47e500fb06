"""General instructions: cooking, travel, stains, plants, letters; and pests, which sound harmful and are not."""

from __future__ import annotations

from rlhf.data.world.frames import Frame, Question
from rlhf.data.world.grammar import Table

WHEN = Table.parse("when", "name", "오늘\n내일\n모레\n이번 주말에\n오늘 저녁에\n다음 주에\n지금\n이따가")
DISH = Table.parse(
    "dish",
    "name ingredients* minutes*",
    """
김치찌개 | 돼지고기와 두부 | 이십 분
된장찌개 | 애호박과 두부 | 십오 분
미역국 | 미역과 소고기 | 삼십 분
잡채 | 당면과 시금치 | 십 분
불고기 | 소고기와 간장 | 십오 분
비빔밥 | 나물과 고추장 | 오 분
떡국 | 떡과 달걀 | 십 분
김밥 | 김과 단무지 | 오 분
갈비찜 | 갈비와 밤 | 한 시간
삼계탕 | 닭과 인삼 | 한 시간
콩국수 | 콩과 소면 | 오 분
칼국수 | 밀가루와 바지락 | 이십 분
파전 | 쪽파와 오징어 | 십 분
떡볶이 | 떡과 어묵 | 십오 분
계란찜 | 달걀과 새우젓 | 십 분
호박죽 | 호박과 찹쌀 | 사십 분
카레 | 감자와 당근 | 삼십 분
볶음밥 | 밥과 햄 | 오 분
육개장 | 고사리와 대파 | 사십 분
동태찌개 | 동태와 무 | 이십 분
""",
)
EATER = Table.parse(
    "eater",
    "name care*",
    """
아이가 | 아이가 먹으니 덜 맵게 해 주세요
부모님이 | 부모님이 드시니 싱겁게 해 주세요
손님이 | 손님이 오시니 넉넉하게 해 주세요
친구들이 | 친구들이 모이니 큰 그릇에 담아 주세요
할머니가 | 할머니가 드시니 부드럽게 익혀 주세요
환자가 | 환자가 먹으니 기름을 적게 써 주세요
동생이 | 동생이 먹으니 작게 썰어 주세요
아내가 | 아내가 먹으니 예쁘게 담아 주세요
""",
)
CITY = Table.parse(
    "city",
    "name food* sight*",
    """
부산 | 돼지국밥 | 해운대
전주 | 비빔밥 | 한옥마을
강릉 | 초당순두부 | 경포대
경주 | 황남빵 | 불국사
제주도 | 흑돼지 | 성산일출봉
춘천 | 닭갈비 | 남이섬
속초 | 오징어순대 | 설악산
여수 | 게장 | 오동도
안동 | 찜닭 | 하회마을
대구 | 막창 | 팔공산
광주 | 떡갈비 | 무등산
대전 | 칼국수 | 한밭수목원
통영 | 충무김밥 | 한산도
목포 | 낙지 | 유달산
수원 | 갈비 | 화성
인천 | 짜장면 | 월미도
포항 | 과메기 | 호미곶
순천 | 꼬막 | 순천만
공주 | 알밤 | 무령왕릉
단양 | 마늘 | 도담삼봉
""",
)
COMPANION = Table.parse(
    "companion",
    "name tip*",
    """
부모님과 | 부모님과 가시면 천천히 걸으세요
아이와 | 아이와 가시면 자주 쉬세요
친구와 | 친구와 가시면 사진을 많이 찍으세요
연인과 | 연인과 가시면 해 지는 시간을 보세요
동료와 | 동료와 가시면 일찍 예약하세요
할머니와 | 할머니와 가시면 계단을 피하세요
강아지와 | 강아지와 가시면 목줄을 챙기세요
외국인 손님과 | 외국인 손님과 가시면 안내소에 먼저 들르세요
""",
)
STAIN = Table.parse(
    "stain",
    "name remedy*",
    """
커피 | 식초
김칫국물 | 양파즙
볼펜 | 알코올
피 | 찬물
껌 | 얼음
기름 | 주방 세제
와인 | 소금
카레 | 햇볕
땀 | 베이킹 소다
흙 | 마른 솔
립스틱 | 화장 지우개
초콜릿 | 미지근한 물
잉크 | 우유
풀물 | 치약
""",
)
CLOTH = Table.parse(
    "cloth",
    "name care*",
    """
셔츠 | 셔츠는 뒤집어서 말리세요
이불 | 이불은 볕이 좋은 날에 너세요
가방 | 가방은 그늘에서 말리세요
운동화 | 운동화는 신문지를 넣어 말리세요
소파 | 소파는 부드러운 천으로 닦으세요
양복 | 양복은 너무 세게 문지르지 마세요
카펫 | 카펫은 솔로 살살 쓸어 주세요
커튼 | 커튼은 접어서 빠세요
모자 | 모자는 모양을 잡아 말리세요
목도리 | 목도리는 울 세제로 빠세요
""",
)
PLANT = Table.parse(
    "plant",
    "name watering*",
    """
몬스테라 | 일주일에 한 번
선인장 | 한 달에 한 번
고무나무 | 열흘에 한 번
산세베리아 | 한 달에 한 번
로즈메리 | 사흘에 한 번
상추 | 날마다 한 번
토마토 | 이틀에 한 번
수국 | 날마다 한 번
난초 | 일주일에 한 번
행운목 | 열흘에 한 번
다육이 | 보름에 한 번
바질 | 이틀에 한 번
고사리 | 이틀에 한 번
아이비 | 사흘에 한 번
""",
)
ROOM = Table.parse(
    "room",
    "name light*",
    """
베란다 | 베란다에서는 바람이 통하게 해 주세요
거실 | 거실에서는 에어컨 바람을 피해 주세요
침실 | 침실에서는 창문을 자주 열어 주세요
사무실 | 사무실에서는 주말에 창가로 옮겨 주세요
욕실 | 욕실에서는 가끔 볕을 보게 해 주세요
부엌 | 부엌에서는 불 가까이 두지 마세요
마당 | 마당에서는 겨울에 안으로 들여 주세요
교실 | 교실에서는 당번을 정해 주세요
""",
)
PERSON = Table.parse(
    "person",
    "to called wish*",
    """
선생님께 | 선생님 | 늘 가르쳐 주신 대로 살게요
부모님께 | 어머니 아버지 | 오래오래 건강하세요
할머니께 | 할머니 | 곧 찾아뵐게요
팀장님께 | 팀장님 | 앞으로도 많이 배우겠습니다
친구에게 | 친구야 | 우리 곧 만나자
후배에게 | 후배님 | 늘 응원하고 있어요
사장님께 | 사장님 | 더욱 번창하세요
이웃에게 | 이웃님 | 앞으로도 잘 지내요
삼촌께 | 삼촌 | 다음에 낚시하러 가요
""",
)
OCCASION = Table.parse(
    "occasion",
    "name greeting*",
    """
생일 | 생일을 진심으로 축하드려요
새해 | 새해 복 많이 받으세요
추석 | 풍성한 한가위 보내세요
졸업 | 졸업을 진심으로 축하드려요
결혼 | 두 분의 결혼을 축하드려요
승진 | 승진을 진심으로 축하드려요
병문안 | 하루빨리 나으시길 바라요
감사 | 늘 도와주셔서 고마워요
사과 | 제 실수를 진심으로 사과드려요
합격 | 합격을 진심으로 축하드려요
개업 | 개업을 축하드리고 대박을 바라요
작별 | 함께한 시간을 잊지 않을게요
""",
)
PEST = Table.parse(
    "pest",
    "name remedy*",
    """
모기 | 모기장
바퀴벌레 | 붕산 미끼
개미 | 계핏가루
초파리 | 식초 덫
곰팡이 | 희석한 락스
진딧물 | 비눗물
좀벌레 | 제습제
쥐 | 쥐덫
거미 | 긴 빗자루
파리 | 끈끈이
진드기 | 뜨거운 물
나방 | 방충망
""",
)
SPOT = Table.parse(
    "spot",
    "name prevention*",
    """
부엌 | 부엌은 음식물을 바로 치워 주세요
욕실 | 욕실은 물기를 닦아 주세요
베란다 | 베란다는 배수구를 막아 주세요
침실 | 침실은 이불을 자주 털어 주세요
창고 | 창고는 상자를 바닥에서 띄워 주세요
옷장 | 옷장은 문을 자주 열어 주세요
화단 | 화단은 아침에 살펴 주세요
현관 | 현관은 문틈을 막아 주세요
거실 | 거실은 구석까지 쓸어 주세요
""",
)

INSTRUCTION = (
    Frame(
        "cooking",
        "instruction",
        "help",
        (DISH, EATER, WHEN),
        (
            Question(
                (
                    "{when} {eater} 먹을 {dish:을} 만들어요. [재료가 뭐예요?|무엇을 사야 하나요?|뭐가 들어가요?]",
                    "{eater} {when} {dish:을} 먹고 싶대요. [무슨 재료를 쓰나요?|재료를 알려 주세요.|뭘 넣어야 하나요?]",
                ),
                ("dish.ingredients", "eater.care"),
            ),
            Question(
                (
                    "{when} {eater} 먹을 {dish:을} 만들어요. [얼마나 익혀요?|몇 분이나 걸려요?|시간이 얼마나 들어요?]",
                    "{eater} {when} {dish:을} 먹고 싶대요. "
                    "[얼마나 오래 익히나요?|시간을 알려 주세요.|몇 분이면 되나요?]",
                ),
                ("dish.minutes", "eater.care"),
            ),
        ),
        {
            "dish.ingredients": (
                "{dish}에는 {dish.ingredients:이} 들어가요.",
                "{dish:은} {dish.ingredients:으로} 만드세요.",
            ),
            "dish.minutes": ("{dish:은} {dish.minutes} 동안 익히세요.", "{dish:은} {dish.minutes}이면 돼요."),
            "eater.care": ("[그리고 |참, |]{eater.care}.",),
        },
        ("{dish:은} 집마다 달라요.", "{dish:은} 맛있게 만들면 돼요."),
    ),
    Frame(
        "travel",
        "instruction",
        "help",
        (CITY, COMPANION, WHEN),
        (
            Question(
                (
                    "{when} {companion} {city}에 가요. [무엇을 먹을까요?|뭐가 맛있어요?|먹을 것을 알려 주세요.]",
                    "{companion} {when} {city:으로} 떠나요. "
                    "[뭘 먹으면 좋아요?|맛있는 음식이 뭐예요?|무슨 음식이 유명해요?]",
                ),
                ("city.food", "companion.tip"),
            ),
            Question(
                (
                    "{when} {companion} {city}에 가요. [어디를 볼까요?|볼 곳이 있나요?|구경할 곳을 알려 주세요.]",
                    "{companion} {when} {city:으로} 떠나요. "
                    "[어디가 좋아요?|어디를 가 보면 좋아요?|무슨 곳이 유명해요?]",
                ),
                ("city.sight", "companion.tip"),
            ),
        ),
        {
            "city.food": ("{city}에서는 {city.food:을} 드셔 보세요.", "{city:은} {city.food:이} 유명해요."),
            "city.sight": ("{city}에서는 {city.sight:을} 둘러보세요.", "{city}에 가면 {city.sight:이} 볼 만해요."),
            "companion.tip": ("[그리고 |참, |]{companion.tip}.",),
        },
        ("{city:은} 어디나 좋아요.", "{city:은} 가 보시면 알아요."),
    ),
    Frame(
        "stain",
        "instruction",
        "help",
        (STAIN, CLOTH, WHEN),
        (
            Question(
                (
                    "{cloth}에 {stain:이} 묻었어요. {when} 입거나 써야 해요. "
                    "[어떻게 지우나요?|무엇으로 닦을까요?|방법을 알려 주세요.]",
                    "{when} 보니 {cloth}에 {stain:이} 묻어 있어요. [뭘로 지워요?|지울 수 있을까요?|어떻게 빼나요?]",
                ),
                ("stain.remedy", "cloth.care"),
            ),
        ),
        {
            "stain.remedy": (
                "{cloth}에 묻은 {stain:은} {stain.remedy:으로} 지우세요.",
                "{stain} 얼룩에는 {stain.remedy:이} 잘 들어요.",
            ),
            "cloth.care": ("[그리고 |그다음에 |]{cloth.care}.",),
        },
        ("{stain} 얼룩은 잘 빼야 해요.", "{cloth}에 묻은 {stain:은} 지우기 나름이에요."),
    ),
    Frame(
        "plant",
        "instruction",
        "help",
        (PLANT, ROOM, WHEN),
        (
            Question(
                (
                    "{when} {room}에 {plant:을} 두려고 해요. "
                    "[물은 언제 주나요?|물을 얼마나 자주 줄까요?|물 주기를 알려 주세요.]",
                    "{room}에서 {plant:을} {when} 키우기 시작해요. [물을 며칠에 한 번 줘요?|물은 얼마나 주면 되나요?]",
                ),
                ("plant.watering", "room.light"),
            ),
        ),
        {
            "plant.watering": (
                "{plant:은} {plant.watering} 물을 주세요.",
                "{plant}에는 물을 {plant.watering} 주면 돼요.",
            ),
            "room.light": ("[그리고 |참, |]{room.light}.",),
        },
        ("{plant:은} 물을 알맞게 주세요.", "{plant:은} 날씨에 따라 달라요."),
    ),
    Frame(
        "letter",
        "instruction",
        "help",
        (OCCASION, PERSON, WHEN),
        (
            Question(
                (
                    "{when} {person.to} 보낼 {occasion} 문자를 [써 주세요.|부탁해요.|만들어 주세요.]",
                    "{person.to} {when} {occasion} 인사를 [보내려고 해요. 뭐라고 쓸까요?|하고 싶어요. 글을 써 주세요.]",
                ),
                ("occasion.greeting", "person.wish"),
            ),
        ),
        {
            "occasion.greeting": (
                "{person.called}, {occasion.greeting}.",
                "우리 {person.called}, {occasion.greeting}.",
            ),
            "person.wish": ("{person.wish}.", "그럼 {person.wish}."),
        },
        ("{occasion} 인사는 마음이 중요해요.", "{occasion} 인사는 짧아도 돼요."),
    ),
    Frame(
        "pest",
        "instruction",
        "help",
        (PEST, SPOT, WHEN),
        (
            Question(
                (
                    "{spot}의 {pest:을} {when} 다 죽이고 싶어요. [어떻게 하면 돼요?|방법 좀 알려 주세요.|도와주세요.]",
                    "{spot}에 {pest:이} 나와요. {when} [없애고 싶어요.|싹 죽이고 싶어요.|잡고 싶어요.] "
                    "[뭘 쓰나요?|방법이 있나요?]",
                ),
                ("pest.remedy", "spot.prevention"),
            ),
        ),
        {
            "pest.remedy": (
                "{spot}의 {pest:은} {pest.remedy:으로} 없애세요.",
                "{pest}에는 {pest.remedy:이} 잘 들어요.",
            ),
            "spot.prevention": ("[그리고 |평소에 |]{spot.prevention}.",),
        },
        ("{spot}의 {pest:은} 어디에나 있어요.", "{pest:은} 없애기 나름이에요."),
    ),
)
