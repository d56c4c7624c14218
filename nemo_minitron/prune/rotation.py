"""A rotation of the residual stream after which the channels that are cut carry the least energy.

RMSNorm without its weights does not see an orthogonal map of its input, and the weights fold into what reads it. The
stream may therefore be turned as a whole, and the student keeps the directions in which the calibration tokens have the
most energy instead of single channels (SliceGPT, arXiv 2401.15024, with one rotation for all layers, so that the
residual connections stay plain). What comes out is an ordinary Llama; its channels are mixtures of the source's.

A tied table reads and writes in one basis, and the final norm's weights g stand between: turning them alone would mix
channels of different g. So the table is turned as ``E g^(1/2) Q``, which leaves a final norm of ones, at the price of
norms that see a stream whose channels are stretched by ``g^(1/2)``. That is a few percent where g is nearly the same
everywhere; channels where it is not keep their own axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FARTHEST = 2.0
"""A final norm's weight this many times the median, or its inverse, or less, keeps its channel's own axis."""


@dataclass(frozen=True)
class Basis:
    """The student's stream is ``down @ x``; what read ``x`` reads it through ``up``.

    Attributes:
        down: ``[k, H]`` float32. up: ``[H, k]`` float32, ``down @ up`` is the identity.
    """

    down: Tensor
    up: Tensor

    def project(self, stream: Tensor) -> Tensor:
        """``[…, H]`` → ``[…, k]``."""
        return stream @ self.down.T


def selection(channels: Tensor, size: int) -> Basis:
    """The basis that keeps ``channels`` (int64 ``[k]``) of ``size`` as they are."""
    down = torch.zeros(len(channels), size, device=channels.device)
    down[torch.arange(len(channels)), channels] = 1.0
    return Basis(down, down.T.contiguous())


def principal_basis(moment: Tensor, size: int, tied_gain: Tensor | None = None) -> Basis | None:
    """The ``size`` directions of most energy.

    Args:
        moment: ``[H, H]`` float64, second moment of the stream over tokens and depths, each token relative to its
            mean square (:class:`nemo_minitron.importance.scores.Scores`, ``stream_moment``).
        tied_gain: ``[H]`` final norm weights of a model whose output layer is the embedding; None for an untied one.

    Returns:
        float32 on the device of ``moment``; None where too many channels would have to keep their own axis.
    """
    hidden = len(moment)
    stretch = torch.ones(hidden, dtype=torch.float64, device=moment.device)
    alone = torch.zeros(hidden, dtype=torch.bool, device=moment.device)
    if tied_gain is not None:
        gain = tied_gain.double()
        ratio = gain / gain.median()
        alone = ~((ratio < FARTHEST) & (ratio > 1 / FARTHEST))
        stretch[~alone] = ratio[~alone].sqrt()
    if int(alone.sum()) > size // 2:
        return None
    turned = (~alone).nonzero().flatten()
    stretched = moment * stretch * stretch[:, None]
    vectors = torch.linalg.eigh(stretched[turned][:, turned]).eigenvectors.flip(1)
    own = alone.nonzero().flatten()
    basis = torch.zeros(size, hidden, dtype=torch.float64, device=moment.device)
    basis[torch.arange(len(own)), own] = 1.0
    basis[len(own) :, turned] = vectors[:, : size - len(own)].T
    return Basis((basis * stretch).float().contiguous(), (basis / stretch).T.float().contiguous())
