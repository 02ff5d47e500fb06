"""The arithmetic of a batch, and that any number of devices learns and samples what one does."""

from __future__ import annotations

import pytest
import torch

from rlhf.config import ConfigError
from rlhf.engine import BatchPlan


@pytest.mark.parametrize(
    ("sizes", "most", "accumulation", "deepspeed"),
    [
        ((96, 8, 4), 24, 3, (96, 8, 3)),
        ((8, 8, 1), 8, 1, (8, 8, 1)),
        ((16, 16, 2), 8, 1, (16, 8, 1)),  # the default run on two devices
        ((16, 16, 3), 6, 1, (18, 6, 1)),
        ((100, 8, 4), 25, 4, (112, 7, 4)),
        ((3, 8, 1), 3, 1, (3, 3, 1)),
        ((7, 2, 7), 1, 1, (7, 1, 1)),
        ((26, 8, 2), 13, 2, (28, 7, 2)),
    ],
)
def test_micro_batches_shrink_to_what_a_device_has(sizes, most, accumulation, deepspeed):
    plan = BatchPlan(*sizes)
    assert (plan.most_per_device, plan.accumulation_steps) == (most, accumulation)
    assert tuple(plan.deepspeed_numbers.values()) == deepspeed
    total, micro, steps = deepspeed
    assert total == micro * steps * plan.world_size and micro <= plan.micro_batch_size


@pytest.mark.parametrize("sizes", [(0, 8, 1), (8, 0, 1), (8, 8, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ConfigError, match="=0 must be at least 1"):
        BatchPlan(*sizes)


def test_fewer_sequences_than_devices_name_the_remedy_that_changes_no_result_first():
    with pytest.raises(ConfigError) as caught:
        BatchPlan(6, 2, 8)
    message = str(caught.value)
    assert "global_batch_size=6 leaves 2 of 8 devices without a sequence" in message
    assert (
        0
        < message.index("--num_devices 6")
        < message.index("learns the same")
        < message.index("global_batch_size=8 or more")
    )
    assert BatchPlan(6, 2, 6).accumulation_steps == BatchPlan(8, 2, 8).accumulation_steps == 1


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("micro", [1, 2, 3, 8, 64])
def test_every_row_goes_through_once_and_within_the_budget(world, micro):
    for seed, total in enumerate((world, world + 1, 2 * world - 1, 16, 31, 64)):
        generator = torch.Generator().manual_seed(seed)
        for low in (9, 2, 10):  # of much the same length, of very different ones, all the same
            lengths = torch.randint(low, 11, (max(total, world),), generator=generator).tolist()
            parts = BatchPlan(len(lengths), micro, world).micro_batches(lengths)
            assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
            assert len(parts) % world == 0 and all(parts)
            sizes = [sum(lengths[index] for index in part) for part in parts]
            divided = micro > 1 or len(lengths) % world == 0
            assert max(sizes) <= (micro if divided else 2) * max(lengths)
