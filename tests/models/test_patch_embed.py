from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm2vec.models.vision.patch_embed import PatchConv2d, PatchConv3d, use_matrix_products


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 12, 20)),
        (nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 14, 21)),  # what does not fill a patch is left out
        (nn.Conv2d(3, 8, (4, 6), stride=(4, 6), padding="valid"), (1, 3, 8, 12)),
        (nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
        (nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (1, 3, 4, 8, 12)),
    ],
)
def test_value_and_gradients_are_those_of_the_convolution(conv: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = []
    for changed in (0, 1):
        pixels = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        if changed:
            names = list(conv.state_dict())
            assert use_matrix_products(conv) == 1
            assert isinstance(conv, PatchConv2d | PatchConv3d) and list(conv.state_dict()) == names
        conv.zero_grad()
        output = conv(pixels)
        (output**2).sum().backward()
        found.append([output, pixels.grad, *[p.grad.clone() for p in conv.parameters()]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=1),
        nn.Conv2d(4, 8, 4, stride=4, groups=2),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Conv2d(3, 8, 1),
    ],
)
def test_any_other_convolution_stays_what_it_is(conv: nn.Module) -> None:
    assert use_matrix_products(nn.Sequential(conv)) == 0
    assert type(conv) is nn.Conv2d
