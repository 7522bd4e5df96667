"""What the programs of a pass left, brought together; in one order, whatever runs first.

`finish_sums`: a program per column of `partials`, which it reads once. `group_totals`: one program.
`combine_gradients`: the sum over groups of their scales times their gradients, in the dtype and the
strides of the logits; reads each of the K saved gradients and writes the result once:
4 (K (TI + 1) / TI + 1) bytes per logit.
"""

import triton
import triton.language as tl

from .formulas import number
from .partials import BAD, BAD_WEIGHTS, LABELLED, ROW, SHARES, VALID

# Instead of a column of `partials`, of which the sum of a term's values is divided by: images that
# have pixels, times classes.
OF_IMAGES = tl.constexpr(-1)


@triton.jit(do_not_specialize=["programs", "images", "classes"])
def finish_sums(
    partials,  # [images * programs, ROW] float64
    numerators,  # [terms] float64 out
    denominators,  # [groups] float64 out
    report,  # int64 [4] out: see labels.py; not if REPORT off
    programs,
    images,
    classes,
    TERMS: tl.constexpr,  # of each its index, place, group, the column of its denominator or
    # OF_IMAGES, and `Traits.is_divergence`
    UNLABELLED: tl.constexpr,
    WEIGHTS: tl.constexpr,
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
    for k in tl.static_range(len(TERMS)):
        if column == TERMS[k][0]:
            numerator = total
            if TERMS[k][4]:
                # never negative, though its rounding may be. A NaN comes through.
                numerator = tl.where(total < 0.0, 0.0, total)
            tl.store(numerators + TERMS[k][1], numerator)
        if TERMS[k][3] != OF_IMAGES:
            if column == TERMS[k][3]:
                tl.store(denominators + TERMS[k][2], total)
        elif column == SHARES + TERMS[k][0]:
            filled = tl.full((), 0.0, tl.float64)
            for image in range(images):
                sums = tl.zeros([BLOCK], tl.float64)
                for start in range(0, programs, BLOCK):
                    row = start + tl.arange(0, BLOCK).to(tl.int64)
                    here = row < programs
                    row += tl.cast(image, tl.int64) * programs
                    sums += tl.load(partials + row * ROW + VALID, mask=here, other=0.0)
                filled += tl.where(tl.sum(sums, 0) > 0.0, 1.0, 0.0)
            tl.store(denominators + TERMS[k][2], filled * classes)
    if REPORT:
        if column == (LABELLED if UNLABELLED else VALID):
            tl.store(report, total.to(tl.int64))
        if column == VALID:
            tl.store(report + 1, total.to(tl.int64))
        if column == BAD:
            tl.store(report + 2, total.to(tl.int64))
        if column == (BAD_WEIGHTS if WEIGHTS else BAD):
            tl.store(report + 3, total.to(tl.int64) if WEIGHTS else 0)


@triton.jit
def group_totals(
    numerators,  # [terms] float64
    totals,  # [groups] float64 out: sums of weight * numerator
    weights,  # the bits of each term's
    GROUP_OF: tl.constexpr,  # each term
    GROUPS: tl.constexpr,
):
    for group in tl.static_range(GROUPS):
        total = tl.full((), 0.0, tl.float64)
        for k in tl.static_range(len(GROUP_OF)):
            if GROUP_OF[k] == group:
                total += number(weights[k], tl.float64) * tl.load(numerators + k)
        tl.store(totals + group, total)


@triton.jit(
    do_not_specialize=[
        "blocks",
        "classes",
        "height",
        "width",
        "rows",
        "slot_stride",
        "out_b",
        "out_c",
        "out_y",
        "out_x",
    ]
)
def combine_gradients(
    saved,  # [K, B, C, chunks * (TI + 1), w]
    grad_totals,  # [groups] float64
    out,  # [B, C, h, w], any strides
    blocks,  # per image
    classes,
    height,
    width,
    rows,  # chunks * (TI + 1)
    slot_stride,
    weights,  # the bits of each saved gradient's
    out_b,
    out_c,
    out_y,
    out_x,
    GROUPS: tl.constexpr,  # of each saved gradient
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
    for k in tl.static_range(len(GROUPS)):
        total_of_group = grad_totals + GROUPS[k]
        total += read_slot(top, above, inside, has_above, total_of_group, weights[k], FLOAT)
        top += slot_stride
        above += slot_stride
    target = out + image * out_b + c * out_c + i * out_y + j * out_x
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def read_slot(top, above, inside, has_above, grad_total, bits, FLOAT: tl.constexpr):
    g = tl.load(top, mask=inside, other=0.0)
    g += tl.load(above, mask=has_above, other=0.0)
    return (tl.load(grad_total) * number(bits, tl.float64)).to(FLOAT) * g
