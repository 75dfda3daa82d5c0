"""Statements that are general, supposed or compared, and therefore claim nothing about the image."""

import re

from llava_jax.annotations.vocabulary import NUMBERS
from llava_jax.synthesize.evidence.reading import DETERMINERS, Mention, Sentence

_PICTURE = re.compile(
    r"\b(?:picture|image|photo|photograph|scene|frame|view|shot|background|foreground|there (?:is|are)|seen|visible"
    r"|seems?|appears?|shown|shows|depict\w*|present|located|positioned|situated|placed|left|right|top|bottom|middle"
    r"|centre|center|upper|lower|above|below|higher|corner|half|colou?r|shape|size|sees?|finds?|found|look|count|larger"
    r"|smaller|nearer|further|same|share|agree|both|among|are there|speaks for|better choice)\b"
)
_ASKS_IN_GENERAL = re.compile(
    r"\b(?:might|could|would|should|benefits?|purposes?|advice|tips?|titles?|author|explain|explanation|history|rules"
    r"|differences?|discuss\w*|usually|typically|generally|in general|concerns?|importance|recipe|steps|precautions?"
    r"|why|how (?:do|does|can|to)|what (?:are|is) (?:some|the (?:role|function|point)))\b"
)
_GENERAL = re.compile(
    r"\b(?:popular|commonly|traditional\w*|historical\w*|worldwide|around the world|known (?:as|for|to)"
    r"|used (?:to|for|as)|in (?:the past|general|nature)|tends? to|importance of|in order to|essential (?:for|to)"
    r"|crucial|in (?:some|many) (?:countries|cultures|places|cases|destinations)|concerns? (?:about|regarding)"
    r"|for (?:[a-z§0-9]+ ){1,4}to [a-z]+ (?:[a-z]+ )?§)"
)
_BEFORE = re.compile(
    r"\b(?:or|each|every|regarding|concerning|about|different from|instead of|as [a-z]+ as|(?:serv|act|function)\w* as"
    r"|(?:drawing|painting|statue|sculpture|print|motif|pattern|logo|cartoon|illustration|figurine|silhouette"
    r"|style|sound|smell|taste|idea|world|age|treatment|type|kind)s? of),? $"
)
_COMPARED = re.compile(r"\b(?:unlike|compared (?:to|with)|than|(?:similar|akin) to|(?:shape|form) of) $")
_AFTER = re.compile(r" ?,? or §|'s?\b")
_MANY_OF = re.compile(
    r"\b(?:numerous|many|multiple|various|few|of|with|more|fewer|most|some|other|including|includes?|features?|contains?"
    r"|shows?|has|have|are|wearing|holding|carrying|see) $"
)
_BEGINS = re.compile(r"(?:^|[.,;:] |\b(?:and|but|because|since|that|when|while|where|as|if|which) )$")
_OBSERVED = re.compile(
    r" (?:also |still |clearly )?(?:(?:is|are|was|were) (?:also |all |both |clearly )?(?:[a-z]+ing|visible|seen|present"
    r"|shown|scattered|placed|lined|parked|gathered|arranged|spread|located|positioned|situated|stacked|mounted|filled|in"
    r"|on|at|near|next|around|behind|under|above|below|beside|between|to)\b"
    r"|can be|sit|stand|lie|walk|run|drive|graze|hang|wait|surround|line|fill|dot|rest)s?\b"
)
_ANYONE = frozenset("person people human humans individual individuals adult adults tourist tourists".split())


def is_general(asked: Sentence, sentence: Sentence) -> bool:
    """Whether a sentence is about the world instead of the image, by its words or by its question."""
    if _GENERAL.search(sentence.marked) or _GENERAL.search(sentence.text.lower()):
        return True
    if sentence.marked.startswith("§0") and _is_bare(sentence.mentions[0]) and not is_claimed(sentence, 0):
        return True  # "dogs need exercise and balls"
    return bool(_ASKS_IN_GENERAL.search(asked.text.lower())) and not _PICTURE.search(sentence.marked)


def is_claimed(sentence: Sentence, index: int) -> bool:
    """Whether the sentence claims that its mention number `index` is in the image."""
    before, _, after = sentence.marked.partition(f"§{index}")
    mention = sentence.mentions[index]
    first, last = mention.text.split(" ")[0], mention.text.split(" ")[-1]
    if _BEFORE.search(before) or _AFTER.match(after):
        return False
    bare, one = _is_bare(mention), first in ("a", "an")
    if first in ("its", "any") or re.match("all (?!the|these|those|of)", mention.text) and mention.number is None:
        return False
    if (bare or one) and _COMPARED.search(before):
        return False
    if last in _ANYONE and mention.number is None and not mention.colours:  # "the person cares about health"
        return one and bool(_OBSERVED.match(after))
    if bare and not _MANY_OF.search(before) and _BEGINS.search(before):  # "dogs are loyal"
        return bool(_OBSERVED.match(after)) or bool(re.match(r",? (?:and )?§", after))
    return True


def _is_bare(mention: Mention) -> bool:
    """Whether no word in front of the name says which or how many."""
    return mention.number is None and mention.text.split(" ")[0] not in (*DETERMINERS, *NUMBERS)
