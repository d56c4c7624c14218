"""Second moments of activations, and what is solved from them: ridge regression and backward elimination.

Activations may be of any float dtype; products are float32 and their sums over chunks of tokens float64. Moments are
additive: :func:`two_pass_moments` adds those of a group's processes, and the others leave that to their caller.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_minitron import parallel

TOKENS_AT_ONCE = 4096
"""Tokens per float32 product before it is added in float64."""


BIAS_TOKENS = 64.0
"""Tokens whose errors a solved bias' distance from what it was counts as: a handful of tokens decides nothing."""


class SingularMoments(UserWarning):
    """Calibration that does not determine a solution; the caller's fallback is in the message."""


_ROWS_AT_ONCE = 1024  # of a float32 product that are widened and added: a large moment has no room for a second one


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Have a GPU multiply float32 matrices in TF32: factors rounded to 11 bits, sums in float32.

    That is several times as fast. Weights stored in bfloat16 are exact in it; activations lose an eighth of what they
    lose in a bfloat16 model; a second moment is that of the rounded activations, and so still positive semi-definite.
    On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def second_moment(
    x: Tensor, y: Tensor, weights: Tensor | None = None, quantum: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Uncentred ``sum_t w_t x_t y_t^T``.

    Args:
        x: ``[…, C]``; y: ``[…, D]``, the same leading sizes. weights: ``[…]``, one per token; None: all 1.
        quantum: of :func:`quantum`; products are rounded to its multiples, so that their sum does not depend on order.
        out: ``[C, D]`` float64, is added to and returned; beside it there is one float32 product at a time.

    Returns:
        ``[C, D]`` float64 on the device of ``x``. Adding parts over tokens gives the whole.
    """
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device) if out is None else out
    weights = None if weights is None else weights.flatten().float()
    for start in range(0, len(x), TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        left = x[some].float()
        if weights is not None:
            left = left * weights[some, None]
        product = left.T @ y[some].float()
        for row in range(0, len(product), _ROWS_AT_ONCE):
            part = product[row : row + _ROWS_AT_ONCE].double()
            if quantum:  # adding 1.5 * 2^52 quanta leaves no bits for fractions of one; half the passes of round()
                part.add_(1.5 * 2.0**52 * quantum).sub_(1.5 * 2.0**52 * quantum)
            total[row : row + _ROWS_AT_ONCE] += part
    return total


def squares(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_t w_t x_t^2`` per channel: ``[…, C]`` → ``[C]`` float64; the diagonal of the second moment."""
    square = x.float().square()
    if weights is not None:
        square = square * weights.float()[..., None]
    return square.flatten(0, -2).double().sum(dim=0)


def quantum(x_squares: Tensor, y_squares: Tensor) -> float:
    """A power of two to whose multiples products may be rounded so that float64 adds them without any error.

    By Cauchy and Schwarz no partial sum of products exceeds ``sqrt(max(x_squares) max(y_squares))``, the sums of
    squares of all tokens of the job; 2^51 quanta cover twice that. Sums of moments are then the same bits whatever
    process saw which sample.
    """
    bound = math.sqrt(float(x_squares.max()) * float(y_squares.max()))
    return 2.0 ** (math.ceil(math.log2(bound)) - 50) if bound > 0 and math.isfinite(bound) else 0.0


def two_pass_moments(
    parts: Callable[[int], tuple[Tensor, Tensor, Tensor | None]],
    samples: int,
    sizes: tuple[int, int],
    device: torch.device,
    group: parallel.Group = None,
) -> tuple[Tensor, Tensor]:
    """``sum w x x^T`` and ``sum w x y^T`` over a job's samples, the same bits on every grid.

    Two passes over the samples: the first for the :func:`quantum` of the second's products.

    Args:
        parts: gives x ``[…, C]``, y ``[…, D]`` and weights ``[…]`` (None: all 1) of one of this process's samples, by
            its number; called twice for each, so that nothing need be kept.
        samples: of this process, 0 or more. sizes: C and D.
        group: the processes that share the samples; all get the same sums.

    Returns:
        ``[C, C]`` and ``[C, D]`` float64 on ``device``.
    """
    x_squares, y_squares = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
    for sample in range(samples):
        x, y, weights = parts(sample)
        x_squares += squares(x, weights)
        y_squares += squares(y, weights)
    x_squares, y_squares = (parallel.all_reduce(value, group) for value in (x_squares, y_squares))
    own, other = quantum(x_squares, x_squares), quantum(x_squares, y_squares)
    moment, cross = (torch.zeros(sizes[0], size, dtype=torch.float64, device=device) for size in sizes)
    for sample in range(samples):
        x, y, weights = parts(sample)
        second_moment(x, x, weights, own, out=moment)
        second_moment(x, y, weights, other, out=cross)
    return parallel.all_reduce(moment, group), parallel.all_reduce(cross, group)


def ridge_solve(moment: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """The W nearest to explaining y by ``W x``: ``argmin sum_t |W x_t - y_t|^2 + lam |W - prior|^2``.

    ``lam = ridge * mean(diag(moment))``, so that ``ridge`` has no unit. In closed form
    ``W = (cross^T + lam prior) (moment + lam I)^-1``, by Cholesky in float64.

    Args:
        moment: ``[C, C]`` sum of ``x x^T``. cross: ``[C, D]`` sum of ``x y^T``. prior: ``[D, C]``.

    Returns:
        ``[D, C]`` in the dtype of ``prior``. Where even the regularised moment is singular or not finite (no token, or
        all activations zero), ``prior`` itself, with a :class:`SingularMoments` warning.
    """
    lam = ridge * moment.diagonal().mean()
    regularised = moment.clone()
    regularised.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(regularised)
    del regularised
    if int(info) or not torch.isfinite(factor.diagonal()).all() or not float(lam) > 0:
        warnings.warn(
            "compensation: the calibration tokens do not determine these weights (their second moment is singular); "
            "they are kept as they were",
            SingularMoments,
            stacklevel=2,
        )
        return prior
    return torch.cholesky_solve(cross + lam * prior.T.to(cross), factor).T.to(prior.dtype)


def with_ones(x: Tensor) -> Tensor:
    """``[…, C]`` → ``[…, C+1]``: inputs with a constant, whose coefficients are a bias."""
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), dim=-1)


def around_mean(moment: Tensor) -> Tensor:
    """Second moment of inputs once the best bias has taken what is constant: ``[C+1, C+1]`` of :func:`with_ones` →
    ``[C, C]``."""
    mean = moment[:-1, -1]
    return moment[:-1, :-1] - torch.outer(mean, mean) / moment[-1, -1].clamp_min(torch.finfo(moment.dtype).tiny)


def ridge_solve_with_bias(
    moment: Tensor, cross: Tensor, prior: Tensor, bias: Tensor, ridge: float, tokens: int
) -> tuple[Tensor, Tensor]:
    """The W and b nearest to explaining y by ``W x + b``: :func:`ridge_solve` with a constant among the inputs.

    ``argmin sum_t w_t |W x_t + b - y_t|^2 + lam |W - prior|^2 + p |b - bias|^2``. ``lam`` is relative to the moment of
    x around its mean; p is worth ``BIAS_TOKENS`` tokens of mean weight.

    Args:
        moment: ``[C+1, C+1]`` of :func:`with_ones` of x. cross: ``[C+1, D]``. prior: ``[D, C]``. bias: ``[D]``.
        tokens: number of the job's tokens t.

    Returns:
        ``[D, C]`` and ``[D]`` in the dtypes of ``prior`` and ``bias``; where :func:`ridge_solve` keeps the prior, the
        best b beside it.
    """
    pull = BIAS_TOKENS * moment[-1, -1] / tokens
    mean, weight = moment[:-1, -1], moment[-1, -1] + pull
    if not float(weight) > 0:
        return ridge_solve(moment[:-1, :-1], cross[:-1], prior, ridge), bias
    total = cross[-1] + pull * bias.to(cross)
    centred = moment[:-1, :-1] - torch.outer(mean, mean) / weight
    solved = ridge_solve(centred, cross[:-1] - torch.outer(mean, total) / weight, prior, ridge)
    return solved, ((total - solved.to(cross) @ mean) / weight).to(bias.dtype)


def elimination_order(
    moment: Tensor, weight: Tensor, ridge: float, unit: int = 1, steps: int = 64, *, overwrite: bool = False
) -> Tensor:
    """Rank units by what removing them costs once the others have been re-solved: backward elimination.

    The output is ``weight @ x``. Removing the inputs R and re-solving the rest adds
    ``tr(W_R (P_RR)^-1 W_R^T)`` to its squared error, P being the inverse moment of the inputs that are left
    (Optimal Brain Surgeon, Hassibi & Stork 1993; for whole units arXiv 2302.04089). The cheapest units go first, a few
    per step, and W and P are updated after each step.

    Args:
        moment: ``[C, C]`` float64, sum of ``x x^T`` over tokens, weighted as the error is.
        weight: ``[D, C]``; premultiply it with a square root of the output metric to measure the error by it.
        ridge: added to the diagonal, in units of its mean.
        unit: consecutive inputs that go together (1 for a neuron, d for a head, r*d for a query group).
        steps: passes in which all units are removed; more is slower and a little better.
        overwrite: work in ``moment`` itself, which for the FFN of an 8B is 1.6 GB.

    Returns:
        ``[C / unit]`` float64 on the device of ``moment``, a permutation of 0 … C/unit - 1: the last to go, the most
        worth, has the largest.
    """
    units = len(moment) // unit
    lam = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = moment.to(torch.float64, copy=not overwrite)
    inverse.diagonal().add_(lam)
    torch.linalg.cholesky(inverse, out=inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    weight = weight.to(torch.float64, copy=True)
    device = moment.device
    worth = torch.empty(units, dtype=torch.float64, device=device)
    names = torch.arange(units, device=device)  # of the units that rows and columns stand for
    left = torch.ones(units, dtype=torch.bool, device=device)
    at_once = -(-units // steps)
    done = 0
    while done < units:
        alive = left.nonzero().flatten()
        if len(alive) < 0.7 * len(names):  # what is gone costs time in every update
            keep = _inputs(alive, unit)
            inverse, weight = inverse[keep[:, None], keep], weight[:, keep]
            names, alive = names[alive], torch.arange(len(alive), device=device)
            left = torch.ones(len(names), dtype=torch.bool, device=device)
        cost = _removal_cost(inverse, weight, unit)[alive]
        gone = alive[cost.argsort(stable=True)[:at_once]]
        worth[names[gone]] = torch.arange(done, done + len(gone), dtype=torch.float64, device=device)
        done += len(gone)
        left[gone] = False
        rows = _inputs(gone, unit)
        update = torch.linalg.solve(inverse[rows][:, rows], inverse[rows])  # [R, C]
        weight.addmm_(weight[:, rows], update, alpha=-1)
        inverse.addmm_(inverse[:, rows], update, alpha=-1)
        weight[:, rows] = 0
        inverse[rows, rows] = 1.0  # gone: any number that can be divided by
    return worth


def _inputs(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _removal_cost(inverse: Tensor, weight: Tensor, unit: int) -> Tensor:
    """``tr(W_u (P_uu)^-1 W_u^T)`` of each unit alone: ``[C, C]``, ``[D, C]`` → ``[C / unit]``."""
    if unit == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    blocks = inverse.unflatten(0, (-1, unit)).unflatten(2, (-1, unit)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.unflatten(1, (-1, unit)).permute(1, 2, 0)  # [units, unit, D]
    return (torch.linalg.solve(blocks, columns) * columns).sum(dim=(1, 2))


def metric_root(metric: Tensor) -> Tensor:
    """A root R of a positive semi-definite ``[D, D]``, float64: ``R^T R`` is the metric.

    Symmetric, with negative noise counted as zero; on a GPU Cholesky's upper triangle where there is one, which takes
    a hundredth of the time of the eigenvectors.
    """
    if metric.is_cuda:
        factor, info = torch.linalg.cholesky_ex(metric.double(), upper=True)
        if not int(info):
            return factor
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def loss_shares(norms: Tensor, counted: Tensor) -> Tensor:
    """Weight of each token's error where only some positions count in the loss: ``[…, s]`` → ``[…, s]`` float32.

    An error e costs ``(g . e)^2``, g the loss's gradient there. Moments that are not weighted take g for alike at all
    tokens. That holds of positions that count, which weigh 1; the others, a prompt's, weigh what the loss depends on
    them beside these, ``|g|^2`` by its mean over those that count in the sample, at most 1. Behind the last one that
    counts, and of a sample without any, that is 0.

    Args:
        norms: of the gradients g. counted: bool, of the same size.
    """
    squared = norms.float().square()
    mean = squared.masked_fill(~counted, 0.0).sum(dim=-1, keepdim=True) / counted.sum(dim=-1, keepdim=True).clamp_min(1)
    shares = (squared / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
    return shares.masked_fill(counted, 1.0)


def stream_weights(stream: Tensor) -> Tensor:
    """Weight of each token's error in a residual stream ``[…, H]`` → ``[…]``: the inverse mean square.

    Every reader of the stream divides it by its root mean square first, so that this makes errors relative; else the
    few tokens of massive activation would decide everything.
    """
    return stream.float().square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
