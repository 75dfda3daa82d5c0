"""Which language a few sentences are in; every sentence here was written for the test."""

import itertools

import pytest

from llava_jax.errors import UserError
from llava_jax.synthesize.language import LANGUAGES, is_language, language_name

SENTENCES = {
    "en": "There are two dogs in the picture. The man in the red jacket is riding a skateboard down a ramp. Sushi,"
          " ramen and a cappuccino stand on the table in front of a patisserie.",
    "fr": "Il y a deux chiens sur la photo. L'homme à la veste rouge descend une rampe en skateboard. Non, il n'y a pas"
          " de chat sur le canapé.",
    "de": "Auf dem Bild sind zwei Hunde zu sehen. Der Mann in der roten Jacke fährt mit dem Skateboard eine Rampe"
          " hinunter. Nein, auf dem Sofa liegt keine Katze.",
    "es": "Hay dos perros en la imagen. El hombre de la chaqueta roja baja una rampa en monopatín. No, no hay ningún"
          " gato en el sofá.",
    "nl": "Er staan twee honden op de foto. De man met de rode jas rijdt op een skateboard van een helling. Nee, er"
          " ligt geen kat op de bank.",
    "pl": "Na zdjęciu są dwa psy. Mężczyzna w czerwonej kurtce zjeżdża z rampy na deskorolce. Na kanapie nie ma kota.",
    "vi": "Trong ảnh có hai con chó. Người đàn ông mặc áo khoác đỏ đang trượt ván. Không có con mèo nào trên ghế.",
    "id": "Ada dua ekor anjing di gambar itu. Pria berjaket merah itu meluncur dengan papan luncur. Tidak ada kucing.",
    "ru": "На фотографии две собаки. Мужчина в красной куртке едет на скейтборде. Нет, на диване нет кошки.",
    "ar": "هناك كلبان في الصورة. الرجل ذو السترة الحمراء يركب لوح التزلج. لا، لا توجد قطة على الأريكة.",
    "hi": "तस्वीर में दो कुत्ते हैं। लाल जैकेट वाला आदमी स्केटबोर्ड चला रहा है।",
    "ko": "사진에는 개 두 마리가 있습니다. 빨간 재킷을 입은 남자가 스케이트보드를 타고 있습니다.",
    "ja": "写真には犬が二匹います。赤いジャケットを着た男性がスケートボードに乗っています。",
    "zh": "图片中有两只狗。穿红色夹克的男人正在滑滑板。沙发上没有猫。",
    "th": "ในภาพมีสุนัขสองตัว ผู้ชายใส่เสื้อแจ็คเก็ตสีแดงกำลังเล่นสเก็ตบอร์ด",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_every_language_against_every_other(code):
    text = SENTENCES[code]
    for other in SENTENCES:
        same_script = LANGUAGES[code][1] == LANGUAGES[other][1] == ("LATIN",)
        told_apart = "en" in (code, other) or not same_script
        assert is_language(text, other) == (code == other or not told_apart), other


def test_one_sentence_in_english_is_seen_in_any_other_language():
    english = "The man on the left is holding a large umbrella while he waits for the bus to arrive."
    assert [code for code in LANGUAGES if is_language(english, code)] == ["en"]


def test_names_and_signs_in_another_script_do_no_harm():
    assert is_language("표지판에는 “STOP”이라고 적혀 있고, 그 옆에 Coca-Cola 광고판이 보입니다.", "ko")
    assert is_language("The sign reads 出口, which means exit, and hangs above the door of the station.", "en")
    assert is_language("車は Toyota Land Cruiser です。とても大きいです。", "ja")


def test_what_is_too_short_to_tell():
    for text, code in itertools.product(["", "42.", "OK", "Coca-Cola"], LANGUAGES):
        assert is_language(text, code), (text, code)
    assert is_language("Ein roter Bus.", "en") and is_language("Two dogs.", "fr")
    assert not is_language("개 두 마리.", "en") and not is_language("两只狗", "ko")


def test_names():
    assert language_name("ko") == "Korean" and language_name("pt-br") == "Brazilian Portuguese"
    for wrong, near in (("korean", "ko"), ("KO", "ko"), ("kr", None), ("german", "de"), ("xyzzy", None)):
        message = f"did you mean {near}\\?" if near else "is no code of a language"
        with pytest.raises(UserError, match=message) as error:
            language_name(wrong)
        assert "\n" not in str(error.value)


def test_a_few_words_of_latin_letters_are_not_told_apart():
    assert is_language("Red double-decker bus, London.", "en") and is_language("The dog is on the sofa.", "fr")
    assert not is_language("The dog is on the sofa and looks out of the window at the rain.", "fr")
