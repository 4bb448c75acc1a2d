"""Shared by the kernels: constants, row access, a dot product correct in the interpreter, block sizes."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ovq.ops import options

# Kernels can read globals only if they are constants of Triton's own type.
TIE = tl.constexpr(options.TIE)
LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TINY = tl.constexpr(options.TINY)
SHORTEST = tl.constexpr(options.ORDINARY[0])
LONGEST = tl.constexpr(options.ORDINARY[1])
NO_COSINE = tl.constexpr(options.NO_COSINE)
NO_WEIGHT = tl.constexpr(options.NO_WEIGHT)
# Columns of the table of chunks (`work.py`).
CHUNK = tl.constexpr(0)
BEFORE = tl.constexpr(1)
AFTER = tl.constexpr(2)
TOKENS = tl.constexpr(3)
IS_COMPLETE = tl.constexpr(4)
COLUMNS = tl.constexpr(5)

# Whether a product and a sum may be fused into one rounding (FMA). Only adding weighted tokens to sums must
# round the product first, as other backends do; nothing else depends on it, but Triton requires a choice.
FUSED = {"enable_fp_fusion": True}
UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def _probe():
    pass


IS_INTERPRETED = tl.constexpr(isinstance(_probe, InterpretedFunction))


@triton.jit
def dot(a, b, acc):
    """acc + a b, with factors in the dtype of `b` and sums in float32; float32 products never use TF32."""
    if IS_INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 as integers.
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit
def rows(x, index, mask, D, BD: tl.constexpr):
    """Load rows `index` `[N]` of `x` `[:, D]` as `[N, BD]`, zero where `mask` is false and beyond D."""
    d = tl.arange(0, BD)
    return tl.load(x + index[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put_rows(x, index, tile, mask, D, BD: tl.constexpr):
    """Write `tile` `[N, BD]` to rows `index` `[N]` of `x` `[:, D]` where `mask` is true."""
    d = tl.arange(0, BD)
    place = x + index[:, None] * D + d[None, :]
    tl.store(place, tile.to(x.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def are_extreme(x, lengths):
    """Mask of the non-zero rows of `x` `[N, D]` that are too short or too long for float32 products."""
    is_ordinary = (lengths >= SHORTEST) & (lengths <= LONGEST)
    return (is_ordinary | (tl.max(tl.abs(x), 1) == 0)) == 0


@triton.jit
def traced(x, weights):
    """Rows of `x` in float32, with non-finite entries set to 0 where the weight is 0."""
    x = x.to(tl.float32)
    return tl.where((weights > 0)[:, None] | (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
def divisors(mass):
    """Counts or weights in float32 to divide by; 1 where they are 0, as the sums there are zero."""
    return tl.where(mass > 0, mass, 1).to(tl.float32)


@triton.jit
def log2_mass(mass):
    """Log2 of counts or weights; -inf, which no query attends to, where they are 0."""
    return tl.where(mass > 0, tl.log2(divisors(mass)), -float("inf"))


@triton.jit
def means(sums, mass):
    """Slot means from sums `[N, D]` and counts or weights `[N]`, rounded like PyTorch's division."""
    return tl.div_rn(sums, divisors(mass)[:, None] + tl.zeros_like(sums))


@triton.jit
def absorbed(scores, top, total):
    """One step of an online softmax to base 2 with `scores` `[BM, BN]`, which may all be -inf.

    Returns the new maximum and total, the unnormalised probabilities, and the factor of the earlier sums.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    # While all scores are -inf, any finite base will do.
    base = tl.where(highest == -float("inf"), 0.0, highest)
    probs = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    return highest, total * shrink + tl.sum(probs, 1), probs, shrink


@triton.jit
def place_of(slots, places, TB: tl.constexpr, C):
    """First index of each of `slots` `[BN]` in the list `places` of C entries; C if it is not there."""
    found = slots * 0 + C
    for first in range(0, C, TB):
        p = first + tl.arange(0, TB)
        own = tl.load(places + p, mask=p < C, other=-1)
        found = tl.minimum(found, tl.min(tl.where(own[None, :] == slots[:, None], p[None, :], C), 1))
    return found


@triton.jit
def opener(k, token_weights, chunk, head, W, H, C, K, BT: tl.constexpr, BK: tl.constexpr):
    """The token of a chunk that opens slot 0, its mean `[BK]`, and its weight.

    It is the first token of non-zero weight, else the first token.

    Args:
        token_weights: `[num_chunks, W, H]` float32, or None.
    """
    d = tl.arange(0, BK)
    token = head * 0
    if token_weights is not None:
        token += C
        for start in range(0, C, BT):
            t = start + tl.arange(0, BT)
            own = tl.load(token_weights + (chunk * W + t) * H + head, mask=t < C, other=0.0)
            token = tl.minimum(token, tl.min(tl.where(own > 0, t, C), 0))
        token = tl.where(token < C, token, 0)
    place = (chunk * W + token) * H + head
    mean = tl.load(k + place * K + d, mask=d < K, other=0.0).to(tl.float32)
    mass = head * 0 + 1.0
    if token_weights is not None:
        mass = tl.load(token_weights + place)
        # The mean as it will be read, with the rounding of the product and the quotient.
        mean = tl.where(mass > 0, tl.div_rn(mass * mean, divisors(mass) + tl.zeros_like(mean)), 0.0)
    return token, mean, mass


def padded(dim: int) -> int:
    """Head size padded to a power of two of at least 16, as `tl.dot` requires."""
    return max(16, triton.next_power_of_2(dim))


@functools.cache
def programs(device: torch.device, each: int) -> int:
    """Number of programs that fill a device, with `each` of them per multiprocessor."""
    if device.type != "cuda":
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def slot_block(k: Tensor, v: Tensor) -> int:
    """Slots per program of the recurrence, whose sums stay in registers."""
    widest = padded(k.shape[-1]) + padded(v.shape[-1])
    return 64 if widest <= 256 else 32


def score_block(k: Tensor) -> int:
    """Keys scored at once against a block of slots; fewer for float32, whose products need more registers."""
    return {torch.bfloat16: 64, torch.float32: 32}.get(k.dtype, 16)


def read_blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Queries (BM) and candidates (BN) per tile of the read, with its warps and stages."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32:
        # Without tensor cores both operands of a product are in registers; larger tiles spill kilobytes.
        return {"BM": 32 if widest <= 128 else 16, "BN": 32, "num_warps": 8, "num_stages": 1}
    if widest <= 64:
        return {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3}
    if widest <= 128:
        return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3}
    return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}


def grad_blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """The same for the backward, which holds twice as many tiles."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32:
        return {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1}
    if widest <= 128:
        return {"BM": 64, "BN": 64, "num_warps": 4 if widest <= 64 else 8, "num_stages": 2}
    return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
