import threading

import pytest

from cache_store.concurrency import in_order


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order_and_are_asked_for_only_as_they_are_taken(threads) -> None:
    asked = []

    def items():
        for item in range(50):
            asked.append(item)
            yield item

    results = in_order(lambda item: item * item, items(), threads)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(asked) <= 3 + 2 * threads
    assert list(results) == [item * item for item in range(3, 50)]


def test_several_are_under_way_at_once() -> None:
    together = threading.Barrier(3, timeout=60)
    assert list(in_order(lambda item: (together.wait(), item)[1], range(6), 3)) == list(range(6))


def test_the_first_error_is_raised_in_its_place_and_nothing_begun_after_it() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    results = in_order(work, range(1000), 2)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(begun) < 15
