"""Secrets in texts for people: addresses are pasted with the keys in them, and messages end up in logs and issues."""

import re
from collections.abc import Mapping
from typing import Any

_MASK = "***"
_SCHEME = r"(?:\b[A-Za-z][A-Za-z0-9+.-]{0,30}://|\b(?:https?|s3):/)"
_LONGEST = 4096
"""Characters of an address that are searched for its end: without a bound a hostile text would take minutes."""
_NAME = (
    r"[\w.-]*(?<![^\W_])(?:password|passwd|passphrase|secret|(?:(?<=[_-])|shared[_-]?access[_-]?)signature"
    r"|(?:api|access|account|auth|private|secret|shared|signing|storage)[_-]?key(?:[_-]?id)?"
    r"|(?:access|api|auth|hf|id|private|refresh|secret|security|session)[_-]?token)"
)
"""What names a secret wherever it stands; `image_token` and `key` do not."""
_SECRETS = (
    # Whatever stands before an @: user and password, whose slashes and spaces are not always escaped.
    (
        re.compile(rf"({_SCHEME})(?:[^/\s'\"@]{{0,{_LONGEST}}}|[^/\s'\":@]{{1,{_LONGEST}}}:[^\s'\"]{{0,{_LONGEST}}})@"),
        rf"\1{_MASK}@",
    ),
    (
        re.compile(rf"({_SCHEME})[^/\s'\":@]+:(?!\d+\s)[^/\s'\"@]+(?: [^/\s'\"@]+){{1,3}}@(?=[\w\[])"),
        rf"\1{_MASK}@",
    ),
    (re.compile(r"(?<![\w:/])(//)[^/\s'\":@]+:[^\s'\"@]+@(?=[\w\[])"), rf"\1{_MASK}@"),
    # Whatever stands behind a ?: a signature or a token in a query.
    (re.compile(rf"({_SCHEME}[^\s'\"?]{{0,{_LONGEST}}}\?)[^\s'\"]+"), rf"\1{_MASK}"),
    # The same of an address that was cut into parts, of its fragment and parameters, and of settings.
    (
        re.compile(r"(?i)([?&#;][\w.-]*(?:token|secret|signature|sig|credential|password|key|id)=)[^\s'\"&;]+"),
        rf"\1{_MASK}",
    ),
    (
        re.compile(r"\b([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|KEY|KEY_ID)(?:=| *[:=] +)['\"]?)[^\s'\"]+"),
        rf"\1{_MASK}",
    ),
    # A number there is the weight of a store whose name ends so.
    (
        re.compile(
            rf"(?i)(?<![\w.-])((?:{_NAME}|token|signature) ?= ?['\"]?)"
            rf"(?!(?:\d{{1,3}}(?:\.\d+)?|\.\d+)(?![^\s'\",\]]))[^\s'\"&;,]+"
        ),
        rf"\1{_MASK}",
    ),
    # Headers and objects. A quote ends a value only if it is the one that began it.
    (re.compile(rf"(?i)(?<![\w.-])({_NAME}: ?)[^\s'\",;]+"), rf"\1{_MASK}"),
    (re.compile(rf"(?i)((['\"])(?:{_NAME}|token)\2\s*:\s*(['\"]))(?:\\.|(?!\3)[^\n\\])+"), rf"\1{_MASK}"),
    (
        re.compile(r"(?i)(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:(?:basic|bearer|token)\s+)?)[^\s'\",]+"),
        rf"\1{_MASK}",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\1{_MASK}"),
    # What hubs, clouds and forges call a token.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{10,}|A[KS]IA[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
            r"|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
        ),
        _MASK,
    ),
)


def masked(text: str) -> str:
    """The text without the secrets that its addresses hold, and without what looks like a key or token.

    Of JSON or TOML the values are masked before they are written (`masked_values`): a mask over their quotes and
    escapes would leave what no reader takes.
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def masked_values(value: Any) -> Any:
    """Plain values with every text in them masked, keys too; tuples become lists."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked_values(key): masked_values(part) for key, part in value.items()}
    return [masked_values(part) for part in value] if isinstance(value, (list, tuple)) else value
