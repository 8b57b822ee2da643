"""Keys in addresses and tokens are masked wherever they stand; names, paths and sample ids are not."""

import pytest

from alpacache.errors import DataError, UsageError
from alpacache.masking import masked, masked_values

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
        ("https://h/x#access_token=SECRET123", "https://h/x#access_token=***"),
        ("https://h/a;jsessionid=SECRET is gone", "https://h/a;jsessionid=*** is gone"),
        ("Authorization: Basic dXNlcjpwYXNz, again", "Authorization: Basic ***, again"),
        ("{'authorization': 'dXNlcjpwYXNz'}", "{'authorization': '***'}"),
        ("AWS_SECRET_ACCESS_KEY: abc", "AWS_SECRET_ACCESS_KEY: ***"),
        ("aws_secret_access_key = abc/def", "aws_secret_access_key = ***"),
        ("x-amz-security-token: abc", "x-amz-security-token: ***"),
        ("X-Amz-Signature: 0abc, X-Api-Key: 12", "X-Amz-Signature: ***, X-Api-Key: ***"),
        ('{"token": "a b", "n": 1}', '{"token": "***", "n": 1}'),
        ("{'client_secret': 'a\\'b\"c'}", "{'client_secret': '***'}"),
        ("api_key=abc private_token=a.b&x", "api_key=*** private_token=***&x"),
        ("api_key=1234567 token='5x'", "api_key=*** token='***'"),
        ("AccountName=n;AccountKey=abc==;EndpointSuffix=e", "AccountName=n;AccountKey=***;EndpointSuffix=e"),
        ("http://user:p ss@h/ is gone", "http://***@h/ is gone"),
        ("sig SharedAccessSignature=a%2Fb; signature=abc", "sig SharedAccessSignature=***; signature=***"),
        ("//user:pw@host/x", "//***@host/x"),
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
        "https://host:443 is refused, ask me@home; https://host/x#part-2, a//b of folder://data/a",
        'expected {"image_token": "<|image_pad|>", "key": "a b"}; secrets and a signature: none',
        "stores my_token=0.5, x/api_key=2 and 3",
        "cache/token=0.5 of https://huggingface.co/nvidia/Alpamayo-R1-10B at 0123456789abcdef0123456789abcdef01234567",
        'stores = ["a=0.5"]\nseed = 0\nkey = "b?"',
    ],
)
def test_all_else_stays(text):
    assert masked(text) == text


def test_values_are_masked_before_they_are_written():
    value = {'TOKEN="b"': ["api_key=abc", ("s3://u:p@b/x", 1.5, None)]}
    assert masked_values(value) == {'TOKEN="***"': ["api_key=***", ["s3://***@b/x", 1.5, None]]}


@pytest.mark.parametrize("text", ["a-" * 30_000, "http://" * 3_000, "//a:" * 10_000])
def test_texts_of_any_kind_are_searched_in_bounded_steps(text):
    assert masked(text) == text
