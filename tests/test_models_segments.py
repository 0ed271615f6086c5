"""The attention of short bfloat16 sequences equals torch's, and nobody sees what comes later."""

import pytest
import torch

from fedmezo.models import segments

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("heads, groups", [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("count, length", [(1, 64), (2, 63), (16, 23), (3, 130), (1, 512)])
def test_short_attention_is_torchs(count, length, heads, groups):
    q, k, v = draw(count, heads, length, 16), draw(count, groups, length, 16), draw(count, groups, length, 16)
    got = segments._attend_short(q, k, v, scale=0.25)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=0.25, enable_gqa=heads != groups
    )
    assert got.shape == wanted.shape and got.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def test_nobody_sees_what_comes_later():
    q, k, v = draw(2, 4, 40, 16), draw(2, 2, 40, 16), draw(2, 2, 40, 16)
    before = segments._attend_short(q, k, v, scale=0.25)
    k[:, :, 25:], v[:, :, 25:] = 7.0, torch.nan
    assert torch.equal(segments._attend_short(q[:, :, :25], k[:, :, :25], v[:, :, :25], scale=0.25), before[:, :, :25])


def test_it_is_used_where_it_pays(monkeypatch):
    seen = []
    monkeypatch.setattr(segments, "_attend_short", lambda q, k, v, *, scale: seen.append(q.shape) or q)

    def attend(count, length, *, dtype=torch.bfloat16, plain=False):
        part = draw(count, 2, length, 16).to(dtype)
        seen.clear()
        segments._attend(part, part, part, scale=None, plain=plain)
        return bool(seen)

    assert attend(2, 32) and attend(1, 64) and not attend(1, 63) and not attend(1, 513)
    assert not attend(2, 64, dtype=torch.float32) and not attend(2, 64, plain=True)
    torch.set_num_threads(2)
    assert not attend(2, 64)
