import pytest

from alpacache.errors import UsageError
from alpacache.sources import open_source


@pytest.mark.parametrize("spec", ["", "nonsense", "folder:", "pai:", "hf:", "zip:x", "/no/such/dir"])
def test_unknown_sources_name_the_known_kinds(spec):
    with pytest.raises(UsageError, match=r"folder:DIR, synthetic:N, pai, pai:DIR, hf:REPO-OR-PATH"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["synthetic:", "synthetic:many", "synthetic:-3", "synthetic:²"])
def test_synthetic_wants_a_number(spec):
    with pytest.raises(UsageError, match="synthetic:N"):
        open_source(spec)


def test_folder_spec_opens_and_bare_folder_gets_a_hint(folder):
    assert open_source(f"folder:{folder}").name == "folder:circles"
    with pytest.raises(UsageError, match="write folder:"):
        open_source(str(folder))
