"""The basis itself: its algebra, what a tied table asks of it, and when it refuses."""

import pytest
import torch

from nemo_minitron.prune.rotation import principal_basis, selection

H = 40


def moment_of(seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, H, generator=generator, dtype=torch.float64) * torch.logspace(0, -spread, H)
    x = x @ torch.linalg.qr(torch.randn(H, H, generator=generator, dtype=torch.float64)).Q
    return x.T @ x


def test_untied_basis_is_orthonormal_and_keeps_the_most_energy():
    moment = moment_of()
    basis = principal_basis(moment, 24)
    down = basis.down.double()
    torch.testing.assert_close(down @ down.T, torch.eye(24).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis.up, basis.down.T)
    kept = (down @ moment @ down.T).trace()
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(moment)[-24:].sum(), rtol=1e-6, atol=0)


def test_tied_table_reads_and_writes_in_one_basis():
    """``E down^T`` read through a norm of ones gives back ``E g``, up to what all channels together lose."""
    gain = torch.rand(H, generator=torch.Generator().manual_seed(3)) + 1.0
    basis = principal_basis(moment_of(), H, gain)
    torch.testing.assert_close(basis.down @ basis.up, torch.eye(H), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.down.T @ basis.down, torch.diag(gain / gain.median()), atol=1e-5, rtol=0)


def test_channels_of_odd_gain_keep_their_axis():
    gain = torch.ones(H)
    gain[[4, 30]] = torch.tensor([-1.2, 9.0])
    basis = principal_basis(moment_of(), 20, gain)
    for at, channel in enumerate((4, 30)):
        expected = torch.zeros(H)
        expected[channel] = 1
        assert torch.equal(basis.down[at], expected)
        assert torch.equal(basis.up[:, at], expected)
        assert not basis.down[2:, channel].any()


@pytest.mark.parametrize("gain", [torch.arange(H) - H / 2.0, torch.zeros(H)], ids=["both signs", "zero"])
def test_no_basis_where_most_channels_would_stay(gain):
    assert principal_basis(moment_of(), 20, gain) is None


def test_selection_is_an_exact_cut():
    x = torch.randn(3, 7, H)
    channels = torch.tensor([0, 5, 39])
    assert torch.equal(selection(channels, H).project(x), x[..., channels])
