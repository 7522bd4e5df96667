"""Bilinear taps and logits at the pixels, as `torch.nn.functional.interpolate` places them.

A *cell* is what lies between four neighbouring logits; the cells of an axis of n logits are
-1 (before the first) to n - 1 (behind the last). A thread owns the pixels of one cell, up to
[R, S] of them at a time, and loads its four corners once for all of them:

    corners of cell (i, j)   (i, j)  (i, j+1)        pixels   y  start(i) .. start(i+1) - 1
                           (i+1, j)  (i+1, j+1)               x  start(j) .. start(j+1) - 1

Positions are exact: source(y) = (y * step + origin) / unit in integers, whatever the ratio. At the
edges both taps are the same logit; the fraction is set so that the whole gradient goes to the one
that exists: 1 before the first, 0 behind the last.

Tensors have the axes [R, S, N, L]: rows and columns of pixels inside a thread, then warps and
lanes, of which each has a cell; [1, 1, N, L] is one value per thread. Nothing here moves data
between threads.
"""

import triton
import triton.language as tl

from .formulas import max_or_nan

# How the logits of a model lie under the pixels.
CORNERS = tl.constexpr(0)  # on the grid of cells: four corners serve all pixels of a thread
GATHER = tl.constexpr(1)  # on another grid: four taps per pixel
DIRECT = tl.constexpr(2)  # on the label grid: one tap per pixel


@triton.jit
def axis(in_size, out_size, ALIGN_CORNERS: tl.constexpr, INT: tl.constexpr):
    """step, origin, unit of source(y) = (y * step + origin) / unit; scalars."""
    in_size = tl.cast(in_size, INT)
    out_size = tl.cast(out_size, INT)
    if ALIGN_CORNERS:
        step = tl.where(out_size > 1, in_size - 1, 0)
        origin = tl.where(out_size > 1, 0, 0)
        unit = tl.maximum(out_size - 1, 1)
    else:
        step = 2 * in_size
        origin = in_size - out_size
        unit = 2 * out_size
    return step, origin, unit


@triton.jit
def cell_start(cell, in_size, out_size, step, origin, unit):
    """The first pixel of a cell, in [0, out_size]; cells and result [1, 1, N, L]."""
    divisor = tl.maximum(step, 1)
    # operands are not negative: C and Python agree about such divisions
    first = (tl.maximum(cell * unit - origin, 0) + divisor - 1) // divisor
    # a single row of logits, or of labels under align_corners: all of it is cell 0
    first = tl.where(step > 0, first, tl.where(cell > 0, out_size, 0))
    first = tl.where(cell < 0, 0, tl.where(cell >= in_size, out_size, first))
    return tl.minimum(first, out_size)


@triton.jit
def divide(n, unit, FLOAT: tl.constexpr):
    """n / unit of integers, rounded once."""
    if FLOAT == tl.float64:
        quotient = n.to(FLOAT) / unit.to(FLOAT)
    else:
        quotient = tl.div_rn(n.to(FLOAT), unit.to(FLOAT) + tl.zeros_like(n).to(FLOAT))
    return quotient


@triton.jit
def fraction_in_cell(position, cell, in_size, step, origin, unit, FLOAT: tl.constexpr):
    """The weight of the upper tap. Positions beyond the cell (of pixels that do not exist, where a
    thread has more than its cell) get that of its border: what is bounded at the corners must stay
    bounded wherever it is computed, or infinity times a weight of 0 would be NaN."""
    inside = divide(position * step + origin - cell * unit, unit, FLOAT)
    inside = tl.minimum(tl.maximum(inside, 0.0), 1.0)
    return tl.where(cell < 0, 1.0, tl.where(cell >= in_size - 1, 0.0, inside)).to(FLOAT)


@triton.jit
def taps_of_position(position, in_size, step, origin, unit, FLOAT: tl.constexpr):
    """Both taps and the upper one's weight. A neighbour of weight zero is not read."""
    n = tl.maximum(position * step + origin, 0)
    lower = tl.minimum(n // unit, in_size - 1)
    n = n - lower * unit
    upper = tl.where((n > 0) & (lower < in_size - 1), lower + 1, lower)
    return lower, upper, tl.where(upper > lower, divide(n, unit, FLOAT), 0.0).to(FLOAT)


@triton.jit
def between(a, b, f):
    return a + f * (b - a)


@triton.jit
def between_huge(a, b, f):
    """`between` where b - a may overflow, and 0 * inf must not turn a finite pixel into NaN."""
    huge = 1e37
    ordinary = (tl.abs(a) < huge) & (tl.abs(b) < huge)  # false for NaN
    mixed = f * b + (1.0 - f) * a
    mixed = tl.where(f == 0.0, a, tl.where(f == 1.0, b, mixed))
    return tl.where(ordinary, between(a, b, f), mixed)


@triton.jit
def harmless(z):
    """0 in the place of what is huge, infinite or NaN."""
    huge = 1e90 if z.dtype == tl.float64 else 1e30
    return tl.where(tl.abs(z) < huge, z, 0.0)


@triton.jit
def read_logits(
    plane,
    taps,
    fractions,
    fold,
    scale,
    valid,
    SOURCE: tl.constexpr,
    FOLDED: tl.constexpr,
    HARMLESS: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """One class of one model at the pixels, [R, S, N, L].

    plane: pointer to the class (or [R, S, N, L] pointers to each pixel's own class); taps: four
    offsets, [1, 1, N, L] for CORNERS, else [R, S, N, L]; fractions: by row [R, 1, N, L] and by
    column [1, S, N, L]. FOLDED: (z - m) * scale with a bound m that is itself interpolated: its
    corners, times scale, are `fold`. That way neither the bound nor the subtraction is one per
    pixel. CAREFUL: exact for any corners, and nothing of an invalid pixel comes through. HARMLESS:
    the arithmetic of neither, on corners that are made harmless first.
    """
    o00, o01, o10, o11 = taps
    if SOURCE == DIRECT:
        z = tl.load(plane + o00).to(FLOAT)
    else:
        p00 = plane + o00
        p01 = plane + o01
        p10 = plane + o10
        p11 = plane + o11
        if len(plane.shape) > 0:  # each pixel's own class: lanes last all the same (`offsets`)
            p00 = tl.max_contiguous(p00, [1, 1, 2, 4])
            p01 = tl.max_contiguous(p01, [1, 1, 2, 4])
            p10 = tl.max_contiguous(p10, [1, 1, 2, 4])
            p11 = tl.max_contiguous(p11, [1, 1, 2, 4])
        z00 = tl.load(p00).to(FLOAT)
        z01 = tl.load(p01).to(FLOAT)
        z10 = tl.load(p10).to(FLOAT)
        z11 = tl.load(p11).to(FLOAT)
        if HARMLESS:
            z00 = harmless(z00)
            z01 = harmless(z01)
            z10 = harmless(z10)
            z11 = harmless(z11)
        if FOLDED:
            f00, f01, f10, f11 = fold
            z00 = z00 * scale - f00
            z01 = z01 * scale - f01
            z10 = z10 * scale - f10
            z11 = z11 * scale - f11
        fy, fx = fractions
        if CAREFUL:
            z = between_huge(between_huge(z00, z10, fy), between_huge(z01, z11, fy), fx)
        else:
            z = between(between(z00, z10, fy), between(z01, z11, fy), fx)
    if CAREFUL:
        z = tl.where(valid, z, 0.0)
    return z


@triton.jit
def exactly_scaled(z, m, scale, FLOAT: tl.constexpr):
    """a = (z - m) * scale with the exact maximum m; finite for huge and infinite logits."""
    largest = 1e300 if FLOAT == tl.float64 else 2e38
    return max_or_nan(z - m, -largest / tl.maximum(scale, 1.4427)) * scale


@triton.jit
def corner_bounds(plane, class_stride, classes, taps, HARMLESS: tl.constexpr, FLOAT: tl.constexpr):
    """Maximum over the classes at each corner, and a number that is finite if all logits are
    finite and none is huge (three instructions a logit, and each serves R S pixels)."""
    o00, o01, o10, o11 = taps
    m00 = tl.full(o00.shape, float("-inf"), FLOAT)
    m01 = m00
    m10 = m00
    m11 = m00
    trace = tl.zeros(o00.shape, FLOAT)
    much = 1e100 if FLOAT == tl.float64 else 1e8
    for _ in range(classes):
        z00 = tl.load(plane + o00).to(FLOAT)
        z01 = tl.load(plane + o01).to(FLOAT)
        z10 = tl.load(plane + o10).to(FLOAT)
        z11 = tl.load(plane + o11).to(FLOAT)
        trace = z00 * much + (z01 * much + (z10 * much + (z11 * much + trace)))
        if HARMLESS:
            z00 = harmless(z00)
            z01 = harmless(z01)
            z10 = harmless(z10)
            z11 = harmless(z11)
        m00 = tl.maximum(m00, z00)
        m01 = tl.maximum(m01, z01)
        m10 = tl.maximum(m10, z10)
        m11 = tl.maximum(m11, z11)
        plane += class_stride
    return m00, m01, m10, m11, trace


@triton.jit
def pixel_bounds(
    plane,
    class_stride,
    classes,
    taps,
    fractions,
    valid,
    SOURCE: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Maximum over the classes at each pixel, [R, S, N, L], and the same trace as above."""
    m = tl.where(valid, float("-inf"), float("-inf")).to(FLOAT)
    trace = tl.zeros(valid.shape, FLOAT)
    much = 1e100 if FLOAT == tl.float64 else 1e8
    for _ in range(classes):
        z = read_logits(
            plane, taps, fractions, taps, 1.0, valid, SOURCE, False, False, CAREFUL, FLOAT
        )
        m = max_or_nan(m, z)
        if not CAREFUL:
            trace += z * much
        plane += class_stride
    return m, trace
