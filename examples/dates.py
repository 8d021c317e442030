"""Dates as nearly 300 languages write them, for `translation.py`."""

import datetime
import random
from typing import NamedTuple

from babel import Locale
from babel.dates import format_date
from babel.localedata import locale_identifiers

Pairs = list[tuple[str, str]]  # a text and its ISO date

FIRST, DAYS = datetime.date(1900, 1, 1), 73_049  # to the end of 2099
UNSEEN = 30  # languages of which the training sees nothing
ZERO = {
    "adlm": "𞥐", "arab": "٠", "arabext": "۰", "beng": "০", "cakm": "𑄶", "deva": "०", "hmnp": "𞅀",
    "latn": "0", "mtei": "꯰", "mymr": "၀", "nkoo": "߀", "olck": "᱐", "tibt": "༠",
}  # fmt: skip


class Data(NamedTuple):
    languages: int  # in training
    training: Pairs
    held_out_dates: Pairs  # in the same languages
    other_forms: Pairs  # of these languages: regions, other scripts; the rest is of held-out dates
    unseen_languages: Pairs
    unseen: str  # their names


def read_data(most_languages: int, training: int, test: int) -> Data:
    """The languages and the dates are drawn by lot."""
    rng = random.Random(0)
    locales = [Locale.parse(name) for name in sorted(locale_identifiers())]
    languages = [x for x in locales if str(x) == x.language]
    # Where CLDR does not know the months, they are M01 to M12.
    languages = [x for x in languages if x.months["format"]["wide"][11] != "M11"]
    rng.shuffle(languages)
    unseen, seen = languages[:UNSEEN], languages[UNSEEN : UNSEEN + most_languages]
    known = {x.language for x in seen}
    forms = [x for x in locales if x.language in known and str(x) != x.language]
    days = rng.sample(range(DAYS), DAYS)
    held_out, others = days[: DAYS // 10], days[DAYS // 10 :]
    return Data(
        len(seen),
        draw(rng, training, seen, others),
        draw(rng, test, seen, held_out),
        draw(rng, test, forms, held_out),
        draw(rng, test, unseen, held_out),
        ", ".join(sorted(x.english_name or str(x) for x in unseen)),
    )


def draw(rng: random.Random, count: int, locales: list[Locale], days: list[int]) -> Pairs:
    """Different texts."""
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        locale, date = rng.choice(locales), FIRST + datetime.timedelta(rng.choice(days))
        form, language = rng.choice(("full", "long", "medium")), Locale(locale.language)
        text = write(date, form, locale)
        # A region that writes as its language does is no other form.
        other = locale == language or text != write(date, form, language)
        # A date of digits alone, 3/2/1989, is one of two.
        if other and any(c.isalpha() for c in text):
            pairs[text] = date.isoformat()
    return list(pairs.items())


def write(date: datetime.date, form: str, locale: Locale) -> str:
    """As `locale` writes it, in its own digits."""
    zero = ord(ZERO[locale.default_numbering_system])
    return format_date(date, form, locale).translate({48 + i: zero + i for i in range(10)})
