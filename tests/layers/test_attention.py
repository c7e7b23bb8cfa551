import pytest
import torch
from torch import nn

from gblr_plugin.layers.attention import PROJECTIONS, ProjectedAttention, take_projections


def filled(attention):
    """Biases begin at zero, and would hide an error."""
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 5)
    return attention


KINDS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False, "batch_first": True},
    "other sizes of keys and values": {"kdim": 12, "vdim": 20, "batch_first": True},
    "biases and zeros attended to": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def inputs(attention, batch, queries=5, keys=7):
    sizes = ((queries, 16), (keys, attention.kdim), (keys, attention.vdim))
    if batch is None:
        return [torch.randn(*size) for size in sizes]
    return [
        torch.randn(batch, *size) if attention.batch_first else torch.randn(size[0], batch, size[1]) for size in sizes
    ]


def masks(batch, queries, keys):
    """Each kind of mask that torch takes: none, boolean and added ones, by head, with padding."""
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(2)
    padding = torch.zeros(batch or 1, keys, dtype=torch.bool)
    padding[-1, -2:] = True
    padding = padding[0] if batch is None else padding
    heads = torch.randn((batch or 1) * 4, queries, keys)
    return {
        "none": {},
        "boolean": {"attn_mask": hidden},
        "added": {"attn_mask": torch.randn(queries, keys)},
        "heads": {"attn_mask": heads},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "weights of heads": {"attn_mask": hidden, "average_attn_weights": False},
        "no weights": {"attn_mask": heads, "need_weights": False},
        "causal": {"attn_mask": hidden, "is_causal": True, "need_weights": True},
    }


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("mask", masks(1, 1, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_torchs_attention_computes(kind, mask, batch):
    torch.manual_seed(0)
    attention = filled(nn.MultiheadAttention(16, 4, **KINDS[kind])).eval()
    layers = ProjectedAttention(attention)
    x, options = inputs(attention, batch), masks(batch, 5, 7)[mask]
    for training in (False, True):
        expected, weights = attention.train(training)(*x, **options)
        found, own = layers.train(training)(*x, **options)
        torch.testing.assert_close(found, expected)
        assert (own is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(own, weights)


def test_self_attention_without_gradients_as_torchs_fused_kernel_computes_it():
    torch.manual_seed(0)
    attention = filled(nn.MultiheadAttention(16, 4, batch_first=True)).eval()
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(ProjectedAttention(attention)(x, x, x)[0], attention(x, x, x)[0])


def test_dropout_falls_on_the_weights():
    torch.manual_seed(0)
    layers = ProjectedAttention(nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True))
    x = torch.randn(2, 6, 16)
    _, weights = layers(x, x, x, average_attn_weights=False)
    assert 0.3 < float((weights == 0).float().mean()) < 0.7


def test_a_causal_hint_needs_its_mask_as_there():
    layers = ProjectedAttention(nn.MultiheadAttention(16, 4))
    x = torch.randn(6, 16)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layers(x, x, x, is_causal=True)


@pytest.mark.parametrize("nested", [True, False])
def test_torchs_encoder_leaves_its_fused_kernels(nested):
    """With padding and without gradients it would pass nested tensors to a kernel that reads packed weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)).eval()
    x, padding = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        for block in encoder.layers:
            block.self_attn = ProjectedAttention(block.self_attn)
        found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_parameters_flags_and_mode_are_taken_over_and_written_back():
    attention = filled(nn.MultiheadAttention(16, 4)).eval()
    attention.in_proj_weight.requires_grad_(False)
    layers = ProjectedAttention(attention)
    assert [layers.get_submodule(name).weight.requires_grad for name in PROJECTIONS] == [False] * 3 + [True]
    assert layers.q_proj.bias.requires_grad
    assert not layers.training
    assert layers.out_proj.weight is attention.out_proj.weight
    with torch.no_grad():
        layers.k_proj.bias.fill_(7)
        layers.v_proj.weight.fill_(3)
    assert take_projections(attention, layers) is attention
    assert torch.equal(attention.in_proj_bias[16:32], torch.full((16,), 7.0))
    assert torch.equal(attention.in_proj_weight[32:], torch.full((16, 16), 3.0))
