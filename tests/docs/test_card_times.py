"""The times by card in both READMEs are those that `plan` works out."""

import re

import pytest
from markdown_pages import ROOT

from alpacache.planning.config import PlanConfig
from alpacache.planning.plan import Plan, plan

ROW = re.compile(r"\| (\d+ GB), RTX (\d+)([^|]*) \| (\d+) ?\S+ \| (\d+) ?\S+ \| (\d+) ?\S+ \| (\d+) ?\S+ \|")


def planned(budget: str, gpu: str, family: str | None, *, adapters: bool) -> Plan:
    return plan(
        PlanConfig(
            samples=3000,
            codec="int8",
            epochs=10,
            batch_size=8,
            gpu=gpu,
            memory_budget=budget.replace(" ", ""),
            family=family,
            trainable="lora" if adapters else "all",
        )
    )


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_both_stages_on_each_card(page):
    rows = ROW.findall((ROOT / page).read_text())
    assert [row[0] for row in rows] == ["24 GB", "24 GB", "16 GB", "12 GB", "12 GB", "8 GB"]
    for budget, gpu, note, *minutes in rows:
        plans = [planned(budget, gpu, family, adapters=bool(note)) for family in (None, "2")]
        assert [int(told) for told in minutes] == [
            round(60 * hours) for each in plans for hours in (each.extract.hours, each.train.hours)
        ]
        for each in plans:
            assert each.memory_bytes <= each.cap_bytes
            assert each.extract.memory.device_bytes <= each.cap_bytes
        if gpu == "4090":
            assert [round(each.loop.hours, 1) for each in plans] == [2.1, 7.8]
            assert [round(each.store_bytes / 1e9) for each in plans] == [210, 370]
