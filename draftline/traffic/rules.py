"""Redaction rules of an operator's own making: what may be one."""

from __future__ import annotations

import re
from typing import Any

import re2

from draftline.errors import SpecError

MAX_RULES = 64
MAX_RULE_CHARS = 1000
_RULE_MEMORY_BYTES = 8 << 20


def compile_rule(name: str, pattern: str) -> Any:
    """An operator's rule, compiled.

    Args:
        name: Its name in the spec; becomes the placeholder.
        pattern: RE2 syntax (no look-around, no back references).

    Raises:
        SpecError: not such an expression, or one that matches nothing at all or everywhere.
    """
    where = f"serving.capture.redact.rules.{name}"
    if re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name) is None:
        raise SpecError(f"{where} has no usable name", got=repr(name), expected="lower-case letters, digits and dashes")
    if len(pattern) > MAX_RULE_CHARS:
        raise SpecError(f"{where} is too long", got=f"{len(pattern)} characters", expected=f"at most {MAX_RULE_CHARS}")
    try:
        compiled = compile_expression(pattern)
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise SpecError(
            f"{where} is no regular expression", got=reason, expected="RE2 syntax: no look-around, no back references"
        ) from None
    if compiled.search("") is not None:
        raise SpecError(f"{where} matches the empty text", remedy="It would match everywhere; ask for a character")
    return compiled


def compile_expression(pattern: str) -> Any:
    """An RE2 expression of bounded memory that writes nothing to the log.

    Raises:
        re2.error: not such an expression.
    """
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _RULE_MEMORY_BYTES
    return re2.compile(pattern, options)
