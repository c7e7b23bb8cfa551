import torch
from torch.nn import functional as F

from gblr_plugin.learning.proximal import prox_and_clip_


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [torch.randn(2, k, generator=generator) * 0.7 + 0.5 for k in (3, 8, 1)]
    locations = [torch.randn(2, k, generator=generator) * 3 for k in (3, 8, 1)]
    return widths, locations


def test_is_algorithm_1_on_each_layer():
    widths, locations = draw()
    thresholds = torch.tensor([0.0, 0.05, 0.3], dtype=torch.float64)
    expected = [F.softshrink(w, t.item()).clamp(0, 1) for w, t in zip(widths, thresholds, strict=True)]
    wrapped = [x - x.floor() for x in locations]
    prox_and_clip_(widths, locations, thresholds)
    for a, b in zip(widths + locations, expected + wrapped, strict=True):
        torch.testing.assert_close(a, b)


def test_negative_threshold_grows_live_widths_only():
    widths = [torch.tensor([[0.0, 0.5, 0.95], [-0.1, 0.2, 1.0]])]
    prox_and_clip_(widths, [torch.zeros(2, 3)], torch.tensor([-0.1]))
    torch.testing.assert_close(widths[0], torch.tensor([[0.0, 0.6, 1.0], [0.0, 0.3, 1.0]]))


def test_a_width_that_the_gradient_made_negative_is_dead():
    widths = [torch.tensor([[-0.1, 0.5], [-0.02, 0.0]])]
    prox_and_clip_(widths, [torch.zeros(2, 2)], torch.tensor([-0.3]))
    torch.testing.assert_close(widths[0], torch.tensor([[0.0, 0.8], [0.0, 0.0]]))


def test_works_in_place_on_parameters():
    width = torch.nn.Parameter(torch.full((2, 2), 0.5))
    location = torch.nn.Parameter(torch.full((2, 2), 1.25))
    storage = width.data_ptr(), location.data_ptr()
    prox_and_clip_([width], [location], torch.tensor([0.125]))
    assert (width.data_ptr(), location.data_ptr()) == storage
    assert width.eq(0.375).all()
    assert location.eq(0.25).all()
    assert width.requires_grad
    assert width.is_leaf


def test_fused_calls_do_not_grow_with_layers():
    # On a CPU a foreach call loops inside; on CUDA it is one kernel.
    assert count_foreach(2) == count_foreach(9) == 3


def count_foreach(num):
    widths, locations = [torch.rand(2, 4) for _ in range(num)], [torch.rand(2, 4) for _ in range(num)]
    with torch.profiler.profile() as profile:
        prox_and_clip_(widths, locations, torch.zeros(num))
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::_foreach"))


def test_no_layers():
    prox_and_clip_([], [], torch.zeros(0))
