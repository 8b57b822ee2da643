"""Definitions that a log brings along: what is taken of them, and what never becomes code."""

import time

import pytest

from alpacache.converters.message_types import message_types
from alpacache.errors import SourceError

rosbag1 = pytest.importorskip("rosbags.rosbag1")

IDL = """
// A comment with (brackets (within brackets)).
module drive { module msg {
  module State_Constants { const long MOST = (3 + 4) * 2; @unit(value="m (of (rails))") const string WORD = "a (b (";
  };
  typedef double double__36[36];
  @verbatim (language="comment", text="A state (of (a car))." "\\n")
  struct State { double__36 covariance; sequence<string<10>, 5> names; @default (value=3) uint8 kind; };
}; };
"""


def test_definitions_as_they_are_in_logs_are_taken():
    text = "uint8 NONE=0\nstring[3] names\nfloat64[36] covariance\ngeometry_msgs/Point[] points\n"
    text += "=" * 80 + "\nMSG: geometry_msgs/Point\nfloat64 x\n"
    found = message_types("pkg/Name", text, "ros1msg")
    assert list(found) == ["pkg/msg/Name", "geometry_msgs/msg/Point"]
    assert [name for name, _ in found["pkg/msg/Name"][1]] == ["names", "covariance", "points"]
    (state,) = message_types("drive/msg/State", IDL, "ros2idl").values()
    assert state[0] == [("MOST", "int32", 14), ("WORD", "string", "a (b (")]
    assert [name for name, _ in state[1]] == ["covariance", "names", "kind"]


DEEP = "((((((((1))))))))"
HOSTILE = {
    "brackets": (f"const long X = {DEEP}; struct A {{ long a; }};", "ros2idl", r"\( within \( more than 1 deep"),
    "brackets behind a text": (f'const string T = "\\\\"; const long X = {DEEP}; const string U = "";', "ros2idl", ""),
    "lists": ("struct A { " + "sequence<" * 40 + "long" + ">" * 40 + " a; };", "ros2idl", "< within <"),
    "shifts": ("const long X = 1 << 99999999999; struct A { long a; };", "ros2idl", "<< is not read"),
    "texts": ("string[2000000000] a\n", "ros1msg", "more than 50,000 parts"),
    "messages": (
        "p/B[1000] b\n" + "".join(f"{'=' * 80}\nMSG: p/{a}\np/{b}[1000] c\n" for a, b in ("BC", "CD")),
        "ros1msg",
        "more than 50,000 parts",
    ),
    "a ring": ("p/A[] a\n", "ros1msg", "p/msg/A holds itself"),
    "length": ("# " + "x" * 2**20, "ros1msg", "1,048,578 characters"),
    "no definition": ("import os; os.system('true')", "ros1msg", ""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_would_keep_the_library_busy_is_refused_at_once(what):
    text, encoding, said = HOSTILE[what]
    began = time.process_time()
    with pytest.raises(SourceError, match=f"(?s)^the definition of p/A cannot be read .*{said}"):
        message_types("p/A", text, encoding)
    assert time.process_time() - began < 5


def evil(*, name="p/msg/A", constants=(), fields=()):
    return {name: (list(constants), list(fields))}


PLAIN = (1, ("uint8", 0))
FORGED = {
    "a name of a type": evil(name='p/msg/A"""\nimport os\n"""'),
    "a name of a field": evil(fields=[("a: int = print()", PLAIN)]),
    "a name of a constant": evil(constants=[("A: int = print()\n    B", "uint8", 0)]),
    "a value": evil(constants=[("A", "uint8", type("Evil", (int,), {"__repr__": lambda self: "print()"})())]),
    "a type within": evil(fields=[("a", (2, 'p/msg/B")print()#'))]),
    "a basic type": evil(fields=[("a", (1, ("uint8]print()", 0)))]),
    "a size": evil(fields=[("a", (3, (PLAIN, "3) + print(")))]),
}


@pytest.mark.parametrize("what", FORGED)
def test_no_code_passes_even_if_the_grammar_let_it(what, monkeypatch):
    import rosbags.typesys

    monkeypatch.setattr(rosbags.typesys, "get_types_from_msg", lambda text, name: FORGED[what])
    with pytest.raises(SourceError, match="has parts that are no names, numbers or texts"):
        message_types("p/A", "", "ros1msg")


def test_a_bag_with_such_a_definition_is_read_without_it(tmp_path):
    """Types are looked through before the library makes code of them; the other topics remain."""
    from rosbags.typesys import Stores, get_typestore

    from alpacache.converters.ros import open_log

    store, path = get_typestore(Stores.ROS1_NOETIC), tmp_path / "a.bag"
    with rosbag1.Writer(path) as writer:
        good = writer.add_connection("/good", "std_msgs/msg/Empty", typestore=store)
        bad = writer.add_connection("/bad", "p/msg/A", msgdef="string[2000000000] a\n", md5sum="0" * 32)
        for at in range(3):
            writer.write(good, at, b"")
            writer.write(bad, at, b"")
    log = open_log(path)
    assert {name: topic.count for name, topic in log.topics.items()} == {"/good": 3, "/bad": 3}
    assert len([message.read() for message in log.messages(["/good"])]) == 3
    with pytest.raises(SourceError, match="the definition of p/A cannot be read"):
        list(log.messages(["/bad"]))
