"""Texts in pictures."""

from alpacache.pictures.canvas import LONGEST_LABEL, literal


def test_a_long_label_keeps_its_ends():
    label = f"runs/{'x' * 100}/a"
    shown = literal(label)
    assert len(shown) == LONGEST_LABEL
    assert shown.startswith("runs/xx")
    assert shown.endswith("xx/a")
    assert "…" in shown
    assert literal("x" * LONGEST_LABEL) == "x" * LONGEST_LABEL


def test_marks_of_matplotlib_are_text():
    assert literal("_$5$") == r" _\$5\$"
