"""Take personal data and secrets out of text, in time linear in its length.

All rules run on RE2, which has no backtracking: an operator's own rule can be
wrong, but it cannot stop the server. Rules lean towards taking out too much:
a prompt with ``[PHONE]`` where an order number was trains as well, a leaked
number cannot be called back.

What is recognised follows the public formats: the prefixes that providers
document for secret scanning (GitHub, AWS, Slack, Stripe, Google and others),
RFC 7519 (JWT), RFC 7468 (PEM), ISO/IEC 7812-1 (Luhn), ISO 13616 (IBAN), ITU-T
E.164 (phone numbers).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from draftline.spec.models import RedactionSpec
from draftline.traffic.numbers import find_card, is_iban, is_ip
from draftline.traffic.rules import compile_expression, compile_rule

_ANY_KEY = (
    # PEM and PGP blocks, also one whose end was cut off.
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?s:.*?)"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\z)",
    r"eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?",  # JWT
    r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|ANPA|ANVA|AIPA)[A-Z0-9]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}",
    r"(?:sk|pk|rk|whsec)[-_](?:[A-Za-z0-9]{2,12}[-_]){0,3}[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic, Stripe
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9/]{10,}",
    r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",
    r"hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|dop_v1_[a-f0-9]{40,}",
    r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|(?:AC|SK)[0-9a-f]{32}",  # SendGrid, Twilio
    r"(?i:bearer\s+)[A-Za-z0-9._~+/=-]{16,}",
)

_NAMED_SECRET = (
    r"(?i)(pass(?:word|phrase|code|wd)?|pwd|secret|token|credentials?|api[ _-]?key|access[ _-]?key|"
    r"client[ _-]?secret|private[ _-]?key|pin)((?:[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?))([^\s\"',;]{4,})"
)
_LOGIN_IN_URL = r"([A-Za-z][A-Za-z0-9+.-]{1,20}://)[^\s/:@]*:[^\s/@]+@"
_EMAIL = r"[\p{L}\p{N}._%+'/=?^{|}~&*$#!-]+@(?:[\p{L}\p{N}-]+\.)+[\p{L}]{2,24}"
_IBAN = r"(?i)\b[A-Z]{2}\p{Nd}{2}(?:[ -]?[A-Z0-9]{2,4}){3,8}\b"
_GAP = r"[\s.\-\x{2010}-\x{2015}\x{00a0}\x{202f}]"
_DIGITS = rf"\p{{Nd}}(?:{_GAP}{{0,2}}\p{{Nd}}){{12,60}}"
_PHONE_GAP = r"[\s./()\-\x{2010}-\x{2015}\x{00a0}\x{202f}]"
_PHONES = (
    rf"(?:\+|\b00){_PHONE_GAP}{{0,2}}\p{{Nd}}(?:{_PHONE_GAP}{{0,3}}\p{{Nd}}){{6,16}}",  # international
    rf"(?:\b1{_PHONE_GAP})?(?:\(\p{{Nd}}{{3}}\)|\b\p{{Nd}}{{3}}){_PHONE_GAP}{{1,2}}\p{{Nd}}{{3}}{_PHONE_GAP}\p{{Nd}}{{4}}\b",
)
# National, with its leading zero in any script; RE2's \b knows ASCII alone.
_NATIONAL_PHONE = (
    rf"(^|[^\p{{L}}\p{{Nd}}_])(\(?[0\x{{0660}}\x{{06f0}}\x{{0966}}]\p{{Nd}}(?:{_PHONE_GAP}{{0,3}}\p{{Nd}}){{6,12}})"
)
_NAMED_PHONE = (
    rf"(?i)(\b(?:phone|tel|telephone|mobile|cell|cellphone|whatsapp|fax|call me|call|ring|text me|reach me|sms)\b"
    rf"[^\p{{Nd}}\n]{{0,24}})(\p{{Nd}}(?:{_PHONE_GAP}{{0,3}}\p{{Nd}}){{5,14}})"
)
_IPS = (
    r"(?:::|[0-9A-Fa-f]+[:.])[0-9A-Fa-f:.]*[0-9A-Fa-f]",
    r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b",  # also one with a port, or with a word that runs into it
)
_LONG_WORD = r"[A-Za-z0-9+/_-]{24,}={0,2}"

Replace = Callable[[Any], str]
"""From a match to what takes its place."""


@dataclass(frozen=True)
class _Rule:
    name: str
    pattern: Any
    replace: Replace


class Redactor:
    """Applies the rules of a spec.

    Safe for threads.

    Args:
        spec: Which rules, and the operator's own.

    Raises:
        SpecError: an own rule cannot be used.
    """

    def __init__(self, spec: RedactionSpec) -> None:
        # Own rules come first: they know what an order number looks like before it is taken for a phone number.
        rules = [_Rule(name, compile_rule(name, text), _always(name)) for name, text in spec.rules.items()]
        if spec.keys:
            rules += [_rule("key", pattern, _always("key")) for pattern in _ANY_KEY]
            rules.append(_rule("key", _LOGIN_IN_URL, lambda match: f"{match.group(1)}[KEY]@"))
            rules.append(_rule("key", _NAMED_SECRET, _replace_named_secret))
            rules.append(_rule("key", _LONG_WORD, _if("key", _looks_random)))
        if spec.emails:
            rules.append(_rule("email", _EMAIL, _always("email")))
        if spec.cards:
            rules.append(_rule("iban", _IBAN, _replace_iban))
            rules.append(_rule("card", _DIGITS, _replace_cards))
        if spec.ips:
            rules += [_rule("ip", pattern, _if("ip", is_ip)) for pattern in _IPS]
        if spec.phones:
            rules += [_rule("phone", pattern, _always("phone")) for pattern in _PHONES]
            rules.append(_rule("phone", _NATIONAL_PHONE, lambda match: f"{match.group(1)}[PHONE]"))
            rules.append(_rule("phone", _NAMED_PHONE, lambda match: f"{match.group(1)}[PHONE]"))
        self._rules = tuple(rules)

    def redact(self, text: str) -> tuple[str, dict[str, int]]:
        """The text with ``[EMAIL]``, ``[PHONE]``, ``[NAME-OF-RULE]`` ... in place of what was found.

        Returns:
            The text, and how often each rule changed something.
        """
        counts: Counter[str] = Counter()
        for rule in self._rules:

            def replace(match: Any, rule: _Rule = rule) -> str:
                found = str(match.group(0))
                put = rule.replace(match)
                counts[rule.name] += put != found
                return put

            text = rule.pattern.sub(replace, text)
        return text, {name: number for name, number in counts.items() if number}


def _rule(name: str, pattern: str, replace: Replace) -> _Rule:
    return _Rule(name, compile_expression(pattern), replace)


def _always(name: str) -> Replace:
    return lambda match: f"[{name.upper()}]"


def _if(name: str, check: Callable[[str], bool]) -> Replace:
    return lambda match: f"[{name.upper()}]" if check(match.group(0)) else str(match.group(0))


def _replace_named_secret(match: Any) -> str:
    """``password: hunter2`` loses its value; ``the password is wrong`` keeps it."""
    name, between, value = match.group(1), match.group(2), match.group(3)
    is_sentence = between.strip(" \"'").lower() == "is"
    if is_sentence and not any(char.isdigit() or not char.isalnum() for char in value.rstrip(".!?)")):
        return str(match.group(0))
    return f"{name}{between}[KEY]"


def _replace_cards(match: Any) -> str:
    text = str(match.group(0))
    while (found := find_card(text)) is not None:
        text = f"{text[: found[0]]}[CARD]{text[found[1] :]}"
    return text


def _replace_iban(match: Any) -> str:
    text = str(match.group(0))
    # The words after it look like more groups of it.
    ends = [len(text), *(gap.start() for gap in reversed(list(re.finditer(r"[ -]", text))))]
    end = next((end for end in ends if is_iban(text[:end])), None)
    return text if end is None else f"[IBAN]{text[end:]}"


def _looks_random(word: str) -> bool:
    """Whether a long word looks drawn: hexadecimal, or three kinds of characters in hardly any order."""
    body = word.rstrip("=")
    if len(body) >= 32 and re.fullmatch(r"(?:[0-9a-f-]+|[0-9A-F-]+)", body) and any(c.isdigit() for c in body):
        return True
    kinds = sum(any(test(c) for c in body) for test in (str.isdigit, str.islower, str.isupper))
    counts = Counter(body)
    entropy = -sum(n / len(body) * math.log2(n / len(body)) for n in counts.values())
    # 32 characters drawn from 64 have 4.5 bits on average; names and paths in mixed case stay below 4.
    return kinds == 3 and entropy >= 4.0
