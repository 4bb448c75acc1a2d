"""The order of work: complete, without a deadlock, and as short as it can be."""

import itertools

import pytest

from ovq.parallel.schedule import Step, steps_of_rank


def schedules(num_ranks, num_batches, **options):
    sizes = {"num_ranks": num_ranks, "num_micro_batches": num_batches, **options}
    return [steps_of_rank(rank, **sizes) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_batches", [1, 2, 3, 12])
@pytest.mark.parametrize("max_in_flight", [None, 1, 2])
def test_all_work_is_done_in_order(num_ranks, num_batches, max_in_flight):
    for steps in schedules(num_ranks, num_batches, max_in_flight=max_in_flight):
        for is_forward in (True, False):
            # Of each direction in one order on all ranks, which is the order of the messages.
            order = [step.micro_batch for step in steps if step.is_forward == is_forward]
            assert order == list(range(num_batches))
        for m in range(num_batches):
            assert steps.index(Step(micro_batch=m, is_forward=True)) < steps.index(
                Step(micro_batch=m, is_forward=False)
            )
        assert most_kept(steps) <= (max_in_flight or num_ranks)


def most_kept(steps):
    """Micro-batches whose backward is still to come, at most."""
    return max(itertools.accumulate(1 if step.is_forward else -1 for step in steps))


def simulate(schedules, *, num_layers, forward=1.0, backward=2.0):
    """Time until all ranks are done, if messages take no time, from the times of one layer."""
    # When each unit was done, by rank, step and number of layers.
    done = {}
    clocks, places = [0.0] * len(schedules), [0] * len(schedules)
    while any(place < len(steps) for place, steps in zip(places, schedules, strict=True)):
        has_moved = False
        for rank, steps in enumerate(schedules):
            while places[rank] < len(steps):
                step = steps[places[rank]]
                neighbour = rank - 1 if step.is_forward else rank + 1
                if 0 <= neighbour < len(schedules) and (neighbour, step, num_layers) not in done:
                    break
                for layer in range(1, num_layers + 1):
                    ready = done.get((neighbour, step, layer), 0.0)
                    clocks[rank] = max(clocks[rank], ready) + (forward if step.is_forward else backward)
                    done[rank, step, layer] = clocks[rank]
                places[rank] += 1
                has_moved = True
        if not has_moved:
            waiting = {
                rank: str(steps[place])
                for rank, (steps, place) in enumerate(zip(schedules, places, strict=True))
                if place < len(steps)
            }
            raise ValueError(f"expected an order that ends, found ranks that wait for ever: {waiting}")
    return max(clocks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_batches", [1, 2, 3, 12])
@pytest.mark.parametrize("num_layers", [1, 2, 24])
def test_nobody_waits_longer_than_the_first_and_the_last_must(num_ranks, num_batches, num_layers):
    for forward, backward in ((1, 2), (1, 1), (3, 4)):
        taken = simulate(
            schedules(num_ranks, num_batches), num_layers=num_layers, forward=forward, backward=backward
        )
        assert taken == (num_batches * num_layers + num_ranks - 1) * (forward + backward)


def test_less_memory_costs_time():
    times = [simulate(schedules(4, 8, max_in_flight=n), num_layers=6) for n in (1, 2, 3, 4, None)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1] > times[2] > times[3] == times[4]


def test_ranks_that_wait_for_each_other_are_found():
    forward, backward = (Step(micro_batch=0, is_forward=is_forward) for is_forward in (True, False))
    with pytest.raises(ValueError, match=r"wait for ever: \{0: 'B0', 1: 'F0'\}"):
        simulate([[backward, forward], [forward, backward]], num_layers=2)
