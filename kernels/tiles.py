"""Which pixels a program works on, and where their logits and gradients lie.

A program has N warps of L lanes. A lane has one column of cells and walks down TI cells of it (a
*chunk*), R x S pixels at a time: SUB_R x SUB_C steps per cell. Columns are numbered through the
chunks of an image, (chunk, j) -> chunk * per_row + j, so that ragged image widths waste no more
than the end of the last program.

With a gradient, what the right side of a cell owes to its neighbour's logit crosses one lane. The
first lane of each warp is therefore a *halo*: it repeats the last cell of the warp before (1/L more
work) and owns nothing; no warp waits for another one.

DIRECT (logits on the label grid): cells are S pixels wide and one high, and nothing crosses lanes.
"""

import triton
import triton.language as tl

from .interpolation import (
    CORNERS,
    DIRECT,
    axis,
    cell_start,
    fraction_in_cell,
    taps_of_position,
)


@triton.jit
def own_columns(
    program,
    columns,
    per_row,
    HALO: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    INT: tl.constexpr,
):
    """chunk and column of each lane, whether it has one, and whether it owns it; [1, 1, N, L]."""
    lane = tl.arange(0, L)[None, None, None, :]
    warp = tl.arange(0, N)[None, None, :, None]
    column = (tl.cast(program, INT) * N + warp) * (L - HALO) + lane - HALO
    exists = (column >= 0) & (column < columns)
    column = tl.minimum(tl.maximum(column, 0), columns - 1)
    return column // per_row, column % per_row, exists, exists & (lane >= HALO)


@triton.jit
def pixels_of_step(
    row,
    column,
    exists,
    sub,
    label_h,
    label_w,
    student_h,
    student_w,
    STUDENT: tl.constexpr,
    WHOLE: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SUB_C: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The pixels [R, S, N, L] of one step: rows [R, 1, N, L], columns [1, S, N, L], which of them
    exist, and the student's four taps (row, column pairs) and fractions.

    row, column: of the cell, counted from 0 (cell -1 of the axis) unless DIRECT; [1, 1, N, L].
    """
    r = tl.arange(0, R)[:, None, None, None]
    s = tl.arange(0, S)[None, :, None, None]
    if STUDENT == DIRECT:
        y = row + r
        x = column * S + s
        inside = exists & (y < label_h)
        y = tl.minimum(y, label_h - 1)
        if not WHOLE:  # limits would hide from the compiler that columns follow each other
            inside = inside & (x < label_w)
            x = tl.minimum(x, label_w - 1)
        fy = tl.zeros(y.shape, FLOAT)
        fx = tl.zeros(x.shape, FLOAT)
        top = y
        bottom = y
        left = x
        right = x
    else:
        step, origin, unit = axis(student_h, label_h, ALIGN_CORNERS, INT)
        i = row - 1
        first = cell_start(i, student_h, label_h, step, origin, unit) + (sub // SUB_C) * R
        y = first + r
        inside_y = y < cell_start(i + 1, student_h, label_h, step, origin, unit)
        y = tl.minimum(y, label_h - 1)
        fy = fraction_in_cell(y, i, student_h, step, origin, unit, FLOAT)
        step, origin, unit = axis(student_w, label_w, ALIGN_CORNERS, INT)
        j = column - 1
        first = cell_start(j, student_w, label_w, step, origin, unit) + (sub % SUB_C) * S
        x = first + s
        inside_x = x < cell_start(j + 1, student_w, label_w, step, origin, unit)
        x = tl.minimum(x, label_w - 1)
        fx = fraction_in_cell(x, j, student_w, step, origin, unit, FLOAT)
        inside = exists & (i < student_h) & inside_y & inside_x
        top = tl.minimum(tl.maximum(i, 0), student_h - 1)
        bottom = tl.minimum(i + 1, student_h - 1)
        left = tl.maximum(j, 0)
        right = tl.minimum(j + 1, student_w - 1)
    return y, x, inside, top, bottom, left, right, fy, fx


@triton.jit
def offsets(top, bottom, left, right, stride_h, stride_w):
    """The four taps in a plane, in the order of `read_logits`.

    The hint tells the compiler that neighbours along the last axes lie together: older Tritons
    would otherwise load the other way round and turn every tensor over in shared memory. A hint
    about order alone: where no alignment is known, no load becomes wider by it.
    """
    return (
        tl.max_contiguous(top * stride_h + left * stride_w, [1, 1, 2, 4]),
        tl.max_contiguous(top * stride_h + right * stride_w, [1, 1, 2, 4]),
        tl.max_contiguous(bottom * stride_h + left * stride_w, [1, 1, 2, 4]),
        tl.max_contiguous(bottom * stride_h + right * stride_w, [1, 1, 2, 4]),
    )


@triton.jit
def on_label_grid(y, x, stride_h, stride_w):
    """The one tap of a pixel; the pixels of a thread follow each other, then those of a lane."""
    offset = tl.max_contiguous(y * stride_h + x * stride_w, [1, x.shape[1], 1, 2])
    return offset, offset, offset, offset


@triton.jit
def other_taps(
    y,
    x,
    label_h,
    label_w,
    height,
    width,
    stride_h,
    stride_w,
    ALIGN_CORNERS: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Taps [R, S, N, L] and fractions of pixels on a grid other than that of the cells."""
    step, origin, unit = axis(height, label_h, ALIGN_CORNERS, INT)
    top, bottom, fy = taps_of_position(y, height, step, origin, unit, FLOAT)
    step, origin, unit = axis(width, label_w, ALIGN_CORNERS, INT)
    left, right, fx = taps_of_position(x, width, step, origin, unit, FLOAT)
    return offsets(top, bottom, left, right, stride_h, stride_w), (fy, fx)


@triton.jit
def taps_under(
    y,
    x,
    cell,  # the student's taps: top, bottom, left, right
    fractions,
    label_size,
    size,
    strides,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Taps and fractions of the pixels in the teacher's logits, whatever their grid."""
    if SOURCE == CORNERS:
        taps = offsets(cell[0], cell[1], cell[2], cell[3], strides[0], strides[1])
    elif SOURCE == DIRECT:
        taps = on_label_grid(y, x, strides[0], strides[1])
    else:
        taps, fractions = other_taps(
            y,
            x,
            label_size[0],
            label_size[1],
            size[0],
            size[1],
            strides[0],
            strides[1],
            ALIGN_CORNERS,
            INT,
            FLOAT,
        )
    return taps, fractions


@triton.jit
def checked_labels(raw, inside, classes, ignore_index):
    """int32 labels, -1 of a pixel that counts nowhere; and where there is a label other than
    `ignore_index`: of these, the ones that are -1 are out of range. Of int64 of any shape."""
    counts = inside & (raw != ignore_index)
    in_range = raw.to(tl.uint64, bitcast=True) < tl.cast(classes, tl.uint64)
    return tl.where(counts & in_range, raw.to(tl.int32), -1), counts


@triton.jit
def read_labels(
    labels,  # pointer, row and column stride, ignore_index, unlabelled_index
    weights,  # pointer, row and column stride
    y,
    x,
    inside,
    classes,
    UNLABELLED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Labels [R, S, N, L] as `checked_labels` has them, `classes` of an unlabelled pixel; the
    pixels' weights; and 1 or 0: where a label is out of range, where a weight is."""
    pointer, stride_h, stride_w, ignore_index, unlabelled_index = labels
    place = tl.max_contiguous(y * stride_h + x * stride_w, [1, 1, 2, 4])
    raw = tl.load(pointer + place, mask=inside, other=0).to(tl.int64)
    label, counts = checked_labels(raw, inside, classes, ignore_index)
    if UNLABELLED:
        label = tl.where(counts & (raw == unlabelled_index), classes, label)
    bad = (counts & (label < 0)).to(tl.int32)
    weight = 1.0
    bad_weight = bad
    if WEIGHTS:
        pointer, stride_h, stride_w = weights
        weight = tl.load(pointer + (y * stride_h + x * stride_w), mask=inside, other=0.0).to(FLOAT)
        bad_weight = (inside & ~((weight >= 0.0) & (weight < float("inf")))).to(tl.int32)
        label = tl.where(weight == 0.0, -1, label)
    return label, weight, bad, bad_weight


@triton.jit
def over_pixels(x):
    """Sum over the pixels of a thread, [R, S, N, L] -> [1, 1, N, L]."""
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def over_program(x):
    """Sum over all there is, as a scalar; float64."""
    return tl.sum(tl.sum(tl.sum(tl.sum(x.to(tl.float64), 3), 2), 1), 0)


@triton.jit
def add_to_corners(
    g,
    fractions,
    top_row,
    lanes,
    SINGLE: tl.constexpr,
):
    """The adjoint of bilinear interpolation for one class and term: g [R, S, N, L] to the logits.

    top_row: pointers [1, 1, N, L] to the logit left above each cell; the one below is `row_stride`
    further. Lane l adds the right sides of lane l - 1 to its left ones, and what the cell above
    left for its bottom (the same lane wrote it) to its top. SINGLE: a cell is one step; otherwise
    `again` says whether this is a later one, which adds to what the first wrote.
    """
    fy, fx = fractions
    from_above, from_left, left_lane, written, row_stride, again = lanes
    everything = tl.sum(g, axis=1, keep_dims=True)
    right = tl.sum(fx * g, axis=1, keep_dims=True)
    left = everything - right
    bottom_left = tl.sum(fy * left, axis=0, keep_dims=True)
    bottom_right = tl.sum(fy * right, axis=0, keep_dims=True)
    top_left = tl.sum(left, axis=0, keep_dims=True) - bottom_left
    top_right = tl.sum(right, axis=0, keep_dims=True) - bottom_right
    top = top_left + tl.where(from_left, tl.gather(top_right, left_lane, 3), 0.0)
    bottom = bottom_left + tl.where(from_left, tl.gather(bottom_right, left_lane, 3), 0.0)
    if SINGLE:  # a single step per cell: nothing lies in the bottom row yet
        top += tl.load(top_row, mask=written & from_above, other=0.0)
    else:
        top += tl.load(top_row, mask=written & (from_above | again), other=0.0)
        bottom += tl.load(top_row + row_stride, mask=written & again, other=0.0)
    tl.store(top_row, top, mask=written)
    tl.store(top_row + row_stride, bottom, mask=written)
