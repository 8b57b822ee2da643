"""Routes from data: what may go into a prompt, and what a text commands."""

import pytest

from alpacache.driving.route import MOST_CHARACTERS, check_route, command_of, swapped
from alpacache.driving.strata import side_of


@pytest.mark.parametrize(
    "text", ["turn left in 40 m", "Turn right onto De La Cruz Boulevard in 30m", "左折 20 m", "x" * 200]
)
def test_instructions_are_taken_as_they_are(text):
    assert check_route(text) == text


@pytest.mark.parametrize("text", [None, "", "   ", float("nan")])
def test_no_text_is_no_route(text):
    assert check_route(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * (MOST_CHARACTERS + 1), "201 characters; at most 200"),
        ("turn left\nturn right", r"U\+000A"),
        ("turn \u202eleft", r"U\+202E"),
        ("turn left\0", r"U\+0000"),
        ("turn \ud800", r"U\+D800"),
        ("<|im_end|>", r"holds '<\|'"),
        ("left <|route_end|> then", r"holds '<\|'"),
        ("left |> then", r"holds '\|>'"),
        ("left <i12> then", "holds '<i12>'"),
        ("<think> left", "holds '<think>'"),
        (7, "int, not text"),
        (0.5, "float, not text"),
        (b"left", "bytes, not text"),
    ],
)
def test_what_could_be_more_than_a_text_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        check_route(text)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("turn left in 40 m", "left"),
        ("Turn RIGHT onto Left Street in 30m", "right"),
        ("Continue straight, then turn left in 300 m", "straight"),
        ("Go straight", "straight"),
        ("In 200 m turn right ahead", "right"),
        ("Head ahead", "straight"),
        ("Proceed for 100 m", "straight"),
        ("Make a U-turn", "none"),
        ("Leftover rights", "none"),
        ("When you have the right of way, take the third exit", "none"),
        ("Yield the right-of-way, then turn left", "left"),
        ("left_turn", "left"),
        ("turn_right_40m", "right"),
        ("LEFT-TURN", "left"),
        ("turnleft", "left"),
        ("TurnRight", "right"),
        ("go_straight", "straight"),
        ("Leftmost lane", "none"),
        ("Brightleft", "none"),
        ("Continue right at the fork", "right"),
        ("continue left onto Oak Street", "left"),
        ("Proceed for 100 m, then keep left", "left"),
        ("Go ahead and bear right", "right"),
        ("Take the exit on the right", "right"),
        ("Stay in your lane", "none"),
        ("Continue straight or left", "straight"),
        ("Fahre links", "none"),
        (None, "none"),
    ],
)
def test_the_first_word_of_direction_decides(text, command):
    assert command_of(text) == command


def test_swapping_takes_left_for_right_throughout_and_keeps_the_case():
    assert swapped("Turn left, then Right, then LEFT") == "Turn right, then Left, then RIGHT"
    assert swapped(swapped("turn left in 40 m")) == "turn left in 40 m"
    assert swapped("turn_left, TURNLEFT, KeepLeft straight") == "turn_right, TURNRIGHT, KeepRight straight"
    assert swapped("continue left onto Rightmost Road") == "continue right onto Rightmost Road"
    assert swapped("continue straight, then left") is None
    assert swapped("U-turn") is None
    assert swapped(None) is None


def test_the_right_of_way_is_no_side():
    assert swapped("With the right of way turn right") == "With the right of way turn left"
    assert swapped("Mind the right of way") is None


def test_the_side_of_a_path_is_that_on_which_it_leaves_the_corridor():
    assert [side_of(value) for value in (2.1, 2.0, 0.0, -2.0, -2.1)] == ["left", *["straight"] * 3, "right"]
