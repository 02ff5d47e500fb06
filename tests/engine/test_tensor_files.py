"""The files that tensors are written to: what other programs may rely on when they read them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhf.engine.tensor_files import TensorSource, shards, write_tensors


def sources(**tensors: torch.Tensor) -> list[TensorSource]:
    return [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize("letters", range(1, 9))
def test_tensors_begin_at_a_multiple_of_eight_bytes_however_long_their_names_are(tmp_path, letters):
    path, wanted = tmp_path / "a.safetensors", torch.tensor([1.5, -2.0], dtype=torch.float64)
    write_tensors(path, sources(**{"w" * letters: wanted}), iter([wanted]), {"of": "a test"})
    written = path.read_bytes()
    header = int.from_bytes(written[:8], "little")
    assert header % 8 == 0 and json.loads(written[8 : 8 + header])["__metadata__"] == {"format": "pt", "of": "a test"}
    assert torch.equal(load_file(path)["w" * letters], wanted)


def test_wide_elements_go_first_and_a_tensor_beyond_the_limit_goes_alone():
    half, large = torch.ones(3, dtype=torch.float16), torch.ones(9)
    groups = shards(sources(half=half, large=large, small=torch.ones(2), double=torch.ones(1).double()), limit=16)
    assert [[source.key for source in group] for group in groups] == [["double"], ["large"], ["small", "half"]]
