"""The how-to on AlpaSim: its class asks for the text of each command. AlpaSim itself is not here; stand-ins are."""

import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from markdown_pages import ROOT, blocks

from alpacache.driving.cameras import CAMERAS
from alpacache.driving.route import command_of

(CODE,) = (block.code for block in blocks(ROOT / "docs/how-to/closed-loop.md", "python"))
DriveCommand = enum.IntEnum("DriveCommand", {"LEFT": 0, "STRAIGHT": 1, "RIGHT": 2, "UNKNOWN": 3})


class PublicModel:
    """What the page's class relies on of `Alpamayo15Model`: it builds a message from pictures while it predicts."""

    camera_ids = ("camera_front_tele_30fov", "camera_cross_left_120fov", "camera_front_wide_120fov")

    def __init__(self):
        self._helper = SimpleNamespace(create_message=lambda frames, cameras, nav_text: (frames, cameras, nav_text))

    def predict(self, prediction_input):
        return self._create_chat_message(torch.zeros(3, 4, 3, 8, 16))


@pytest.fixture
def page(monkeypatch):
    """What the page's code defines, beside stand-ins for AlpaSim's modules."""
    models, base = ModuleType("alpasim_driver.models"), ModuleType("alpasim_driver.models.alpamayo_base")
    models.Alpamayo15Model, models.DriveCommand = PublicModel, DriveCommand
    base.CAMERA_NAME_TO_INDEX = {name: place for place, name in enumerate(CAMERAS)}
    for module in (ModuleType("alpasim_driver"), models, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    names = {"__name__": "page"}
    exec(compile(CODE, "page", "exec"), names)
    return names


@pytest.mark.parametrize("command", DriveCommand, ids=lambda command: command.name)
def test_the_class_asks_for_the_text_of_the_newest_command(page, command):
    model = page["CommandedAlpamayo15"]()
    for newest in (DriveCommand.LEFT, command):
        frames, cameras, text = model.predict(SimpleNamespace(command=newest))
    assert frames.shape == (12, 3, 8, 16)
    assert cameras.tolist() == [0, 1, 6]
    assert command_of(text) == {"UNKNOWN": "none"}.get(command.name, command.name.lower())
