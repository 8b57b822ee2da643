"""The how-to on a head of one's own: its code runs on a store of either kind (`test_code_blocks` runs it as it is)."""

import pytest
from markdown_pages import ROOT, blocks

CODE = "\n".join(block.code for block in blocks(ROOT / "docs/how-to/your-own-head.md", "python"))


@pytest.mark.system
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_page_runs_on_stores_of_either_codec(codec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert 'codec="int8"' in CODE
    code = CODE.replace('codec="int8"', f'codec="{codec}"')
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(1, 3) torch.Size([2, 2]) torch.Size([64, 2])"
    assert printed[1].startswith("64 steps of 0.1 s; spread ")
    assert printed[2:] == ["True", "torch.Size([6, 64, 3]) torch.Size([6, 64, 3, 3])"]
