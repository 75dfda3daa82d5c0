"""The VQA challenge normalizes short answers before it compares them: numbers, articles, punctuation, contractions.

The rules are those of the challenge's Python tools and of the answer processor in Pythia and LLaVA. Apparent
mistakes are part of the rules.
"""

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8",
               nine="9", ten="10")
ARTICLES = ("a", "an", "the")

# The challenge's table without its four words with a capital I, which no word in lower case equals.
CONTRACTIONS = dict(pair.split(":") for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've
it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've
mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't
ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's
shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd
someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've
weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd
wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've
whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've
wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've
y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
""".split())

_digit_comma = re.compile(r"\d,\d")
_period = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32
"""Number of removed periods: the original passes the flag re.UNICODE, which is 32, to `sub` as the count."""


def process(answer: str) -> str:
    """Returns the form in which LLaVA compares answers (TextVQA) and uploads them (VQAv2, VizWiz)."""
    return challenge_form(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def challenge_form(answer: str) -> str:
    """Returns the form that the VQA challenge's own tool gives an uploaded answer."""
    return words(punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def punctuation(text: str) -> str:
    """Replaces every mark by a blank, and removes the first 32 periods that no digit follows.

    A mark is removed instead if it occurs beside a blank anywhere in the text, or if the text has a comma between
    digits.
    """
    joined = _digit_comma.search(text) is not None
    out = text
    for mark in MARKS:
        beside_blank = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if joined or beside_blank else " ")
    return _period.sub("", out, count=MAX_PERIODS)


def words(text: str) -> str:
    """Returns the text in lower case, with digits for numbers up to ten, apostrophes, and no articles."""
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the VQA score from 0 to 1 (Antol et al. 2015).

    With each reference left out in turn, every other reference that equals the answer gives a third, at most 1 in all.
    The score is the mean of these values.
    """
    same = sum(reference == answer for reference in references)
    return sum(min(1, (same - (reference == answer)) / 3) for reference in references) / len(references)
