"""What a checkpoint's own files say of its licence, and nothing else."""

import shutil

import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.licence import licence_lines, told_licence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("# no front matter\nlicense: mit\n", []),
        ("---\nlicense: mit\ntags: [a]\n---\n", ["license: mit"]),
        ("---\r\ntags:\r\n- license\r\nlicense: other\r\n---\r\ntext", ["license: other"]),
        ("\ufeff---\nlicense: mit\n---", ["license: mit"]),
        (
            "---\nlicense:\n- a\n- b\nlicense_link: x\nbase_model: y\n---\n",
            ["license:", "- a", "- b", "license_link: x"],
        ),
        (
            "---\nlicense_name: >-\n  two\n\n  lines\nx: 1\n---\nlicense: mit\n",
            ["license_name: >-", "  two", "  lines"],
        ),
        ("---\nlicense: never closed\n", []),
    ],
)
def test_licence_lines(text, expected):
    assert licence_lines(text) == expected


def test_a_checkpoint_is_quoted_by_its_card_then_by_its_licence_file(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert told_licence(Checkpoint(str(copy))) == ""
    (copy / "LICENSE").write_text("\n  Some Licence 2.0\n\nText\n")
    told = 'license: other; license_name: "Some Licence 2.0"; license_link: LICENSE'
    assert told_licence(Checkpoint(str(copy))) == told
    (copy / "README.md").write_text("---\nlicense: other\nlicense_name: of-the-card\n---\n# Model\n")
    assert told_licence(Checkpoint(str(copy))) == "license: other; license_name: of-the-card"
    (copy / "README.md").unlink()
    (copy / "README.md").mkdir()
    assert told_licence(Checkpoint(str(copy))) == told
