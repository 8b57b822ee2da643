"""Times and sizes by card in both READMEs, and on the pages on memory, are those that `plan` works out."""

import re

import pytest
from markdown_pages import ROOT

from alpacache.driving.cameras import SLOTS
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
    assert [row[0] for row in rows] == ["24 GB", "24 GB", "16 GB", "12 GB", "12 GB", "8 GB", "8 GB"]
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


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("README.md", r"takes (\d+) GB of RAM, Super's (\d+), where (2) GB more stay free"),
        ("README.ja.md", r"RAM を (\d+) GB\(Super は (\d+) GB、ほかに (2) GB を空けて"),
    ],
)
def test_ram_of_weights_that_do_not_fit(page, sentence):
    text = (ROOT / page).read_text()
    one, two, spare = map(int, re.search(sentence, text).groups())
    sizes = [planned("12GB", "3060", family, adapters=False).extract.memory.host_bytes / 1e9 for family in (None, "2")]
    assert [one, two] == list(map(round, sizes))
    assert f"RAM {two + spare} GB" in text or f"{two + spare} GB of free RAM" in text


def test_sizes_of_the_commands_for_small_cards():
    text = (ROOT / "docs/how-to/fit-a-card.md").read_text()

    def sizes(budget: str, batch_size: int, trainable: str, **more: object) -> Plan:
        ask = {"samples": 1000, "codec": "int8", "gpu": {"16GB": "4080", "12GB": "4070", "8GB": "4060"}[budget]} | more
        return plan(PlanConfig(memory_budget=budget, batch_size=batch_size, trainable=trainable, **ask))

    def gib(size_bytes: float) -> str:
        return f"{size_bytes / 2**30:.1f}"

    one, four = (sizes("16GB", 4, "lora", **more).memory_bytes for more in ({}, {"cameras": SLOTS}))
    assert f"spare: {gib(one)} GiB planned for one camera at batch 4, {gib(four)} for four." in text
    for budget in ("12GB", "8GB"):
        assert f"where with the batches {gib(sizes(budget, 8, 'all').memory.pinned)} GiB must be free" in text
    assert f"batch 8 with one camera is planned at {gib(sizes('12GB', 8, 'lora').memory_bytes)} GiB" in text


def test_host_memory_of_extract():
    text = (ROOT / "docs/explanation/memory.md").read_text()
    memory = planned("12GB", "3060", None, adapters=False).extract.memory
    told = f"in groups of {memory.group} that is {memory.host_bytes / 2**30:.1f} GiB, of which"
    assert f"{told} {memory.host_weights / 2**30:.1f} are the layers" in text
    few = plan(PlanConfig(samples=1000, memory_budget="12GB", trainable="lora", layers="first:6", hidden_states="none"))
    page = (ROOT / "docs/how-to/fit-a-card.md").read_text()
    assert (
        f"{few.extract.memory.host_weights / 2**30:.1f} GiB in place of {memory.host_weights / 2**30:.0f}"
        in " ".join(page.split())
    )
