"""What is taken out, what stays, and that no secret of a known form gets through."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftline.errors import SpecError
from draftline.spec import RedactionSpec, RunSpec, derive
from draftline.traffic.numbers import find_card, is_iban, passes_luhn
from draftline.traffic.redaction import Redactor

ALL = Redactor(RedactionSpec(ips=True))
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dBjftJeZ4CVP-mBr92fjFW"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nabc\n-----END RSA PRIVATE KEY-----"


def redact(text: str) -> str:
    return ALL.redact(text)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+shop@mail.example.co.uk please", "write to [EMAIL] please"),
        ("müller@bücher.example, now", "[EMAIL], now"),
        ("<a@b.io>", "<[EMAIL]>"),
        ("card 4111 1111 1111 1111 exp 12/27", "card [CARD] exp 12/27"),
        ("4111-1111-1111-1111.", "[CARD]."),
        ("amex 378282246310005", "amex [CARD]"),
        ("order 12 5555 5555 5555 4444 thanks", "order 12 [CARD] thanks"),
        ("4111\N{NO-BREAK SPACE}1111\N{NO-BREAK SPACE}1111\N{NO-BREAK SPACE}1111", "[CARD]"),
        ("IBAN DE89 3704 0044 0532 0130 00 today", "IBAN [IBAN] today"),
        ("gb82west12345698765432", "[IBAN]"),
        ("call +49 (0)151 2345-6789 or", "call [PHONE] or"),
        ("+1 415 555 2671", "[PHONE]"),
        ("(415) 555-2671", "[PHONE]"),
        ("415-555-2671", "[PHONE]"),
        ("030/1234567", "[PHONE]"),
        ("0044 20 7946 0958", "[PHONE]"),
        ("my mobile is 4155552671", "my mobile is [PHONE]"),
        ("٠١٢٣٤٥٦٧٨٩", "[PHONE]"),
        (f"token {JWT} ends", "token [KEY] ends"),
        (f"here:\n{PEM}\nthanks", "here:\n[KEY]\nthanks"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE cut off", "[KEY]"),
        ("AKIAIOSFODNN7EXAMPLE", "[KEY]"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = [KEY]"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "[KEY]"),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "[KEY]"),
        ("use sk-proj-abcdefghijklmnopqrstuvwx ok", "use [KEY] ok"),
        ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "[KEY]"),
        ("xoxb-1234567890-abcdefghij", "[KEY]"),
        ("AIzaSyA-1234567890abcdefghijklmnopqrstu", "[KEY]"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "[KEY]"),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: [KEY]"),
        ("postgres://admin:hunter2@db.example/shop", "postgres://[KEY]@db.example/shop"),
        ("my password: hunter2!", "my password: [KEY]"),
        ("the password is tr0ub4dor&3", "the password is [KEY]"),
        ("api_key=abcd1234", "api_key=[KEY]"),
        ("d41d8cd98f00b204e9800998ecf8427e", "[KEY]"),
        ("from 192.168.10.254 at night", "from [IP] at night"),
        ("2001:db8::ff00:42:8329", "[IP]"),
        ("http://192.168.0.1:8080/a", "http://[IP]:8080/a"),
        ("host:10.0.0.1, ip 10.0.0.1:22", "host:[IP], ip [IP]:22"),
    ],
)
def test_personal_data_and_secrets_go(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Where is order 1234567? I ordered on 2024-05-17 at 10:30.",
        "It cost 1,299.00 EUR, not 1 299,00.",
        "The version is 2.60.1, released 17.05.2024.",
        "4111 1111 1111 1112 is no card number",  # fails Luhn
        "The password is incorrect, the token is missing.",
        "My pin is broken and the secret is out.",
        "Is a private key the same as a public key?",
        "I waited 3 weeks, called 5 times, spoke to 2 people @ the desk.",
        "see https://shop.example/help/returns-and-refunds-2024/how-to-start",
        "AKIA is a prefix; ghp_ too.",
        "def add(a, b): return a + b  # 0.1 + 0.2 = 0.30000000000000004",
        "Ratio 3:4, time 12:30:59, room ::",
        "internationalisation_of_electroencephalographically",
        "email me @ home, or at example dot com",
        "DE12 is a postcode, GB too",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_every_kind_can_be_switched_off() -> None:
    text = "a@b.io, +1 415 555 2671, 4111 1111 1111 1111, AKIAIOSFODNN7EXAMPLE, 10.0.0.1"
    off = RedactionSpec(emails=False, phones=False, cards=False, keys=False, ips=False)
    assert Redactor(off).redact(text) == (text, {})
    assert Redactor(RedactionSpec()).redact(text)[0] == "[EMAIL], [PHONE], [CARD], [KEY], 10.0.0.1"
    assert ALL.redact(text)[1] == {"email": 1, "phone": 1, "card": 1, "key": 1, "ip": 1}


def test_own_rules_come_first() -> None:
    own = Redactor(RedactionSpec(rules={"order": r"\bDL-\d{10}\b", "name": "(?i)jane doe"}))
    assert own.redact("Jane Doe, DL-0151234567") == ("[NAME], [ORDER]", {"order": 1, "name": 1})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"order": "(?<=a)b"}, "no look-around"),
        ({"order": "(a"}, "is no regular expression"),
        ({"order": "x*"}, "matches the empty text"),
        ({"Order No": "x"}, "no usable name"),
        ({"order": "x" * 2000}, "too long"),
        ({f"r{n}": "x" for n in range(65)}, "at most 64 own rules"),
        ({"order": "(?:(?:a{1000}){1000}){1000}"}, "is no regular expression"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_refused_with_the_spec(rules: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        derive(RunSpec(), {"serving.capture.redact.rules": rules})


def test_no_rule_takes_more_than_linear_time() -> None:
    """The patterns that stop a backtracking engine for years; the bound is a hundred times what they take here."""
    evil = Redactor(RedactionSpec(ips=True, rules={"evil": r"(a+)+$", "worse": r"(x|x|x)*y"}))
    for text in (
        "a" * 60_000 + "!",
        "x" * 60_000,
        "1 " * 30_000,
        "a@" * 30_000,
        "1.1" * 20_000,
        "eyJ" * 20_000,
        "0" * 60_000,
    ):
        started_s = time.process_time()
        evil.redact(text)
        assert time.process_time() - started_s < 10


# -- seeded secrets: whatever stands around them, they do not come through --------------------------------------------


def _digits(count: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=count, max_size=count)


def _with_check_digit(body: str) -> str:
    return next(body + check for check in "0123456789" if passes_luhn(body + check))


def _grouped(digits: str, gap: str) -> str:
    return gap.join(re.findall(r".{1,4}", digits))


_WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=1, max_size=12)
_LONG = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=36, max_size=40)
_GAPS = ["", " ", "-", "."]
_SECRETS = st.one_of(
    st.builds(lambda a, b: f"{a}@{b}.example", _WORD, _WORD),
    st.builds(
        lambda d, gap: _grouped(_with_check_digit("4" + d), gap), _digits(14), st.sampled_from(["", " ", "-", "."])
    ),
    st.builds(lambda d: "+49 151 " + d, _digits(8)),
    st.builds(lambda a, b, c: f"({a}) {b}-{c}", _digits(3), _digits(3), _digits(4)),
    st.builds("AKIA{}".format, st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=16, max_size=16)),
    st.builds(lambda p, w: p + w, st.sampled_from(["ghp_", "sk-", "sk_live_", "xoxb-", "hf_", "glpat-"]), _LONG),
    st.builds("eyJ{}.{}.{}".format, _LONG, _LONG, _LONG),
    st.builds("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----".format, _LONG),
)
_EDGE = st.sampled_from([" ", "\n", ", ", "(", ")", '"', ": ", "; "])


@settings(max_examples=400)
@given(secret=_SECRETS, before=st.text(max_size=30), after=st.text(max_size=30), left=_EDGE, right=_EDGE)
def test_no_seeded_secret_survives(secret: str, before: str, after: str, left: str, right: str) -> None:
    cleaned = redact(f"{before}{left}{secret}{right}{after}")
    assert secret not in cleaned
    longest = max(re.findall(r"[A-Za-z0-9]+", secret), key=len)
    if len(longest) >= 12 and longest not in before + after:
        assert longest not in cleaned


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@given(_digits(15))
def test_luhn_finds_every_changed_digit(body: str) -> None:
    number = _with_check_digit(body)
    for place in range(len(number)):
        changed = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert not passes_luhn(changed)


def test_checks_of_numbers() -> None:
    assert find_card("12 4111 1111 1111 1111 7") == (3, 22)
    assert find_card("4111 1111 1111 1112") is None
    assert is_iban("DE89 3704 0044 0532 0130 00")
    assert not is_iban("DE88 3704 0044 0532 0130 00")
