"""Names of languages, and a check whether a text is in a language.

A teacher that is asked for another language may answer in English. The check therefore compares scripts, and among
languages in Latin letters English with all others. It does not distinguish French from Spanish.
"""

import difflib
import re
import unicodedata
from collections import Counter

from llava_jax.errors import UserError

LATIN = {
    "af": "Afrikaans", "az": "Azerbaijani", "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh",
    "da": "Danish", "de": "German", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay",
    "mt": "Maltese", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "pt-br": "Brazilian Portuguese", "ro": "Romanian", "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian",
    "sv": "Swedish", "sw": "Swahili", "tl": "Tagalog", "tr": "Turkish", "uz": "Uzbek", "vi": "Vietnamese",
    "yo": "Yoruba", "zu": "Zulu",
}
NON_LATIN = {  # name, and names of scripts in Unicode
    "am": ("Amharic", "ETHIOPIC"), "ar": ("Arabic", "ARABIC"), "be": ("Belarusian", "CYRILLIC"),
    "bg": ("Bulgarian", "CYRILLIC"), "bn": ("Bengali", "BENGALI"), "el": ("Greek", "GREEK"),
    "fa": ("Persian", "ARABIC"), "gu": ("Gujarati", "GUJARATI"), "he": ("Hebrew", "HEBREW"),
    "hi": ("Hindi", "DEVANAGARI"), "hy": ("Armenian", "ARMENIAN"), "ja": ("Japanese", "HIRAGANA KATAKANA CJK"),
    "ka": ("Georgian", "GEORGIAN"), "kk": ("Kazakh", "CYRILLIC"), "km": ("Khmer", "KHMER"),
    "kn": ("Kannada", "KANNADA"), "ko": ("Korean", "HANGUL"), "lo": ("Lao", "LAO"), "mk": ("Macedonian", "CYRILLIC"),
    "ml": ("Malayalam", "MALAYALAM"), "mn": ("Mongolian", "CYRILLIC"), "mr": ("Marathi", "DEVANAGARI"),
    "my": ("Burmese", "MYANMAR"), "ne": ("Nepali", "DEVANAGARI"), "pa": ("Punjabi", "GURMUKHI"),
    "ru": ("Russian", "CYRILLIC"), "si": ("Sinhala", "SINHALA"), "sr": ("Serbian", "CYRILLIC LATIN"),
    "ta": ("Tamil", "TAMIL"), "te": ("Telugu", "TELUGU"), "th": ("Thai", "THAI"), "uk": ("Ukrainian", "CYRILLIC"),
    "ur": ("Urdu", "ARABIC"), "zh": ("Chinese", "CJK"), "zh-tw": ("Traditional Chinese", "CJK"),
}
LANGUAGES = {code: (name, ("LATIN",)) for code, name in LATIN.items()}
LANGUAGES |= {code: (name, tuple(scripts.split())) for code, (name, scripts) in NON_LATIN.items()}

ENGLISH = frozenset(
    "the and of is are to with this that it its they their there for from by at as has have be which she he his what"
    " how who would could might each while into be was were there's it's you can see two three four".split()
)
"""Frequent English words that other languages hardly have."""
ENGLISH_SHARE = 0.12
"""Minimum fraction of these words in an English text. Other languages have fewer."""
MIN_WORDS, MIN_LETTERS = 12, 12
"""Length of a text below which its language cannot be checked."""


def language_name(code: str) -> str:
    """Returns the English name of a code: "ko" is Korean. Raises UserError, one line, for an unknown code."""
    if code in LANGUAGES:
        return LANGUAGES[code][0]
    names = {name.lower(): known for known, (name, _) in LANGUAGES.items()}
    near = difflib.get_close_matches(code.lower(), [*names, *LANGUAGES], n=1)
    hint = f"; did you mean {names.get(near[0], near[0])}?" if near else f"; known are {', '.join(sorted(LANGUAGES))}"
    raise UserError(f"{code!r} is no code of a language{hint}")


def is_language(text: str, code: str) -> bool:
    """Whether a text is in the language. Returns True if the text is too short to decide.

    At least a third of its letters must be of the language's script, because names, brands and signs may be in another.
    In Latin letters, frequent English words distinguish English. Japanese has kana, and Chinese hardly any.
    """
    letters = [character for character in text if character.isalpha()]
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0] for letter in letters)
    expected = LANGUAGES[code][1]
    if len(letters) < MIN_LETTERS:
        # A word or two: a quoted sign, a brand. Of another script than Latin, it is another language's.
        return not letters or sum(scripts[script] for script in (*expected, "LATIN")) > 0
    if 3 * sum(scripts[script] for script in expected) < len(letters):
        return False
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if code == "ja" or expected == ("CJK",):
        return (kana > 0.05 * len(letters)) == (code == "ja")
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    if "LATIN" not in expected or len(words) < MIN_WORDS:
        return True
    share = sum(word in ENGLISH for word in words) / len(words)
    return share >= ENGLISH_SHARE / 2 if code == "en" else share < ENGLISH_SHARE
