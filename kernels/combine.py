"""What the programs of a pass left, brought together; in one order, whatever runs first.

`finish_sums`: a program per column of `partials`, which it reads once. `combine_gradients`: the sum
over terms of scale_k times the gradient of term k, in the dtype and the strides of the logits;
reads each saved gradient and writes the result once: 4 (K (TI + 1) / TI + 1) bytes per logit.
"""

import triton
import triton.language as tl

from .distillation import BAD, ROW, VALID


@triton.jit(do_not_specialize=["programs", "images", "classes", "row0", "row1", "row2", "row3"])
def finish_sums(
    partials,  # [images * programs, ROW] float64
    numerators,  # [K] float64 out; term k is written at `row_k` if that is not negative
    denominators,  # [K] float64 out
    report,  # int64 [2] out: valid pixels and labels out of range; not if REPORT off
    programs,
    images,
    classes,
    row0,
    row1,
    row2,
    row3,
    WEIGHTED: tl.constexpr,  # ce's denominator is the sum of the labels' weights
    KNOWLEDGE: tl.constexpr,  # hetero's is the sum of the pixels' weights
    PER_IMAGE: tl.constexpr,  # hetero's is the number of images that have pixels, times classes
    REPORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, images * programs, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        here = row < images * programs
        sums += tl.load(partials + row * ROW + column, mask=here, other=0.0)
    total = tl.sum(sums, 0)
    if column < 4:
        row = tl.where(column == 0, row0, tl.where(column == 1, row1, row2))
        row = tl.where(column == 3, row3, row)
        # A sum of divergences is never negative, its rounding may be. A NaN comes through.
        negative = ((column == 1) | (column == 2)) & (total < 0.0)
        tl.store(numerators + row, tl.where(negative, 0.0, total), mask=row >= 0)
    if column == 4 and WEIGHTED:
        tl.store(denominators + row0, total, mask=row0 >= 0)
    if column == 6:
        if KNOWLEDGE:
            tl.store(denominators + row2, total, mask=row2 >= 0)
        elif PER_IMAGE:
            filled = total * 0.0
            for image in range(images):
                sums = tl.zeros([BLOCK], tl.float64)
                for start in range(0, programs, BLOCK):
                    row = start + tl.arange(0, BLOCK).to(tl.int64)
                    here = row < programs
                    row += tl.cast(image, tl.int64) * programs
                    sums += tl.load(partials + row * ROW + VALID, mask=here, other=0.0)
                filled += tl.where(tl.sum(sums, 0) > 0.0, 1.0, 0.0)
            tl.store(denominators + row2, filled * classes, mask=row2 >= 0)
    if column == VALID:
        if not WEIGHTED:
            tl.store(denominators + row0, total, mask=row0 >= 0)
        if not (KNOWLEDGE or PER_IMAGE):
            tl.store(denominators + row2, total, mask=row2 >= 0)
        tl.store(denominators + row1, total, mask=row1 >= 0)
        tl.store(denominators + row3, total, mask=row3 >= 0)
        if REPORT:
            tl.store(report, total.to(tl.int64))
    if column == BAD and REPORT:
        tl.store(report + 1, total.to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "blocks",
        "classes",
        "height",
        "width",
        "rows",
        "term_stride",
        "out_b",
        "out_c",
        "out_y",
        "out_x",
    ]
)
def combine_gradients(
    saved,  # [K, B, C, chunks * (TI + 1), w]
    scales,  # float64; term k's at `slot_k`
    out,  # [B, C, h, w], any strides
    blocks,  # per image
    classes,
    height,
    width,
    rows,  # chunks * (TI + 1)
    term_stride,
    out_b,
    out_c,
    out_y,
    out_x,
    SLOT0: tl.constexpr,  # place of each saved term's scale; -1 ends the list
    SLOT1: tl.constexpr,
    SLOT2: tl.constexpr,
    SLOT3: tl.constexpr,
    TI: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    # places in a plane; 64-bit divisions would cost more than the memory
    place = tl.cast(tl.program_id(0) % blocks, INT) * BLOCK + tl.arange(0, BLOCK)[None, :]
    i = place // width
    j = place % width
    inside = (c < classes) & (i < height)
    # logits row i is the top of cell row i + 1 (counted from 0) and the bottom of the one above
    chunk = (i + 1) // TI
    t = (i + 1) % TI
    source = saved + (image * classes + c) * (tl.cast(rows, tl.int64) * width)
    top = source + (chunk * (TI + 1) + t) * width + j
    # where a chunk begins, the bottom of the last chunk's last cell is a row of its own
    above = source + ((chunk - 1) * (TI + 1) + TI) * width + j
    has_above = inside & (t == 0) & (chunk > 0)
    # the last cell row may begin a chunk; every row i has its own cell row i + 1
    total = tl.zeros([BLOCK_C, BLOCK], FLOAT)
    total += read_term(top, above, inside, has_above, scales, SLOT0, FLOAT)
    if SLOT1 >= 0:
        shift = term_stride
        total += read_term(top + shift, above + shift, inside, has_above, scales, SLOT1, FLOAT)
    if SLOT2 >= 0:
        shift = 2 * term_stride
        total += read_term(top + shift, above + shift, inside, has_above, scales, SLOT2, FLOAT)
    if SLOT3 >= 0:
        shift = 3 * term_stride
        total += read_term(top + shift, above + shift, inside, has_above, scales, SLOT3, FLOAT)
    target = out + image * out_b + c * out_c + i * out_y + j * out_x
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def read_term(top, above, inside, has_above, scales, SLOT: tl.constexpr, FLOAT: tl.constexpr):
    g = tl.load(top, mask=inside, other=0.0)
    g += tl.load(above, mask=has_above, other=0.0)
    return tl.load(scales + SLOT).to(FLOAT) * g
