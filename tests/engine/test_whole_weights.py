"""Whole weights under ZeRO-3, on two real ranks: sampling apart inside the block, training as if it had not been."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.engine import whole_weights_of


def test_other_modules_and_engines_are_left_as_they_are():
    model = nn.Linear(2, 2)
    model.optimizer = torch.optim.SGD(model.parameters())
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(1))
    with whole_weights_of(model):
        model(torch.ones(1, 2))
    assert calls == [1]
