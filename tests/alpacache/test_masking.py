"""Keys in addresses and tokens are masked wherever they stand; names, paths and sample ids are not."""

import pytest

from alpacache.errors import DataError, UsageError
from alpacache.masking import masked

KEY, SECRET, TOKEN = "AKIAABCDEFGHIJKLMNOP", "sup3r/s3cret+SIGNATURE", "hf_abcdefghijKLMNOPQRST"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"s3://{KEY}:{SECRET}@bucket/x is refused", "s3://***@bucket/x is refused"),
        (f"'https://user:{TOKEN}@huggingface.co/x/y': no", "'https://***@huggingface.co/x/y': no"),
        (f"https:/user:pw@host/x of {TOKEN}", "https:/***@host/x of ***"),
        (f"s3://b/x?X-Amz-Credential={KEY}&X-Amz-Signature={SECRET}, again", "s3://b/x?*** again"),
        (
            f"part 'x?X-Amz-Credential={KEY}&X-Amz-Signature={SECRET}'",
            "part 'x?X-Amz-Credential=***&X-Amz-Signature=***'",
        ),
        ("hf:o/n?token=abc", "hf:o/n?token=***"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} WANDB_API_KEY='0123'", "AWS_SECRET_ACCESS_KEY=*** WANDB_API_KEY='***'"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        (f"{KEY} ghp_{'a' * 36} sk-{'b' * 40}", "*** *** ***"),
    ],
)
def test_secrets_are_masked(text, expected):
    assert masked(text) == expected
    assert str(UsageError(text)) == str(DataError(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "clip-7@5100000#0 of s3://bucket/prefix, folder:/data/me@home/drives",
        'processor.image_token: expected "<|image_pad|>", found "x"; did you mean "tokens"?',
        "cache/token=0.5 of https://huggingface.co/nvidia/Alpamayo-R1-10B at 0123456789abcdef0123456789abcdef01234567",
        'stores = ["a=0.5"]\nseed = 0\nkey = "b?"',
    ],
)
def test_all_else_stays(text):
    assert masked(text) == text
