"""Numbers with a check of their own: cards, IBANs, IP addresses."""

from __future__ import annotations

import ipaddress
import re

MIN_CARD_DIGITS, MAX_CARD_DIGITS = 13, 19
_FIRST_DIGITS = range(2, 7)
_SHORTEST_IBAN, _LONGEST_IBAN = 15, 34


def passes_luhn(digits: str) -> bool:
    """Whether the check digit of a card number fits (ISO/IEC 7812-1); digits of any script."""
    total = 0
    for place, char in enumerate(reversed(digits)):
        value = int(char) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def find_card(text: str) -> tuple[int, int] | None:
    """Where the first card number stands in a row of digits with gaps.

    Neighbouring numbers run into one row ("order 12 4111 1111 ..."), so every
    sequence of whole groups is tried, longest first. No payment card begins
    with another digit than 2 to 6.
    """
    groups = [(match.start(), match.end()) for match in re.finditer(r"\d+", text)]
    for first in range(len(groups)):
        if int(text[groups[first][0]]) not in _FIRST_DIGITS:
            continue
        candidates = []
        digits = ""
        for last in range(first, len(groups)):
            digits += text[slice(*groups[last])]
            if len(digits) > MAX_CARD_DIGITS:
                break
            if len(digits) >= MIN_CARD_DIGITS and passes_luhn(digits):
                candidates.append((groups[first][0], groups[last][1]))
        if candidates:
            return candidates[-1]
    return None


def is_iban(text: str) -> bool:
    """Whether the check digits of an IBAN fit (ISO 13616, modulo 97)."""
    body = re.sub(r"[ -]", "", text).upper()
    if not _SHORTEST_IBAN <= len(body) <= _LONGEST_IBAN or not body.isascii():
        return False
    return int("".join(str(int(char, 36)) for char in body[4:] + body[:4])) % 97 == 1


def is_ip(text: str) -> bool:
    """Whether the text is an IP address of either version."""
    try:
        ipaddress.ip_address(text.rstrip(".:") if not text.endswith("::") else text)
    except ValueError:
        return False
    return True
