"""Secrets in texts for people: addresses are pasted with the keys in them, and messages end up in logs and issues."""

import re

_MASK = "***"
_SCHEME = r"(?:\b[A-Za-z][A-Za-z0-9+.-]*://|\b(?:https?|s3):/)"
_SECRETS = (
    # Whatever stands before an @: user and password, whose slashes are not always escaped.
    (re.compile(rf"({_SCHEME})(?:[^/\s'\"@]*|[^/\s'\":@]+:[^\s'\"]*)@"), rf"\1{_MASK}@"),
    # Whatever stands behind a ?: a signature or a token in a query.
    (re.compile(rf"({_SCHEME}[^\s'\"?]*\?)[^\s'\"]+"), rf"\1{_MASK}"),
    # The same of an address that was cut into parts, and of settings.
    (
        re.compile(r"(?i)([?&][\w.-]*(?:token|secret|signature|sig|credential|password|key|id)=)[^\s'\"&]+"),
        rf"\1{_MASK}",
    ),
    (re.compile(r"\b([A-Z_]*(?:TOKEN|SECRET|PASSWORD|KEY|KEY_ID)=['\"]?)[^\s'\"]+"), rf"\1{_MASK}"),
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
    """The text without the secrets that its addresses hold, and without what looks like a key or token."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
