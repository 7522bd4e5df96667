"""What the programs of a pass left, brought together; in one order, whatever runs first.

`finish_sums`: a program per column of `partials`, which it reads once. `group_totals`: one program.
`combine_gradients`: the sum over groups of their scales times their gradients, in the dtype and the
strides of the logits; reads each of the K saved gradients and writes the result once:
4 (K (TI + 1) / TI + 1) bytes per logit.
"""

import triton
import triton.language as tl

from .distillation import BAD, ROW, VALID, number


@triton.jit(do_not_specialize=["programs", "images", "classes"])
def finish_sums(
    partials,  # [images * programs, ROW] float64
    numerators,  # [terms] float64 out; of ce, kd, hetero, feature at PLACE_k; -1: not asked for
    denominators,  # [groups] float64 out, likewise at GROUP_k
    report,  # int64 [2] out: valid pixels and labels out of range; not if REPORT off
    programs,
    images,
    classes,
    PLACE0: tl.constexpr,
    PLACE1: tl.constexpr,
    PLACE2: tl.constexpr,
    PLACE3: tl.constexpr,
    GROUP0: tl.constexpr,
    GROUP1: tl.constexpr,
    GROUP2: tl.constexpr,
    GROUP3: tl.constexpr,
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
        place = tl.where(column == 0, PLACE0, tl.where(column == 1, PLACE1, PLACE2))
        place = tl.where(column == 3, PLACE3, place)
        # A sum of divergences is never negative, its rounding may be. A NaN comes through.
        negative = ((column == 1) | (column == 2)) & (total < 0.0)
        tl.store(numerators + place, tl.where(negative, 0.0, total), mask=place >= 0)
    if column == 4 and WEIGHTED and GROUP0 >= 0:
        tl.store(denominators + GROUP0, total)
    if column == 6 and GROUP2 >= 0:
        if KNOWLEDGE:
            tl.store(denominators + GROUP2, total)
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
            tl.store(denominators + GROUP2, filled * classes)
    if column == VALID:
        if GROUP0 >= 0 and not WEIGHTED:
            tl.store(denominators + GROUP0, total)
        if GROUP2 >= 0 and not (KNOWLEDGE or PER_IMAGE):
            tl.store(denominators + GROUP2, total)
        if GROUP1 >= 0:
            tl.store(denominators + GROUP1, total)
        if GROUP3 >= 0:
            tl.store(denominators + GROUP3, total)
        if REPORT:
            tl.store(report, total.to(tl.int64))
    if column == BAD and REPORT:
        tl.store(report + 1, total.to(tl.int64))


@triton.jit(do_not_specialize=["bits0", "bits1", "bits2", "bits3", "bits4"])
def group_totals(
    numerators,  # [terms] float64
    totals,  # [groups] float64 out: sums of weight * numerator
    bits0,  # of each term's weight
    bits1,
    bits2,
    bits3,
    bits4,
    GROUP0: tl.constexpr,  # of each term; -1: there is none
    GROUP1: tl.constexpr,
    GROUP2: tl.constexpr,
    GROUP3: tl.constexpr,
    GROUP4: tl.constexpr,
    GROUPS: tl.constexpr,
):
    for group in tl.static_range(GROUPS):
        total = tl.full((), 0.0, tl.float64)
        if GROUP0 == group:
            total += number(bits0, tl.float64) * tl.load(numerators)
        if GROUP1 == group:
            total += number(bits1, tl.float64) * tl.load(numerators + 1)
        if GROUP2 == group:
            total += number(bits2, tl.float64) * tl.load(numerators + 2)
        if GROUP3 == group:
            total += number(bits3, tl.float64) * tl.load(numerators + 3)
        if GROUP4 == group:
            total += number(bits4, tl.float64) * tl.load(numerators + 4)
        tl.store(totals + group, total)


@triton.jit(
    do_not_specialize=[
        "blocks",
        "classes",
        "height",
        "width",
        "rows",
        "slot_stride",
        "bits0",
        "bits1",
        "bits2",
        "bits3",
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
    bits0,  # of each saved gradient's weight
    bits1,
    bits2,
    bits3,
    out_b,
    out_c,
    out_y,
    out_x,
    GROUP0: tl.constexpr,  # of each saved gradient; -1 ends the list
    GROUP1: tl.constexpr,
    GROUP2: tl.constexpr,
    GROUP3: tl.constexpr,
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
    total += read_slot(top, above, inside, has_above, grad_totals + GROUP0, bits0, FLOAT)
    if GROUP1 >= 0:
        top += slot_stride
        above += slot_stride
        total += read_slot(top, above, inside, has_above, grad_totals + GROUP1, bits1, FLOAT)
    if GROUP2 >= 0:
        top += slot_stride
        above += slot_stride
        total += read_slot(top, above, inside, has_above, grad_totals + GROUP2, bits2, FLOAT)
    if GROUP3 >= 0:
        top += slot_stride
        above += slot_stride
        total += read_slot(top, above, inside, has_above, grad_totals + GROUP3, bits3, FLOAT)
    target = out + image * out_b + c * out_c + i * out_y + j * out_x
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def read_slot(top, above, inside, has_above, grad_total, bits, FLOAT: tl.constexpr):
    g = tl.load(top, mask=inside, other=0.0)
    g += tl.load(above, mask=has_above, other=0.0)
    return (tl.load(grad_total) * number(bits, tl.float64)).to(FLOAT) * g
