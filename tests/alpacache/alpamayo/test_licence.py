"""What a checkpoint's own files say of its licence, and nothing else."""

import json
import shutil

import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.licence import licence_lines, licence_of, told_licence


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


@pytest.mark.parametrize("name", ["LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "license.TXT"])
def test_a_licence_file_goes_by_several_names(tiny_checkpoint, tmp_path, name):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copy / "MY_LICENSE.txt").write_text("Another\n")
    (copy / name).write_text("# Some Licence 2.0\n" + "x" * 2**20)
    told = f'license: other; license_name: "Some Licence 2.0"; license_link: {name}'
    assert told_licence(Checkpoint(str(copy))) == told
    (tmp_path / "outside").write_text("Foreign\n")
    (copy / name).unlink()
    (copy / name).symlink_to(tmp_path / "outside")
    assert told_licence(Checkpoint(str(copy))) == ""


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("# Model\n\n## License\n\nFree for\nresearch.\n\nMore.\n", "Free for research."),
        ("### License/Terms of Use:\nGoverned by [X](y).\n## Next\n", "Governed by [X](y)."),
        ("Model\n=====\nText.\n\nLicence\n-------\nMIT\n", "MIT"),
        ("## 7. Licence\n" + "a" * 1000, "a" * 299 + "…"),
        ("## License plates\n\nBlurred.\n", ""),
        ("```\n# License\necho\n```\n", ""),
        ("## License\n\n## Next\n\nText.\n", ""),
    ],
)
def test_a_card_says_the_licence_under_a_heading(card, said):
    assert licence_of(card, None) == (["license: other", f"license_name: {json.dumps(said)}"] if said else [])
    link = licence_of(card, ("COPYING", "Title\n"))
    assert link == ["license: other", f"license_name: {json.dumps(said or 'Title')}", "license_link: COPYING"]
    assert licence_of("---\nlicense: mit\n---\n" + card, ("COPYING", "Title\n")) == ["license: mit"]
