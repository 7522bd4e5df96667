"""Terms over space: the softmaxes of `first` over the valid pixels of each image and class.

`collect` walks over the tiles of `distillation.py` class by class and leaves each program's
maximum and sum; `reduce` brings an image's programs together. Two further exponentials per pixel
and class; a variant that is asked for by name, written for exactness and not for speed: it reads
every logit the careful way.
"""

import triton
import triton.language as tl

from . import terms
from .formulas import LOG2_E, max_or_nan
from .interpolation import read_logits
from .terms.term import Class
from .tiles import offsets, own_columns, pixels_of_step, read_labels, taps_under

LOWEST = tl.constexpr(-1e30)


@triton.jit(
    do_not_specialize=[
        "programs",
        "classes",
        "label_h",
        "label_w",
        "student_h",
        "student_w",
        "teacher_h",
        "teacher_w",
        "rows",
        "columns",
        "per_row",
        "student_b",
        "student_c",
        "student_y",
        "teacher_b",
        "teacher_c",
        "teacher_y",
        "target_b",
        "target_y",
        "target_x",
        "ignore_index",
        "unlabelled_index",
        "weight_b",
        "weight_y",
        "weight_x",
    ]
)
def collect(
    student,  # as in `distillation_pass`
    teacher,
    target,
    found,  # [softmaxes, B, programs, C, 2] out: at PLACE maximum and sum of exp(`first` - maximum)
    programs,
    classes,
    label_h,
    label_w,
    student_h,
    student_w,
    teacher_h,
    teacher_w,
    rows,
    columns,
    per_row,
    student_b,
    student_c,
    student_y,
    student_x,
    teacher_b,
    teacher_c,
    teacher_y,
    teacher_x,
    target_b,
    target_y,
    target_x,
    ignore_index,
    unlabelled_index,
    pixel_weight,  # [B, H, W], read if WEIGHTS
    weight_b,
    weight_y,
    weight_x,
    numbers,  # the bits of the term's numbers, its weight first
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    TERM: tl.constexpr,
    VARIANT: tl.constexpr,
    FIRST: tl.constexpr,  # which of its numbers
    PLACE: tl.constexpr,  # of its softmax
    UNLABELLED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HALO: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    PTX: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SUB_R: tl.constexpr,
    SUB_C: tl.constexpr,
    TI: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    program = tl.program_id(0) % programs
    image = (tl.program_id(0) // programs).to(tl.int64)
    chunk, column, exists, own = own_columns(program, columns, per_row, HALO, N, L, INT)
    student += image * student_b
    teacher += image * teacher_b
    target += image * target_b
    if WEIGHTS:
        pixel_weight += image * weight_b
    labels = (target, target_y, target_x, ignore_index, unlabelled_index)
    weights = (pixel_weight, weight_y, weight_x)
    n = terms.numbers(TERM, numbers, tl.cast(classes, FLOAT), FLOAT)
    for c in range(classes):
        largest = tl.full([1, 1, N, L], LOWEST, FLOAT)
        total = tl.zeros([1, 1, N, L], FLOAT)
        for at in range(TI * SUB_R * SUB_C):
            t = at // (SUB_R * SUB_C)
            sub = at % (SUB_R * SUB_C)
            row = chunk * TI + t
            y, x, inside, top_i, bottom_i, left_j, right_j, fy, fx = pixels_of_step(
                tl.minimum(row, rows - 1),
                column,
                exists & (row < rows),
                sub,
                label_h,
                label_w,
                student_h,
                student_w,
                STUDENT,
                False,
                R,
                S,
                SUB_C,
                ALIGN_CORNERS,
                INT,
                FLOAT,
            )
            label, weight, _, _ = read_labels(
                labels, weights, y, x, inside, classes, UNLABELLED, WEIGHTS, FLOAT
            )
            valid = (label >= 0) & own
            taps = offsets(top_i, bottom_i, left_j, right_j, student_y, student_x)
            z_s = read_logits(
                student + tl.cast(c, tl.int64) * student_c,
                taps,
                (fy, fx),
                taps,
                1.0,
                valid,
                STUDENT,
                False,
                False,
                True,
                FLOAT,
            )
            taps, fractions = taps_under(
                y,
                x,
                (top_i, bottom_i, left_j, right_j),
                (fy, fx),
                (label_h, label_w),
                (teacher_h, teacher_w),
                (teacher_y, teacher_x),
                TEACHER,
                ALIGN_CORNERS,
                INT,
                FLOAT,
            )
            z_t = read_logits(
                teacher + tl.cast(c, tl.int64) * teacher_c,
                taps,
                fractions,
                taps,
                1.0,
                valid,
                TEACHER,
                False,
                False,
                True,
                FLOAT,
            )
            zero = z_s * 0.0
            both = (zero, zero)
            k = Class(z_s, z_t, zero, zero, zero, zero, label == c, label == classes, zero, both)
            known = terms.begin(TERM, VARIANT, n, (), zero, PTX)
            strength, _ = terms.first(TERM, VARIANT, n, known, k, PTX)
            strength = tl.where(valid, strength[FIRST], LOWEST)
            above = tl.max(tl.max(strength, axis=0, keep_dims=True), axis=1, keep_dims=True)
            bound = tl.maximum(largest, above)
            e = tl.where(valid, tl.exp2((strength - bound) * LOG2_E) * weight, 0.0)
            e = tl.sum(tl.sum(e, axis=0, keep_dims=True), axis=1, keep_dims=True)
            total = total * tl.exp2((largest - bound) * LOG2_E) + e
            largest = bound
        bound = tl.max(tl.max(largest, axis=3, keep_dims=True), axis=2, keep_dims=True)
        total = total * tl.exp2((largest - bound) * LOG2_E)
        row = tl.cast(PLACE, tl.int64) * tl.num_programs(0) + tl.program_id(0)
        place = found + (row * classes + c) * 2
        tl.store(place, tl.max(tl.max(tl.max(tl.max(bound, 3), 2), 1), 0))
        tl.store(place + 1, tl.sum(tl.sum(tl.sum(tl.sum(total, 3), 2), 1), 0))


@triton.jit(do_not_specialize=["programs", "classes"])
def reduce(
    found,  # [softmaxes, B, programs, C, 2]
    out,  # [softmaxes, 3, B, C] out: maximum, 1 / sum exp(`first` - maximum), log of that sum plus
    # the maximum
    programs,
    classes,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0).to(tl.int64)
    which = tl.program_id(2)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < classes
    largest = tl.full([BLOCK], LOWEST, FLOAT)
    total = tl.zeros([BLOCK], tl.float64)  # over a million pixels
    for program in range(programs):
        place = found + (((which * images + image) * programs + program) * classes + c) * 2
        here = tl.load(place, mask=inside, other=LOWEST)
        part = tl.load(place + 1, mask=inside, other=0.0)
        bound = max_or_nan(largest, here)
        total = total * tl.exp2((largest - bound) * LOG2_E).to(tl.float64)
        total += (part * tl.exp2((here - bound) * LOG2_E)).to(tl.float64)
        largest = bound
    place = out + (3 * which * images + image) * classes + c
    tl.store(place, largest, mask=inside)
    tl.store(place + images * classes, (1.0 / total).to(FLOAT), mask=inside)
    log = largest.to(tl.float64) + tl.log(total)
    tl.store(place + 2 * images * classes, log.to(FLOAT), mask=inside)
