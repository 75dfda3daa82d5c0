"""Names of languages, and whether a text is in one of them.

A teacher that is asked for another language fails in one way: it answers in English. What has to be told apart is
therefore the script, and among languages in Latin letters English from the others; not French from Spanish.
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
OTHERS = {  # name, and scripts as Unicode calls them
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
LANGUAGES |= {code: (name, tuple(scripts.split())) for code, (name, scripts) in OTHERS.items()}

# Frequent English words that other languages hardly have.
ENGLISH = frozenset(
    "the and of is are to with this that it its they their there for from by at as has have be which she he his what"
    " how who would could might each while into be was were there's it's you can see two three four".split()
)
ENGLISH_SHARE = 0.12  # of the words of an English text these are at least so many; of others, fewer
WORDS_TO_TELL = 12
LETTERS_TO_TELL = 12


def language_name(code: str) -> str:
    """The English name: "ko" is Korean. UserError, one line, for a code that is none."""
    if code in LANGUAGES:
        return LANGUAGES[code][0]
    names = {name.lower(): known for known, (name, _) in LANGUAGES.items()}
    near = difflib.get_close_matches(code.lower(), [*names, *LANGUAGES], n=1)
    hint = f"; did you mean {names.get(near[0], near[0])}?" if near else f"; known are {', '.join(sorted(LANGUAGES))}"
    raise UserError(f"{code!r} is no code of a language{hint}")


def is_language(text: str, code: str) -> bool:
    """Whether a text of one or more sentences is in the language; True where it is too short to tell.

    At least a third of its letters are of the language's script: names, brands and what signs say may be in another. In
    Latin letters, frequent English words tell English from the rest; Japanese has kana, and Chinese hardly any.
    """
    letters = [character for character in text if character.isalpha()]
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0] for letter in letters)
    expected = LANGUAGES[code][1]
    if len(letters) < LETTERS_TO_TELL:
        # A word or two: a quoted sign, a brand. Of another script than Latin, it is another language's.
        return not letters or sum(scripts[script] for script in (*expected, "LATIN")) > 0
    if 3 * sum(scripts[script] for script in expected) < len(letters):
        return False
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if code == "ja" or expected == ("CJK",):
        return (kana > 0.05 * len(letters)) == (code == "ja")
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    if "LATIN" not in expected or len(words) < WORDS_TO_TELL:
        return True
    share = sum(word in ENGLISH for word in words) / len(words)
    return share >= ENGLISH_SHARE / 2 if code == "en" else share < ENGLISH_SHARE
