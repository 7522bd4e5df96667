"""The fused pass: every term of docs/method.md, 2 to 6, from low-resolution logits.

One program walks over a few thousand pixels (`tiles.py`), all classes of them, and per step:

    bounds      of each corner's logits, so that exponentials cannot overflow
    totals      what the call's terms need to know of a pixel (`statistics.py`)
    terms       what each makes of it: own sums, values, coefficients of the gradient (`terms/`)
    gradients   added to the logits' corners, and the sums that only values need (`gradients.py`)

Full-resolution logits, probabilities and gradients exist in registers only. Gradients leave without
their scale, one tensor of the logits' resolution per group of terms that share a denominator
(`combine.py` adds them up in backward); within it each term has its weight over that of the group's
first term. Only hetero, whose value comes with the factor of its gradient, has its own
(`Traits.own_gradient`). On the label grid, where those would be the largest tensors of the step,
nothing is kept and backward runs the pass again with the scales at hand.

Cost per pixel and class for ce + hetero at T = 2, stride 4, 16 pixels per thread, in instructions
(docs/triton.md has the counts read off the machine code): bounds 3, statistics 21 with 2
exponentials, gradients 29 with 2 exponentials and a logarithm. Bytes: both low-resolution logits
read and each group's gradient written once from memory (the loops read them again from the first
cache), each label read once.

The exact maximum of a pixel is not computed: m = the interpolated maxima of the corners bounds it,
and is folded into the corners before interpolation, which costs nothing per pixel. Where the bound
is too far above the maximum (2^-32 of it would be lost), or a logit is huge, infinite or NaN, the
program raises its flag, and the same pass compiled as CAREFUL, launched behind it over the same
tiles, repeats that tile with each pixel's exact maximum; programs without a flag return at once.

Deterministic: the tiles depend on shapes only, every sum has one order, nothing is atomic.
"""

import triton
import triton.language as tl

from . import terms
from .formulas import LOG2_E, number
from .gradients import gradients
from .interpolation import CORNERS, DIRECT, between, corner_bounds, pixel_bounds
from .partials import FLAG, ROW, store_counts, store_sums, with_pixels
from .statistics import (
    SMALLEST_TOTAL,
    Model,
    Pixels,
    add_tallies,
    find_totals,
    how,
    own_sums,
    tops,
    usual_totals,
)
from .terms.term import Coefficients, PassNumbers
from .tiles import (
    offsets,
    on_label_grid,
    over_pixels,
    over_program,
    own_columns,
    pixels_of_step,
    read_labels,
    taps_under,
)


@triton.jit
def gradient_scale(
    bits,  # of the term's weight
    grad_totals,
    TERMS: tl.constexpr,
    K: tl.constexpr,
    GRAD: tl.constexpr,
    HOW: tl.constexpr,
):
    """What a term's gradient is multiplied by. CORNERS: for the first of its slot that is 1."""
    scale = 1.0
    if GRAD and HOW.STUDENT == DIRECT and TERMS[K][2] >= 0:
        scale = number(bits, HOW.FLOAT) * tl.load(grad_totals + TERMS[K][2]).to(HOW.FLOAT)
    elif GRAD and not terms.leads(TERMS, K):
        scale = number(bits, HOW.FLOAT)
    return scale


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def worst(x):
    """The smallest of a thread's pixels, [R, S, N, L] (or fewer) -> [1, 1, N, L]."""
    return tl.min(tl.min(x, axis=0, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def model_at(
    pointer,
    class_stride,
    classes,
    taps,
    fractions,
    scale,
    temperature,
    valid,
    SOURCE: tl.constexpr,
    FOLD: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """What the loops take (`statistics.py`), and 1 where its logits are finite, else 0."""
    FOLDED: tl.constexpr = FOLD and SOURCE == CORNERS
    fold = taps
    m = tl.zeros(valid.shape, FLOAT)
    exact_m = m
    troubled = m > 0.0
    if SOURCE == CORNERS:
        m00, m01, m10, m11, trace = corner_bounds(
            pointer, class_stride, classes, taps, CAREFUL, FLOAT
        )
        if FOLDED:
            fold = (m00 * scale, m01 * scale, m10 * scale, m11 * scale)
        else:
            fy, fx = fractions
            m = between(between(m00, m10, fy), between(m01, m11, fy), fx)
        if CAREFUL:
            exact_m, _ = pixel_bounds(
                pointer, class_stride, classes, taps, fractions, valid, SOURCE, True, FLOAT
            )
            model = Model(pointer, class_stride, taps, fractions, fold, m, exact_m, troubled)
            least = usual_totals(
                model, classes, valid, scale, temperature, SOURCE, FOLD, CAREFUL, FLOAT
            )
            troubled = valid & (~is_finite(trace) | ~(least > SMALLEST_TOTAL))
    else:
        m, trace = pixel_bounds(
            pointer, class_stride, classes, taps, fractions, valid, SOURCE, CAREFUL, FLOAT
        )
        exact_m = m
    model = Model(pointer, class_stride, taps, fractions, fold, m, exact_m, troubled)
    return model, worst(tl.where(is_finite(trace), 1.0, 0.0))


@triton.jit
def times(found, weight):
    """Of a pixel with a weight: its share in every sum."""
    return Coefficients(
        found.value * weight,
        found.share * weight,
        found.student * weight,
        found.other * weight,
        found.label * weight,
    )


@triton.jit
def write_maps(maps, plane, place, known, valid, visible):
    """reliability and discrepancy"""
    tl.store(maps + place, tl.where(valid, known[0], 0.0), mask=visible)
    tl.store(maps + plane + place, tl.where(valid, known[1], 0.0), mask=visible)


@triton.jit
def write_diagnostics(maps, plane, place, t, at, visible, HOW: tl.constexpr):
    """Of labelled pixels the loss and whether the label is on top, of all whether both tops are
    one."""
    right, agrees = tops(at, HOW)
    tl.store(maps + place, tl.where(t.labelled > 0.0, t.student_nll, 0.0), mask=visible)
    tl.store(maps + plane + place, right * t.labelled, mask=visible)
    tl.store(maps + 2 * plane + place, agrees * t.one, mask=visible)


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
        "target_b",
        "target_y",
        "target_x",
        "ignore_index",
        "unlabelled_index",
        "weight_b",
        "weight_y",
        "weight_x",
        "temperature_bits",
    ]
)
def distillation_pass(
    student,  # [B, C, h, w] logits
    teacher,  # [B, C, h', w'] logits; not read where TEACHER < 0
    target,  # [B, H, W] labels
    class_weight,  # [C], read if WEIGHTED
    gradient,  # CORNERS: [slots, B, C, chunks * (TI + 1), w] out; DIRECT: [B, C, H, W] out
    grad_totals,  # float64: scales of the groups, read if DIRECT
    maps,  # [planes, B, H, W] out: two if MAPS, then three if DIAGNOSTICS
    partials,  # [B * programs, ROW] float64 out
    space,  # [softmaxes over space, 3, B, C]: see `reduce` in space.py, of a term over classes its
    # numbers; where its sums are collected, [B * programs, tallies, C] float64 out
    programs,  # per image
    classes,
    label_h,
    label_w,
    student_h,
    student_w,
    teacher_h,
    teacher_w,
    rows,  # of cells (h + 1), or of labels if DIRECT
    columns,  # cells of a row times chunks
    per_row,  # cells of a row
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
    gradient_b,
    gradient_c,
    gradient_y,
    gradient_x,
    ignore_index,
    unlabelled_index,
    pixel_weight,  # [B, H, W], read if WEIGHTS
    weight_b,
    weight_y,
    weight_x,
    temperature_bits,
    numbers,  # of each term the bits of its weight (CORNERS: over that of its slot's first term)
    # and of its other numbers, in the order of its class in terms.py
    TERMS: tl.constexpr,  # `terms.Entry` each
    STUDENT: tl.constexpr,  # CORNERS or DIRECT
    TEACHER: tl.constexpr,  # CORNERS, GATHER, DIRECT, or -1 for none
    WHOLE: tl.constexpr,  # DIRECT: rows of labels divide into cells, and loads are 16 bytes wide
    SAME_TAPS: tl.constexpr,  # both are CORNERS, and their rows and columns equally far apart
    WEIGHTED: tl.constexpr,
    UNLABELLED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MAPS: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    POWER: tl.constexpr,  # e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
    GRAD: tl.constexpr,
    SLOTS: tl.constexpr,  # CORNERS: gradients to write
    ALIGN_CORNERS: tl.constexpr,
    CAREFUL: tl.constexpr,
    PTX: tl.constexpr,
    PICK_LABEL: tl.constexpr,  # of few classes: a selection per class instead of loads per pixel
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
    # one axis of the grid: the others end at 65535
    program = tl.program_id(0) % programs
    image = (tl.program_id(0) // programs).to(tl.int64)
    partial = partials + (image * programs + program) * ROW
    if CAREFUL:
        if tl.load(partial + FLAG) == 0.0:
            return
    # --- what this call needs ------------------------------------------------------------------
    HALO: tl.constexpr = 1 if GRAD and STUDENT == CORNERS else 0
    NEEDS: tl.constexpr = terms.needs_of(TERMS, DIAGNOSTICS)
    TALLIES: tl.constexpr = terms.tallies_of(TERMS)
    SOFT: tl.constexpr = NEEDS.pair or NEEDS.student_total
    VALUES: tl.constexpr = not (GRAD and STUDENT == DIRECT)
    HOW: tl.constexpr = how(
        STUDENT,
        TEACHER,
        not NEEDS.raw_logits,
        WEIGHTED,
        UNLABELLED,
        WEIGHTS,
        POWER if SOFT else 1,
        PICK_LABEL,
        CAREFUL,
        PTX,
        FLOAT,
    )
    temperature = number(temperature_bits, FLOAT)
    scale = LOG2_E / temperature if SOFT else temperature * 0.0 + LOG2_E
    hard_exponent = (
        temperature if SOFT else temperature * 0.0 + 1.0
    )  # e at T = 1 is e to this power
    class_count = tl.cast(classes, FLOAT)
    gradient_width = tl.cast(student_w, INT)
    term_numbers = ()
    for k in tl.static_range(len(TERMS)):
        term_numbers = term_numbers + (terms.numbers(TERMS[k][0], numbers[k], class_count, FLOAT),)
    chunk, column, exists, own_lane = own_columns(program, columns, per_row, HALO, N, L, INT)
    lane = tl.arange(0, L)[None, None, None, :] + tl.zeros([1, 1, N, L], tl.int32)
    left_lane = tl.maximum(lane - 1, 0)
    from_left = lane > 0
    chunks = columns // per_row
    patch_plane = (chunks * (TI + 1)).to(tl.int64) * student_w
    batch = (tl.num_programs(0) // programs).to(tl.int64)
    slot_stride = batch * classes * patch_plane
    space_step = batch * classes
    if TALLIES > 0:
        space += tl.program_id(0).to(tl.int64) * TALLIES * classes
    else:
        space += image * classes
    student += image * student_b
    teacher += image * teacher_b
    target += image * target_b
    if WEIGHTS:
        pixel_weight += image * weight_b

    labels = (target, target_y, target_x, ignore_index, unlabelled_index)
    weights = (pixel_weight, weight_y, weight_x)
    nothing = tl.zeros([1, 1, N, L], FLOAT)
    values = (nothing,) * len(TERMS)
    shares = values
    none = tl.zeros([1, 1, N, L], tl.int32)
    counts = (none, none, none, none, nothing, nothing)
    smallest = nothing + 1.0  # of all totals that a bound can make too small

    for step in range(TI * SUB_R * SUB_C):
        t = step // (SUB_R * SUB_C)
        sub = step % (SUB_R * SUB_C)
        row = chunk * TI + t
        row_exists = exists & (row < rows)
        y, x, inside, top_i, bottom_i, left_j, right_j, fy, fx = pixels_of_step(
            tl.minimum(row, rows - 1),
            column,
            row_exists,
            sub,
            label_h,
            label_w,
            student_h,
            student_w,
            STUDENT,
            WHOLE,
            R,
            S,
            SUB_C,
            ALIGN_CORNERS,
            INT,
            FLOAT,
        )
        label, weight, bad, bad_weight = read_labels(
            labels, weights, y, x, inside, classes, UNLABELLED, WEIGHTS, FLOAT
        )
        valid = label >= 0
        if not CAREFUL:
            found = (label, weight, bad, bad_weight)
            counts = with_pixels(counts, found, classes, UNLABELLED, WEIGHTS)

        maps_plane = batch * label_h * label_w
        maps_place = (image * label_h + y) * label_w + x

        # --- bounds ----------------------------------------------------------------------------
        if STUDENT == DIRECT:
            student_taps = on_label_grid(y, x, student_y, student_x)
        else:
            student_taps = offsets(top_i, bottom_i, left_j, right_j, student_y, student_x)
        student_model, finite = model_at(
            student,
            student_c,
            classes,
            student_taps,
            (fy, fx),
            scale,
            hard_exponent,
            valid,
            STUDENT,
            not NEEDS.raw_logits,
            CAREFUL,
            FLOAT,
        )
        smallest = tl.minimum(smallest, finite)
        teacher_model = student_model
        if TEACHER >= 0:
            teacher_taps, teacher_fractions = student_taps, (fy, fx)
            if not SAME_TAPS:
                teacher_taps, teacher_fractions = taps_under(
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
            teacher_model, finite = model_at(
                teacher,
                teacher_c,
                classes,
                teacher_taps,
                teacher_fractions,
                scale,
                hard_exponent,
                valid,
                TEACHER,
                not NEEDS.raw_logits,
                CAREFUL,
                FLOAT,
            )
            smallest = tl.minimum(smallest, finite)

        # --- pixel: totals, what each term knows, its sums and coefficients ----------------------
        # Of an invalid pixel there are harmless numbers, and `one` takes it out of gradients.
        at = Pixels(
            student_model,
            teacher_model,
            classes,
            label,
            valid,
            scale,
            hard_exponent,
            class_weight,
            weight,
            space,
            space_step,
        )
        totals, weight_sum, least = find_totals(at, NEEDS, HOW)
        p = PassNumbers(temperature, 1.0 / temperature, scale, class_count, weight_sum)
        zero = totals.one * 0.0
        if DIAGNOSTICS:
            first = maps + (2 if MAPS else 0) * maps_plane
            write_diagnostics(first, maps_plane, maps_place, totals, at, inside & own_lane, HOW)
        if TALLIES > 0:
            add_tallies(TERMS[0][0], TALLIES, totals, at, own_lane, step == 0, HOW)
        knowns = ()
        bounds = ()
        owns = ()
        coefficients = ()
        new_values = ()
        new_shares = ()
        for k in tl.static_range(len(TERMS)):
            known = terms.begin(TERMS[k][0], TERMS[k][1], term_numbers[k], totals, zero, PTX)
            bound = (zero, zero)
            own = terms.start(TERMS[k][0], zero)
            if terms.traits(TERMS[k][0], TERMS[k][1]).has_loop:
                own, bound, known, its_least = own_sums(
                    TERMS[k][0],
                    TERMS[k][1],
                    terms.place_over_space(TERMS, k),
                    term_numbers[k],
                    p,
                    known,
                    at,
                    HOW,
                )
                least = tl.minimum(least, its_least)
            scale_of_term = gradient_scale(numbers[k][0], grad_totals, TERMS, k, GRAD, HOW)
            found = terms.pixel(
                TERMS[k][0],
                TERMS[k][1],
                term_numbers[k],
                p,
                totals,
                known,
                own,
                scale_of_term,
                PTX,
            )
            found = Coefficients(*found)
            if WEIGHTS and terms.spaces(TERMS[k]) == 0:
                found = times(found, weight)
            value = values[k]
            if VALUES and not terms.traits(TERMS[k][0], TERMS[k][1]).has_value_loop:
                value += over_pixels(found.value)
            share = shares[k]
            if VALUES and TERMS[k][3]:
                share += over_pixels(found.share)
            if MAPS and terms.maps_early(TERMS[k]):
                write_maps(maps, maps_plane, maps_place, known, valid, inside & own_lane)
            new_values = new_values + (value,)
            new_shares = new_shares + (share,)
            knowns = knowns + (known,)
            bounds = bounds + (bound,)
            owns = owns + (own,)
            coefficients = coefficients + (found,)
        values = new_values
        shares = new_shares
        if not CAREFUL:
            smallest = tl.minimum(smallest, worst(least))

        # --- gradients, and the values that come with them ---------------------------------------
        LATE: tl.constexpr = terms.some_late(TERMS, MAPS)
        if GRAD or LATE:
            gradient_plane = gradient + image * gradient_b
            class_step = gradient_c
            place = y * gradient_y + x * gradient_x
            lanes = (gradient_width, gradient_width)
            if STUDENT == CORNERS:
                gradient_plane = gradient + image * classes * patch_plane
                class_step = patch_plane
                # gradients of cell row i go to rows i and i + 1 of the logits, `row` and the next
                # of this chunk's TI + 1 rows
                corner = (chunk * (TI + 1) + t) * gradient_width + (column - 1)
                place = tl.max_contiguous(corner, [1, 1, 2, 4])
                lanes = (
                    row > chunk * TI,
                    from_left,
                    left_lane,
                    own_lane & (column > 0),
                    gradient_width,
                    row * 0 + sub > 0,
                )
            else:
                place, _, _, _ = on_label_grid(y, x, gradient_y, gradient_x)
            owns, knowns = gradients(
                p,
                (term_numbers, knowns, bounds, owns, coefficients),
                gradient_plane,
                class_step,
                slot_stride,
                place,
                lanes,
                inside,
                at,
                TERMS,
                SLOTS,
                GRAD,
                MAPS,
                SUB_R * SUB_C == 1,
                HOW,
            )
        if LATE:
            new_values = ()
            for k in tl.static_range(len(TERMS)):
                value = values[k]
                if VALUES and terms.traits(TERMS[k][0], TERMS[k][1]).has_value_loop:
                    late = Coefficients(*coefficients[k]).value * owns[k][0]
                    value += over_pixels(tl.where(valid, late, 0.0))
                if MAPS and terms.maps_late(TERMS[k]):
                    write_maps(maps, maps_plane, maps_place, knowns[k], valid, inside & own_lane)
                new_values = new_values + (value,)
            values = new_values
        if GRAD and STUDENT == CORNERS:
            # the next step reads what this one wrote
            tl.debug_barrier()

    # --- sums ------------------------------------------------------------------------------------
    if VALUES:
        p = PassNumbers(temperature, 1.0 / temperature, scale, class_count, class_count)
        store_sums(partial, values, shares, term_numbers, p, own_lane, TERMS)
    if not CAREFUL:
        store_counts(partial, counts, own_lane, UNLABELLED, WEIGHTS)
        found = tl.where(smallest > SMALLEST_TOTAL, 0.0, 1.0)
        tl.store(partial + FLAG, over_program(found))
