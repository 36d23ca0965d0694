"""The script a text is written in, the letters that its language has, and the short sample of it that tells."""

import functools
import unicodedata
from collections.abc import Sequence

import numba
import numpy as np

from llamita.data.strings import Strings

SAMPLE_BYTES = 600
UNWRITTEN = "Zyyy"  # ISO 15924: what all scripts share; here, no letter was met
KANA_SHARE = 0.1  # of kana and ideographs, from which on both are Japanese
_BLOCK = 16
_PIECES = 3

# Unicode, Blocks.txt, without its rarest: blocks begin and end at multiples of 16. ASCII is told letter by letter.
_RANGES = {
    "Latn": "00C0-02BF 1D00-1DBF 1E00-1EFF 2C60-2C7F A720-A7FF AB30-AB6F FB00-FB0F FF21-FF5F",
    "Grek": "0370-03FF 1F00-1FFF", "Cyrl": "0400-052F 1C80-1C8F 2DE0-2DFF A640-A69F", "Armn": "0530-058F",
    "Hebr": "0590-05FF FB20-FB4F",
    "Arab": "0600-06FF 0750-077F 0870-08FF FB50-FDFF FE70-FEFF", "Syrc": "0700-074F 0860-086F", "Thaa": "0780-07BF",
    "Nkoo": "07C0-07FF", "Deva": "0900-097F A8E0-A8FF", "Beng": "0980-09FF", "Guru": "0A00-0A7F", "Gujr": "0A80-0AFF",
    "Orya": "0B00-0B7F", "Taml": "0B80-0BFF", "Telu": "0C00-0C7F", "Knda": "0C80-0CFF", "Mlym": "0D00-0D7F",
    "Sinh": "0D80-0DFF", "Thai": "0E00-0E7F", "Laoo": "0E80-0EFF", "Tibt": "0F00-0FFF",
    "Mymr": "1000-109F A9E0-A9FF AA60-AA7F", "Geor": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "Hang": "1100-11FF 3130-318F A960-A97F AC00-D7FF", "Ethi": "1200-139F 2D80-2DDF AB00-AB2F",
    "Cher": "13A0-13FF AB70-ABBF", "Cans": "1400-167F 18B0-18FF", "Tglg": "1700-171F", "Khmr": "1780-17FF",
    "Mong": "1800-18AF", "Olck": "1C50-1C7F", "Tfng": "2D30-2D7F", "Bopo": "3100-312F 31A0-31BF", "Yiii": "A000-A4CF",
    "Vaii": "A500-A63F", "Java": "A980-A9DF", "Adlm": "1E900-1E95F", "Jpan": "3040-30FF 31F0-31FF FF60-FF9F",
    "Hani": "2E80-2FDF 3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF",
}  # fmt: skip
SCRIPTS = (UNWRITTEN, *_RANGES)

# Letters of languages whose script others share too: those they have beyond _COMMON, then "-" and those of _COMMON that
# they lack but in names and foreign words. By the orthographies, and what is found instead of letters in old encodings.
_COMMON = (
    "abcdefghijklmnopqrstuvwxyz" "абвгдежзийклмнопрстуфхцчшщъыьэюяё" "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىيٱـپچژگکی"
    "ကခဂဃငစဆဇဈဉညဋဌဍဎဏတထဒဓနပဖဗဘမယရလဝသဟဠအဣဤဥဦဧဩဪဿ"
)  # fmt: skip
ALPHABETS = {
    "af": "áäèéêëíîïóôöúûüýŉ -qxz", "ar": "", "az": "əçğıöşüғәјҝөүһҹ -wщъ", "be": "іўʼ -ищъ", "bg": "ѝ -ыэё",
    "br": "âêîôûùñëéü -qx", "ca": "àçèéíïòóúüŀ -kw", "cs": "áčďéěíňóřšťúůýž -qwx", "cy": "âêîôûŵŷäëïöáéóúàèìò -kqvxz",
    "da": "åæøé -qwxz", "de": "äöüßéẞ", "en": "éèêëïöüàçñ", "eo": "ĉĝĥĵŝŭ -qwxy", "es": "áéíñóúüªº -kw",
    "et": "äõöüšž -cqwxy", "eu": "ñüç -cqvwy", "fa": "", "fi": "äöåšžé -cqwxz", "fo": "áðíóúýæø -cqwxz",
    "fr": "àâæçèéêëîïôœùûüÿñ -kw", "fy": "âêëéïôûúüöä -qx", "ga": "áéíóú -jkqvwxyz", "gd": "àèéìòóùáí -jkqvwxyz",
    "gl": "áéíñóúüï -jkwy", "ha": "ɓɗƙƴʼ -pqvx", "hr": "čćđšžђјљњћџ -qwxyйщъыьэюяё", "ht": "èòéàù -qx",
    "hu": "áéíóöőúüűõûô -qwx", "id": "é -qx", "ig": "ịọụńṅǹàáèéìíòóùú -qx", "is": "áðéíóúýþæö -cqwz",
    "it": "àèéìíîòóùú -jkwxy", "kk": "әғқңөұүһі", "ky": "ңөү", "la": "āēīōūæœë -kw", "lb": "äéëèêôüöâî",
    "lg": "ŋâ -qx", "lt": "ąčęėįšųūž -qwx", "lv": "āčēģīķļņšūžōŗ -qwxy", "mg": "àôñéèìò -cquwx",
    "mk": "ѓѕјљњќџѝѐ -йщъыьэюяё", "mn": "өү", "mt": "ċġħżàèìòùé -cy", "my": "", "nl": "éëïóöüèêàáíúç -qx",
    "no": "åæøéòóôêèàäö -qwxz", "pl": "ąćęłńóśźż -qvx", "ps": "ټډړښږګڼۍېځڅەےۀ", "pt": "áàâãçéêíóôõúüªº -kwy",
    "ro": "ăâîșțşţã -kqwy", "ru": "", "sk": "áäčďéíĺľňóôŕšťúýž -qwx", "sl": "čšžćđ -qwxy", "sn": "-lqx",
    "so": "ʼ -pvz", "sq": "çëâ -w", "st": "šōêô -xv", "sv": "åäöé -qwz", "sw": "-qx", "tg": "ғӣқӯҳҷ -цщыь",
    "tl": "ñáéíóúâêîôû", "tr": "çğıöşüâîûýþð -qwx", "tt": "әөүҗңһ", "uk": "ґєії -ъыэё", "ur": "ٹڈڑںھہےۓۂ",
    "uz": "ʻʼўқғҳ -wщы", "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ -fjwz", "xh": "",
    "yo": "àáèéẹìíòóọùúńǹṣḿ -cqvxz", "zu": "",
}  # fmt: skip
_SHARED = ("Latn", "Cyrl", "Arab", "Mymr")
_LETTERS_END = 0x2000


def _script_of_blocks() -> np.ndarray:
    """Which of SCRIPTS every 16 characters belong to, uint8 [0x110000 / 16]."""
    table = np.zeros(0x110000 // _BLOCK, np.uint8)
    for number, ranges in enumerate(_RANGES.values(), 1):
        for first, last in (span.split("-") for span in ranges.split()):
            table[int(first, 16) // _BLOCK : int(last, 16) // _BLOCK + 1] = number
    return table


_OF_BLOCK = _script_of_blocks()
_LATIN, _JAPANESE, _IDEOGRAPHS = (SCRIPTS.index(name) for name in ("Latn", "Jpan", "Hani"))


@numba.njit(cache=True, nogil=True)
def _char(data, i, end):
    """The character that begins at `data[i]`, and its bytes; 0 where its rest was cut off."""
    byte = data[i]
    if byte < 0x80:
        return np.int64(byte), 1
    width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    if i + width > end:
        return np.int64(0), end - i
    char = np.int64(byte) & (0x3F >> (width - 1))
    for k in range(1, width):
        char = char << 6 | (data[i + k] & 0x3F)
    return char, width


@numba.njit(cache=True, nogil=True)
def _copied(data, start, end, out, at):
    """Characters of `data[start:end]` to `out` from `at` on, controls and noncharacters as spaces. Returns where it
    ends."""
    while start < end and data[start] & 0xC0 == 0x80:
        start += 1
    i = start
    while i < end:
        char, width = _char(data, i, end)
        is_control = (char < 0x20 and char != 9 and char != 10) or 0x7F <= char <= 0x9F
        if is_control or 0xFDD0 <= char <= 0xFDEF or char & 0xFFFE == 0xFFFE:
            out[at], at = 0x20, at + 1
        else:
            for k in range(width):
                out[at + k] = data[i + k]
            at += width
        i += width
    return at


@numba.njit(cache=True, nogil=True)
def _sampled(data, offsets, size):
    ends = np.zeros(len(offsets), np.int64)
    room = 0
    for d in range(len(offsets) - 1):
        room += min(offsets[d + 1] - offsets[d], size + _PIECES)
    out, at = np.empty(room, np.uint8), 0
    for d in range(len(offsets) - 1):
        start, length = offsets[d], offsets[d + 1] - offsets[d]
        if length <= size:
            at = _copied(data, start, start + length, out, at)
        else:
            for piece in range(_PIECES):
                begin = start + piece * (length - size // _PIECES) // (_PIECES - 1)
                at = _copied(data, begin, begin + size // _PIECES, out, at)
                out[at], at = 0x0A, at + 1
        ends[d + 1] = at
    return out[:at], ends


def sampled(strings: Strings, num_bytes: int = SAMPLE_BYTES) -> Strings:
    """Each text, or where it is longer than `num_bytes` as much of its start, middle and end, a line each.

    Whole characters; control characters but tab and line feed, and noncharacters, become spaces.
    """
    return Strings(*_sampled(strings.data, strings.offsets, num_bytes))


@numba.njit(cache=True, nogil=True)
def _dominant(data, offsets, of_block):
    found = np.zeros(len(offsets) - 1, np.uint8)
    for d in range(len(found)):
        counts = np.zeros(len(SCRIPTS), np.int64)
        i = offsets[d]
        while i < offsets[d + 1]:
            char, width = _char(data, i, offsets[d + 1])
            if char >= 0x80:
                counts[of_block[char // _BLOCK]] += 1
            elif 0x61 <= char | 0x20 <= 0x7A:
                counts[_LATIN] += 1
            i += width
        if counts[_JAPANESE] > KANA_SHARE * (counts[_JAPANESE] + counts[_IDEOGRAPHS]):
            counts[_JAPANESE] += counts[_IDEOGRAPHS]
        counts[0] = 0
        found[d] = counts.argmax()
    return found


def scripts(strings: Strings) -> list[str]:
    """The ISO 15924 code of the script most letters of a sample are of, a text; "Zyyy" where it has none.

    Kana and ideographs together are "Jpan", ideographs alone "Hani". By Unicode block, so a block's few signs that
    scripts share count as its own.
    """
    sample = sampled(strings)
    return [SCRIPTS[number] for number in _dominant(sample.data, sample.offsets, _OF_BLOCK).tolist()]


@functools.cache
def _foreign() -> tuple[np.ndarray, np.ndarray]:
    """Which characters below _LETTERS_END are letters, bool; and what each alphabet lacks, bool [A, _LETTERS_END]."""
    chars = [chr(code) for code in range(_LETTERS_END)]
    are_letters = np.array([unicodedata.category(char)[0] == "L" for char in chars])
    shared = np.isin(_OF_BLOCK[np.arange(_LETTERS_END) // _BLOCK], [SCRIPTS.index(name) for name in _SHARED])
    shared[: ord("z") + 1] = True
    foreign = np.empty((len(ALPHABETS), _LETTERS_END), bool)
    for row, letters in zip(foreign, ALPHABETS.values(), strict=True):
        more, _, lacking = letters.partition("-")
        own = (set(_COMMON) - set(lacking)) | set(more)
        row[:] = are_letters & shared & [char not in own and char.lower()[0] not in own for char in chars]
    return are_letters, foreign


@numba.njit(cache=True, nogil=True)
def _share(data, offsets, rows, are_letters, foreign):
    shares = np.zeros(len(rows), np.float32)
    for d in range(len(rows)):
        letters, found, i = 0, 0, offsets[d] if rows[d] >= 0 else offsets[d + 1]
        while i < offsets[d + 1]:
            char, width = _char(data, i, offsets[d + 1])
            if char < len(are_letters) and are_letters[char]:
                letters += 1
                found += foreign[rows[d], char]
            i += width
        shares[d] = found / max(letters, 1)
    return shares


def foreign_letters(strings: Strings, languages: Sequence[str]) -> np.ndarray:
    """The share of letters that the alphabet of a language lacks, a text, float32 [D]; 0 for what is not in ALPHABETS.

    Of letters in normal form C, below U+2000.
    """
    places = {language: place for place, language in enumerate(ALPHABETS)}
    rows = np.array([places.get(language, -1) for language in languages], np.int64)
    return _share(strings.data, strings.offsets, rows, *_foreign())
