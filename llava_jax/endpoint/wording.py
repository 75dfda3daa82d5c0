"""Wording that reveals a text-only teacher: refusals, mentions of captions and boxes, questions with their answer.

The data must read as if the writer saw the image. Words that can be about something in the image are accepted unless
they refer to a source: "the caption says" is found, "a caption on the poster" is not.
"""

import re


def find_refusal(text: str) -> str | None:
    """Returns the words by which a text refuses to answer, or says that its writer sees nothing; otherwise None."""
    found = REFUSAL.search(text)
    return found and f'it says "{found[0]}"'


def find_source(text: str) -> str | None:
    """Returns the words by which a text mentions captions, boxes, coordinates or a given description, or None."""
    for what, pattern in SOURCE.items():
        if found := pattern.search(text):
            return f'it tells of {what}: "{found[0]}"'
    return None


def find_leak(kind: str, question: str, answer: str) -> str | None:
    """Returns how an English question gives its answer away, or None.

    - It asks for agreement: "The bus is red, isn't it?"
    - It contains everything that a short answer says, and asks neither for yes or no nor for one of two: "What colour
      is the red bus?" "The bus is red."
    - A complex question describes the image in a sentence of its own before it asks.
    """
    if TAG.search(question):
        return f"the question wants to be agreed with: {question:.80}"
    asked, answered = _words(question), _words(answer)
    choice = "or" in asked or (asked and asked[0] in AUXILIARY)
    content = set(answered) - EMPTY_WORDS
    if not choice and len(answered) <= SHORT_ANSWER and content and content <= set(asked):
        return f"the question has all that the answer says: {question:.80}"
    if kind == "complex_reasoning":
        for sentence in re.split(r"(?<=[.!?])\s+", question):
            if sentence.endswith(".") and len(_words(sentence)) >= TELLING and not INVITING.match(sentence):
                return f"the question describes the image: {sentence:.80}"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower().replace("’", "'"))


def _any(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns), re.I)


SHORT_ANSWER = 12  # words
TELLING = 5  # words of a sentence that tells something
TAG = _any(r", (?:is|are|was|were|do|does|did|has|have|ca)n['’]t (?:it|he|she|they|there|we)\?$",
           r", (?:right|correct)\?$")
INVITING = _any(r"(?:imagine|consider|suppose|think|assume|look|given|if|explain|describe|discuss|tell|what|how|why)\b")
AUXILIARY = frozenset("""
    is are was were do does did can could has have had will would should may might isn't aren't""".split())
EMPTY_WORDS = frozenset("""
    a an and are as at be been being by can could did do does for from had has have he her here his how i image in is
    it its of on or picture photo scene she that the their them there these they this those to was we were what when
    where which who whom whose why will with would you your very visible shown seen appears appear seems
    located""".split())

REFUSAL = _any(
    r"\bas an? (?:\w+[ -]){0,2}(?:AI|language) (?:language )?(?:model|assistant)\b",
    r"\bI(?:['’]m| am) (?:just |only )?an? (?:\w+[ -]){0,2}(?:AI|language model)\b",
    r"\bI(?:['’]m| am) (?:very |really )?sorry,? but\b",
    r"\bI (?:can(?:no|['’])t|am (?:not able|unable) to|do(?: not|n['’]t)) (?:actually |directly )?"
    r"(?:see|view|access|look at|process|have access to) (?:the |this |any |your |actual )*(?:image|picture|photo)s?\b",
    r"\bI (?:can(?:no|['’])t|am (?:not able|unable) to) (?:assist|help|comply|fulfil|provide (?:that|this|a desc))",
    r"죄송하지만|(?:AI|언어) ?모델(?:로서|이므로|이기)|이미지를 (?:직접 )?볼 수(?:가)? 없",
)

# Of a source, not of something that is seen.
_THE = (r"\b(?:image |in |(?:the|these|those|this|that|each|all|both|your|given|provided|five|four|several|first|second"
        r"|third|above|other) (?:\w+ )?)")
_SHOWN = (r"(?! (?:on|under|underneath|below|beneath|above|beside|across|at the|printed|written|painted|in (?:bold"
          r"|white|black|large|small|red|speech))\b)")
_TEXT = r"(?:descriptions?|annotations?|metadata|sentences|information|details|data|context|text)"
_SAYS = (r"(?:say|mention|provide|indicate|state|suggest|describe|note|specif|confirm|impl(?:y|ie)|tell|do not|don['’]t"
         r"|does not|doesn['’]t)")
_NUMBER = r"(?:[01]?\.\d+|[01])"
_ON_A_MAP = r"(?! (?:on|of) (?:an? |the )?(?:map|chart|screen|display|ship|place|city|island|station))"

SOURCE = {
    "captions": _any(
        rf"{_THE}caption\b{_SHOWN}", rf"\bcaptions\b{_SHOWN}",
        "캡션|キャプション|Bildunterschrift|Bildbeschreibung", r"\b(?:les légendes|las leyendas|as legendas)\b",
    ),
    "a bounding box": _any(
        r"\bbounding[ -]?box|\bbbox", "경계 ?(?:상자|박스)|바운딩 ?박스|边界框|邊界框|バウンディング|境界ボックス",
        r"\b(?:Begrenzungsrahmen|boîtes? englobantes?|cuadros? delimitador|caixas? delimitadora)",
    ),
    "coordinates": _any(
        r"\b(?:the|these|those|its|their|given|provided|exact|object|image|pixel|box|normali[sz]ed|by|with|[xy]) "
        rf"coordinates?\b{_ON_A_MAP}(?! (?:the|her|his|with|to)\b)",
        rf"\bcoordinates\b{_ON_A_MAP} (?:of|for|provided|given|indicate|show|suggest|are|place)\b",
        r"\bcoordinates:? ?[\[(]",
        "좌표|坐标|坐標|座標|координат", r"\b(?:die|den|der|anhand von) Koordinaten\b",
        r"\b(?:les coordonnées|las coordenadas|as coordenadas)\b",
    ),
    "a description that was given": _any(
        rf"\b(?:the|this|these|your) (?:(?:given|provided|image|scene|textual|above) )*(?:descriptions?|annotations?"
        rf"|metadata) {_SAYS}",
        rf"\b(?:given|provided) (?:image |scene )?{_TEXT}\b",
        r"\b(?:textual|accompanying) (?:image |scene )?(?:descriptions?|annotations?|information)\b",
        rf"\b{_TEXT} (?:that (?:is|are|was|were) )?(?:provided|given)\b(?! (?:by|to|on)\b)",
        r"\b(?:based on|according to|from) the (?:image |scene )?(?:descriptions?|annotations?|metadata)\b"
        r"(?! (?:on|under|beside)\b)",
        rf"\b(?:mentioned|specified|described|stated|listed) in the (?:image |scene )?{_TEXT}\b",
        "(?:제공된|주어진) (?:이미지 )?(?:설명|정보|문장|텍스트)|설명에 (?:따르면|의하면|나와)",
        "根(?:据|據)(?:提供的|给定的|图像|图片)?(?:描述|信息|说明)",
    ),
    "an object detector": _any(
        r"\bobject detect(?:ion|or)s?\b", r"\b(?:the|all) detected (?:object|person|people|item|box)", r"\(crowd\)"),
    "numbers of a box": _any(
        rf"[\[(]\s*{_NUMBER}\s*(?:[,;]\s*{_NUMBER}\s*){{2,}}[\])]", r"\b0\.\d+, 0\.\d+, (?:0\.\d|1\.0)"),
    "a token of the format": _any(r"<image>|</?s>|<\|[a-z_]+\|>|<im_(?:start|end|patch)>"),
}
