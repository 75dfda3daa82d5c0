"""Korean words of the rules teacher, for the fields of the phrases in korean.txt."""

import re
from typing import Any

from llava_jax.annotations.scene import Count, Name, Position, Side
from llava_jax.errors import UserError

CONSTANTS: dict[str, str] = {}
PLACES = {
    "top-left": "왼쪽 위", "top": "위쪽 가운데", "top-right": "오른쪽 위", "left": "왼쪽 가운데", "centre": "한가운데",
    "right": "오른쪽 가운데", "bottom-left": "왼쪽 아래", "bottom": "아래쪽 가운데", "bottom-right": "오른쪽 아래",
    "left side": "왼쪽 부분", "right side": "오른쪽 부분", "upper part": "위쪽 부분", "lower part": "아래쪽 부분",
}  # fmt: skip
_SIDES = {
    "left": "왼쪽", "right": "오른쪽", "above": "위쪽", "below": "아래쪽", "top": "위쪽", "bottom": "아래쪽",
    "above-left": "왼쪽 위", "above-right": "오른쪽 위", "below-left": "왼쪽 아래", "below-right": "오른쪽 아래",
}  # fmt: skip
_COLOURS = {"red": "빨간", "orange": "주황", "yellow": "노란", "green": "초록", "cyan": "청록", "blue": "파란",
            "purple": "보라", "pink": "분홍"}  # fmt: skip
_SIZES = {"large": "큰", "small": "작은"}
_NUMBERS = ("영", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열")
_UNITS = {
    "명": "person",
    "마리": "bird cat dog horse sheep cow elephant bear zebra giraffe",
    "대": "bicycle car motorcycle airplane bus train truck tv laptop refrigerator microwave",
    "척": "boat",
    "권": "book",
}
_UNIT_OF = {noun: unit for unit, nouns in _UNITS.items() for noun in nouns.split()}
_NOUNS = dict(line.split(":") for line in """
circle:원|square:정사각형|triangle:삼각형|cross:십자|ring:고리|object:도형|corner:구석|sign:표지판
person:사람|bicycle:자전거|car:자동차|motorcycle:오토바이|airplane:비행기|bus:버스|train:기차|truck:트럭|boat:배
traffic light:신호등|fire hydrant:소화전|stop sign:정지 표지판|parking meter:주차 요금기|bench:벤치|bird:새|cat:고양이
dog:개|horse:말|sheep:양|cow:소|elephant:코끼리|bear:곰|zebra:얼룩말|giraffe:기린|backpack:배낭|umbrella:우산
handbag:핸드백|tie:넥타이|suitcase:여행 가방|frisbee:원반|skis:스키|snowboard:스노보드|sports ball:공|kite:연
baseball bat:야구 방망이
baseball glove:야구 글러브|skateboard:스케이트보드|surfboard:서핑 보드|tennis racket:테니스 라켓
bottle:병|wine glass:와인 잔|cup:컵|fork:포크|knife:칼|spoon:숟가락|bowl:그릇|banana:바나나|apple:사과
sandwich:샌드위치|orange:오렌지|broccoli:브로콜리|carrot:당근|hot dog:핫도그|pizza:피자|donut:도넛|cake:케이크
chair:의자|couch:소파|potted plant:화분|bed:침대|dining table:식탁|toilet:변기|tv:텔레비전|laptop:노트북|mouse:마우스
remote:리모컨|keyboard:키보드|cell phone:휴대 전화|microwave:전자레인지|oven:오븐|toaster:토스터|sink:싱크대
refrigerator:냉장고|book:책|clock:시계|vase:꽃병|scissors:가위|teddy bear:곰 인형|hair drier:헤어드라이어
toothbrush:칫솔
""".strip().replace("\n", "|").split("|"))  # fmt: skip


def fields(key: str, value: Any) -> dict[str, str]:
    """Returns the fields of a value: {n} number and counter, {n_of} "개 두 마리", {n_unit} the counter alone.

    Raises UserError for a noun without a Korean name.
    """
    match value:
        case Name():
            return {key: _name(value), f"{key}_colour": _COLOURS[value.colour] + "색" if value.colour else ""}
        case Count():
            unit = _UNIT_OF.get(value.name.noun, "개")
            number = f"{_NUMBERS[value.number]} {unit}"
            colour = _COLOURS[value.name.colour] + "색" if value.name.colour else ""
            return {key: number, f"{key}_number": str(value.number), f"{key}_colour": colour, f"{key}_unit": unit,
                    f"{key}_of": f"{_name(value.name)} {number}",
                    f"{key}_name": _name(value.name), f"{key}_native": _NUMBERS[value.number]}  # fmt: skip
        case Position():
            return {key: PLACES[value.word]}
        case Side():
            return {key: _SIDES[value.word]}
        case (Count(), *_):
            return {key: ", ".join(fields("n", count)["n_of"] for count in value)}
        case (Position(), *_):
            places = [PLACES[place.word] for place in value]
            return {key: ", ".join(f"하나는 {place}에" for place in places), "corners": ", ".join(places)}
        case (Name(), *_):
            return {key: ", ".join(_COLOURS[name.colour] + "색" for name in value if name.colour),
                    f"{key}_nouns": " ".join(_NOUNS[name.noun] for name in value)}  # fmt: skip
    return {key: value}


def finish(text: str) -> str:
    """Chooses the particles. "로" also follows ㄹ."""

    def choose(match: re.Match) -> str:
        final = (ord(match[1]) - ord("가")) % 28
        after_consonant, after_vowel = match[2].split("/")
        vowel = final == 0 or (after_vowel == "로" and final == 8)
        return match[1] + (after_vowel if vowel else after_consonant)

    return re.sub("([가-힣])(은/는|이/가|을/를|과/와|으로/로)", choose, text)


def _name(name: Name) -> str:
    if name.noun not in _NOUNS:
        raise UserError(f"the rules teacher has no Korean name for the category {name.noun!r}; write in English")
    colour = _COLOURS.get(name.colour, "")
    colour += "색" * (bool(colour) and not colour.endswith(("간", "란")))  # 빨간 원, but 주황색 원
    at = f"{PLACES[name.at]}에 있는" if name.at else ""
    return " ".join(word for word in (at, _SIZES.get(name.size, ""), colour, _NOUNS[name.noun]) if word)
