"""oneDNN's linear layers against PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from rlhf.numerics.cpu import CPULinear, has_onednn, product, speed_up_linears, weight_gradient

BUILT_WITH_IT = "USE_MKLDNN=ON" in torch.__config__.show()
pytestmark = pytest.mark.skipif(not BUILT_WITH_IT, reason="this build of PyTorch has no oneDNN operators")


def test_the_operators_are_found_where_pytorch_was_built_with_them():
    assert has_onednn()


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (1, 8), (8,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [3, 40])
def test_outputs_and_gradients(shape, bias, outputs):
    torch.manual_seed(0)
    plain = nn.Linear(8, outputs, bias=bias)
    fast = nn.Sequential(copy.deepcopy(plain))
    speed_up_linears(fast)
    assert type(fast[0]) is CPULinear
    results = []
    for layer in (plain, fast):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * up).sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)


def test_a_gradient_that_is_not_contiguous_and_one_that_is_expanded():
    torch.manual_seed(0)
    plain = nn.Linear(6, 10)
    fast = copy.deepcopy(plain)
    speed_up_linears(fast)
    for layer in (plain, fast):
        layer(torch.arange(24.0).view(4, 6)).t().reshape(-1)[::2].sum().backward()
        layer(torch.arange(24.0).view(4, 6)).sum().backward()
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad)
    torch.testing.assert_close(fast.bias.grad, plain.bias.grad)


def test_only_plain_float32_layers_are_changed_and_a_frozen_one_gets_no_gradient():
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4)])
    names = list(model.state_dict())
    speed_up_linears(model)
    assert [type(module) for module in model] == [CPULinear, Own, nn.Linear, nn.LayerNorm]
    assert list(model.state_dict()) == names
    model[0].requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    model[0](x).sum().backward()
    assert x.grad is not None and model[0].weight.grad is None and model[0].bias.grad is None


def test_other_dtypes_and_autocast_take_pytorchs_way():
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    speed_up_linears(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    layer.bfloat16()
    assert layer(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    x, weight = torch.randn(2, 4).double(), torch.randn(6, 4).double()
    assert torch.equal(product(x, weight), x @ weight.T)


@pytest.mark.parametrize(("outputs", "inputs"), [(3, 9), (9, 3)])
def test_weight_gradient_of_wide_and_narrow_layers(outputs, inputs):
    torch.manual_seed(0)
    grad, x = torch.randn(7, outputs), torch.randn(7, inputs)
    torch.testing.assert_close(weight_gradient(grad, x), grad.T @ x, atol=1e-5, rtol=1e-5)
