"""The maths on a case that can be seen at once, and everything that foveate asks of a method."""

import torch
from foveate_unlike import unlikeness

from foveate.testing import check_method


def test_the_odd_token_is_the_least_like_the_mean():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]]])
    assert unlikeness(features).argmax() == 2


def test_it_is_a_method():
    print(check_method("unlike", keep=0.25, families=["llava", "qwen2_5_vl"]))  # without families: all that fit
