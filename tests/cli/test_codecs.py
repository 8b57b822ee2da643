"""`alpacache codecs`: what is printed."""

import pytest

from alpacache.extraction import compare_codecs
from alpacache.extraction.codec_errors import CodecErrors


@pytest.mark.parametrize(
    ("learnt_from", "judged_on", "said"), [(4, 2, "learnt from 4"), (2, 2, "learnt from the same")]
)
def test_the_title_says_whether_codecs_were_judged_on_others(
    learnt_from, judged_on, said, run_here, monkeypatch
) -> None:
    errors = CodecErrors(
        velocity=0.01, worst_velocity=0.02, loss=1.0, loss_change=0.0, gradient=None, gradient_cosine=None,
        bytes_a_sample=1e6, bits=8.5,
    )  # fmt: skip
    found = compare_codecs.CodecsReport(
        input="synthetic:6", model="m", learnt_from=learnt_from, judged_on=judged_on, draws=4, expert_dtype="float32",
        rounding=errors, codecs=(), seconds=1.0,
    )  # fmt: skip
    monkeypatch.setattr(compare_codecs, "compare_codecs", lambda *_, **__: found)
    text = " ".join(run_here("codecs", "synthetic:6", "--model", "m").stdout.split())
    assert f"m on {judged_on} samples of synthetic:6, 4 draws each; {said}" in text
