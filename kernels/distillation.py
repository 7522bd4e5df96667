"""The fused pass: every term of docs/method.md, 2 to 6, from low-resolution logits.

One program walks over a few thousand pixels (`tiles.py`), all classes of them, and per step:

    bounds      of each corner's logits, so that exponentials cannot overflow
    statistics  what softmax, KL and reliability need to know of a pixel
    pixel       reliability, mixed_target, discrepancy, values, and coefficients of the gradients
    gradients   sum_c m_c log m_c, and each term's gradient, added to the logits' corners

Full-resolution logits, probabilities and gradients exist in registers only. Gradients leave without
their scale, one tensor of the logits' resolution per group of terms that share a denominator
(`combine.py` adds them up in backward); within it each term has its weight over that of the group's
first term. Only hetero, whose value comes with the factor of its gradient, has its own. On the
label grid, where those would be the largest tensors of the step, nothing is kept and backward runs
the pass again with the scales at hand.

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

from .formulas import (
    LN_2,
    LOG2_E,
    bernoulli_kl,
    bernoulli_kl_gradient,
    cross_entropy,
    cross_entropy_gradient_numerator,
    discrepancy,
    fast_log2,
    feature_gradient_scale,
    js_weights,
    kl,
    log,
    log2,
    max_or_nan,
    mixed_target,
    negative_log_likelihood,
    power,
    reciprocal,
    reliability,
)
from .interpolation import CORNERS, DIRECT, between, corner_bounds, pixel_bounds
from .statistics import (
    _SMALLEST_NORMAL,
    SMALLEST_TOTAL,
    log_ratio,
    mixed_logits,
    one_model,
    paper_at_label,
    paper_class,
    paper_sums,
    ratio_sums,
    read,
    squared_difference,
    two_models,
    usual_totals,
)
from .tiles import (
    add_to_corners,
    offsets,
    on_label_grid,
    other_taps,
    over_pixels,
    over_program,
    own_columns,
    pixels_of_step,
    read_labels,
)

# What a program leaves in its row of `partials`, [programs, ROW] float64: numerators of ce, kd,
# hetero and feature, their denominators, and the following.
ROW = tl.constexpr(16)
VALID = tl.constexpr(8)
BAD = tl.constexpr(9)
FLAG = tl.constexpr(10)

BITS_MASK = tl.constexpr(0x5A5A5A5A5A5A5A5A)

# hetero=
SOFTMAX_KL = tl.constexpr(1)
PAPER = tl.constexpr(2)
PAPER_SPACE = tl.constexpr(3)
# kd=
FORWARD = tl.constexpr(1)
REVERSE = tl.constexpr(2)
JS = tl.constexpr(3)


@triton.jit
def number(bits, FLOAT: tl.constexpr):
    """A float64 that came as its bits: arguments are float32, and a new value compiles nothing.
    (The mask keeps 0.0 from coming as a 32-bit integer.)"""
    bits = tl.cast(bits, tl.int64) ^ BITS_MASK
    return tl.cast(bits, tl.float64, bitcast=True).to(FLOAT)


@triton.jit
def gradient_scale(
    bits,  # of the term's weight
    grad_totals,
    GRAD: tl.constexpr,
    STUDENT: tl.constexpr,
    SLOT: tl.constexpr,
    FIRST: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """What a term's gradient is multiplied by. FIRST: CORNERS, and the weight is 1."""
    scale = 1.0
    if GRAD and STUDENT == DIRECT:
        scale = number(bits, FLOAT) * tl.load(grad_totals + SLOT).to(FLOAT)
    elif GRAD and not FIRST:
        scale = number(bits, FLOAT)
    return scale


@triton.jit
def sum_of(
    a,
    b,
    c,
    d,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    FROM_ZERO: tl.constexpr,
):
    """The sum of those that are there. FROM_ZERO: a product then ends where it stands, instead of
    as a multiply-add far below; an instruction more, and fewer registers."""
    if FROM_ZERO:
        total = tl.zeros(a.shape, a.dtype)
        if A:
            total += a
        if B:
            total += b
        if C:
            total += c
        if D:
            total += d
        return total
    total = a
    if B:
        total = a + b if A else b
    if C:
        total = total + c if A or B else c
    if D:
        total = total + d if A or B or C else d
    return total


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
    FOLDED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """What the loops take (`statistics.py`), and a number that is finite if its logits are."""
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
            model = (pointer, class_stride, taps, fractions, fold, m, exact_m, troubled)
            least = usual_totals(
                model, classes, valid, scale, temperature, SOURCE, FOLDED, CAREFUL, FLOAT
            )
            troubled = valid & (~is_finite(trace) | ~(least > SMALLEST_TOTAL))
    else:
        m, trace = pixel_bounds(
            pointer, class_stride, classes, taps, fractions, valid, SOURCE, CAREFUL, FLOAT
        )
        exact_m = m
    return (pointer, class_stride, taps, fractions, fold, m, exact_m, troubled), trace


@triton.jit
def label_logit(
    model,
    label,
    picked,
    scale,
    valid,
    SOURCE: tl.constexpr,
    FOLDED: tl.constexpr,
    PICKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """z_label - m of each pixel; PICKED: from its `a`, which a loop has found. CAREFUL: -inf stays
    -inf, because the loss of a label on a masked class is infinite."""
    to_logits = 1.0 / scale
    x = picked * to_logits
    if CAREFUL or not PICKED:
        plane = model[0] + tl.maximum(label, 0).to(tl.int64) * model[1]
        z, a = read(model, plane, scale, valid, SOURCE, FOLDED, CAREFUL, FLOAT)
        if not PICKED:
            x = a * to_logits
        if CAREFUL:
            exact = z - model[6]
            x = tl.where(model[7] | ~(exact > -1e30), exact, x)
    return x


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
        "temperature_bits",
        "tau_bits",
        "beta_bits",
        "smoothing_bits",
        "ce_bits",
        "kd_bits",
        "hetero_bits",
        "feature_bits",
    ]
)
def distillation_pass(
    student,  # [B, C, h, w] logits
    teacher,  # [B, C, h', w'] logits; not read where TEACHER < 0
    target,  # [B, H, W] labels
    class_weight,  # [C], read if WEIGHTED
    gradient,  # CORNERS: [slots, B, C, chunks * (TI + 1), w] out; DIRECT: [B, C, H, W] out
    grad_totals,  # float64: scales of the groups, read if DIRECT
    maps,  # [2, B, H, W] out, written if MAPS
    partials,  # [B * programs, ROW] float64 out
    space_shift,  # [B, C]: the maximum of H_s + dH over an image's pixels, and
    space_weight,  # [B, C]: 1 / sum exp(H_s + dH - shift); read if PAPER_SPACE and EVALUATION
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
    temperature_bits,
    tau_bits,
    beta_bits,
    smoothing_bits,
    ce_bits,  # weights of the terms; CORNERS: over that of the slot's first term
    kd_bits,
    hetero_bits,
    feature_bits,
    STUDENT: tl.constexpr,  # CORNERS or DIRECT
    TEACHER: tl.constexpr,  # CORNERS, GATHER, DIRECT, or -1 for none
    WHOLE: tl.constexpr,  # DIRECT: rows of labels divide into cells, and loads are 16 bytes wide
    SAME_TAPS: tl.constexpr,  # both are CORNERS, and their rows and columns equally far apart
    CE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KD: tl.constexpr,  # 0, FORWARD, REVERSE, JS
    HETERO: tl.constexpr,  # 0, SOFTMAX_KL, PAPER, PAPER_SPACE: for the term or for the maps
    HETERO_TERM: tl.constexpr,
    MIX_LOGITS: tl.constexpr,
    MIX_TEACHER: tl.constexpr,
    EVALUATION: tl.constexpr,
    FEATURE: tl.constexpr,
    MAPS: tl.constexpr,
    POWER: tl.constexpr,  # e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
    GRAD: tl.constexpr,
    SLOT_CE: tl.constexpr,  # where a term's gradient (CORNERS) or its group's scale (DIRECT) is
    SLOT_KD: tl.constexpr,
    SLOT_HETERO: tl.constexpr,
    SLOT_FEATURE: tl.constexpr,
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
    KNOWLEDGE: tl.constexpr = HETERO == SOFTMAX_KL
    PAIR: tl.constexpr = KD > 0 or KNOWLEDGE
    SOFT: tl.constexpr = PAIR or HETERO == PAPER
    NLL: tl.constexpr = CE or KNOWLEDGE
    READS_Z: tl.constexpr = FEATURE or HETERO == PAPER or HETERO == PAPER_SPACE
    STUDENT_FOLDED: tl.constexpr = STUDENT == CORNERS and not READS_Z
    TEACHER_FOLDED: tl.constexpr = TEACHER == CORNERS and not READS_Z
    PROBS: tl.constexpr = KNOWLEDGE and HETERO_TERM and not (MIX_LOGITS or MIX_TEACHER)
    TERMS: tl.constexpr = CE + (KD > 0) + HETERO_TERM + FEATURE
    # CORNERS: whether a term is the first of its slot (ce, kd, feature; hetero always is)
    KD_FIRST: tl.constexpr = not (CE and SLOT_KD == SLOT_CE)
    FEATURE_FIRST: tl.constexpr = not (CE and SLOT_FEATURE == SLOT_CE) and not (
        KD > 0 and SLOT_FEATURE == SLOT_KD
    )
    # e of the labels' temperature, for a call that has no other
    HARD_POWER: tl.constexpr = POWER if SOFT else 1

    temperature = number(temperature_bits, FLOAT)
    inverse_tau = 1.0 / number(tau_bits, FLOAT)
    beta = number(beta_bits, FLOAT)
    one_minus_beta = (1.0 - number(beta_bits, tl.float64)).to(FLOAT)
    smoothing = number(smoothing_bits, FLOAT)
    scale = LOG2_E / temperature if SOFT else temperature * 0.0 + LOG2_E
    # e at T = 1 is e to this power
    hard_exponent = temperature if SOFT else temperature * 0.0 + 1.0
    class_count = tl.cast(classes, FLOAT)
    gradient_width = tl.cast(student_w, INT)

    chunk, column, exists, own = own_columns(program, columns, per_row, HALO, N, L, INT)
    lane = tl.arange(0, L)[None, None, None, :] + tl.zeros([1, 1, N, L], tl.int32)
    left_lane = tl.maximum(lane - 1, 0)
    from_left = lane > 0
    chunks = columns // per_row
    patch_plane = (chunks * (TI + 1)).to(tl.int64) * student_w
    batch = (tl.num_programs(0) // programs).to(tl.int64)
    slot_stride = batch * classes * patch_plane

    student += image * student_b
    teacher += image * teacher_b
    target += image * target_b

    nothing = tl.zeros([1, 1, N, L], FLOAT)
    ce_sum = nothing
    weight_of_labels = nothing
    kd_sum = nothing
    hetero_sum = nothing
    hetero_weight = nothing
    feature_sum = nothing
    valid_count = tl.zeros([1, 1, N, L], tl.int32)
    label_count = valid_count
    smallest = nothing + 1.0  # of all totals that a bound can make too small

    for at in range(TI * SUB_R * SUB_C):
        t = at // (SUB_R * SUB_C)
        sub = at % (SUB_R * SUB_C)
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
        label, counts = read_labels(target, y, x, inside, target_y, target_x, classes, ignore_index)
        valid = label >= 0
        one = tl.where(valid, 1.0, 0.0).to(FLOAT)
        if not CAREFUL:
            valid_count += over_pixels(valid.to(tl.int32))
            label_count += over_pixels(counts)

        # --- bounds ----------------------------------------------------------------------------
        if STUDENT == DIRECT:
            student_taps = on_label_grid(y, x, student_y, student_x)
        else:
            student_taps = offsets(top_i, bottom_i, left_j, right_j, student_y, student_x)
        student_model, trace = model_at(
            student,
            student_c,
            classes,
            student_taps,
            (fy, fx),
            scale,
            hard_exponent,
            valid,
            STUDENT,
            STUDENT_FOLDED,
            CAREFUL,
            FLOAT,
        )
        smallest = tl.minimum(smallest, worst(tl.where(is_finite(trace), 1.0, 0.0)))
        teacher_model = student_model
        if TEACHER >= 0:
            teacher_fractions = (fy, fx)
            if SAME_TAPS:
                teacher_taps = student_taps
            elif TEACHER == CORNERS:
                teacher_taps = offsets(top_i, bottom_i, left_j, right_j, teacher_y, teacher_x)
            elif TEACHER == DIRECT:
                teacher_taps = on_label_grid(y, x, teacher_y, teacher_x)
            else:
                teacher_taps, teacher_fractions = other_taps(
                    y,
                    x,
                    label_h,
                    label_w,
                    teacher_h,
                    teacher_w,
                    teacher_y,
                    teacher_x,
                    ALIGN_CORNERS,
                    INT,
                    FLOAT,
                )
            teacher_model, trace = model_at(
                teacher,
                teacher_c,
                classes,
                teacher_taps,
                teacher_fractions,
                scale,
                hard_exponent,
                valid,
                TEACHER,
                TEACHER_FOLDED,
                CAREFUL,
                FLOAT,
            )
            smallest = tl.minimum(smallest, worst(tl.where(is_finite(trace), 1.0, 0.0)))

        # --- statistics ------------------------------------------------------------------------
        if PAIR:
            (
                student_total,
                teacher_total,
                student_others,
                teacher_others,
                student_label,
                teacher_label,
                difference,
                student_top,
                teacher_top,
                weighted,
                weight_sum,
            ) = two_models(
                student_model,
                teacher_model,
                classes,
                label,
                valid,
                scale,
                temperature,
                class_weight,
                STUDENT,
                TEACHER,
                STUDENT_FOLDED,
                TEACHER_FOLDED,
                2 if KNOWLEDGE else (1 if CE else 0),
                PICK_LABEL,
                KD == REVERSE or KD == JS,
                CE and SMOOTHING,
                WEIGHTED,
                POWER,
                CAREFUL,
                FLOAT,
            )
        elif SOFT or CE:
            student_total, student_others, student_label, weighted, weight_sum = one_model(
                student_model,
                classes,
                label,
                valid,
                scale,
                temperature,
                class_weight,
                STUDENT,
                STUDENT_FOLDED,
                CE,
                PICK_LABEL,
                CE and SMOOTHING,
                WEIGHTED,
                HARD_POWER,
                CAREFUL,
                FLOAT,
            )

        # --- pixel: totals ---------------------------------------------------------------------
        # From here on an invalid pixel holds harmless numbers, and `one` takes it out of the sums.
        least = one * 0.0 + 1.0
        if NLL:
            student_label = label_logit(
                student_model,
                label,
                student_label,
                scale,
                valid,
                STUDENT,
                STUDENT_FOLDED,
                PICK_LABEL,
                CAREFUL,
                FLOAT,
            )
            e = tl.exp2(max_or_nan(student_label, -1e30) * LOG2_E)
            hard_total = tl.where(valid, student_others + e, 1.0)
            hard_inverse = reciprocal(hard_total, PTX)
            student_nll = negative_log_likelihood(student_others, e, student_label, PTX)
            student_nll = tl.where(valid, student_nll, 0.0)
            least = tl.minimum(least, hard_total)
        if KNOWLEDGE:
            teacher_label = label_logit(
                teacher_model,
                label,
                teacher_label,
                scale,
                valid,
                TEACHER,
                TEACHER_FOLDED,
                PICK_LABEL,
                CAREFUL,
                FLOAT,
            )
            e = tl.exp2(max_or_nan(teacher_label, -1e30) * LOG2_E)
            teacher_nll = negative_log_likelihood(teacher_others, e, teacher_label, PTX)
            teacher_nll = tl.where(valid, teacher_nll, 0.0)
            least = tl.minimum(least, tl.where(valid, teacher_others + e, 1.0))
        if SOFT:
            student_total = tl.where(valid, student_total, 1.0)
            student_inverse = reciprocal(student_total, PTX)
            student_log2 = log2(student_total)
            least = tl.minimum(least, student_total)
        if PAIR:
            teacher_total = tl.where(valid, teacher_total, 1.0)
            teacher_inverse = reciprocal(teacher_total, PTX)
            teacher_log2 = log2(teacher_total)
            least = tl.minimum(least, teacher_total)
            total_ratio = student_total * teacher_inverse
            kl_teacher_student = kl(difference, teacher_inverse, teacher_log2, student_log2)

        # --- pixel: cross entropy, kd, feature -------------------------------------------------
        if CE:
            label_weight = one
            if WEIGHTED:
                label_weight = tl.load(
                    class_weight + tl.maximum(label, 0), mask=valid, other=0.0
                ).to(FLOAT)
            ce_hard = (1.0 - smoothing) * label_weight
            ce_soft = one * (smoothing / class_count)
            log_total = nothing
            if SMOOTHING:
                log_total = log(hard_total)
                # a = x log2(e) / T
                weighted = weighted * (temperature * LN_2) if SOFT else weighted * LN_2
            loss = cross_entropy(
                ce_hard,
                ce_soft,
                weight_sum,
                student_nll,
                log_total,
                weighted,
                SMOOTHING,
            )
            ce_sum += over_pixels(loss)
            if WEIGHTED:
                weight_of_labels += over_pixels(label_weight)
            scale_of_term = gradient_scale(
                ce_bits, grad_totals, GRAD, STUDENT, SLOT_CE, True, FLOAT
            )
            ce_hard *= scale_of_term * hard_inverse
            ce_soft = one * (scale_of_term * smoothing / class_count)
        if KD > 0:
            scale_of_term = gradient_scale(
                kd_bits, grad_totals, GRAD, STUDENT, SLOT_KD, KD_FIRST, FLOAT
            )
            on_student = one * (temperature * scale_of_term)
            if KD == FORWARD:
                value = kl_teacher_student
                kd_student = on_student * student_inverse
                kd_other = on_student * teacher_inverse
            else:
                js_teacher_weight, js_student_weight = js_weights(beta, one_minus_beta, total_ratio)
                pivot = log_ratio(
                    student_top,
                    teacher_top,
                    js_teacher_weight,
                    js_student_weight,
                    KD == REVERSE,
                    PTX,
                )
                ratios, js_teacher = ratio_sums(
                    student_model,
                    teacher_model,
                    classes,
                    valid,
                    scale,
                    js_teacher_weight,
                    js_student_weight,
                    pivot,
                    KD == REVERSE,
                    STUDENT,
                    TEACHER,
                    STUDENT_FOLDED,
                    TEACHER_FOLDED,
                    PTX,
                    CAREFUL,
                    FLOAT,
                )
                log2_ratio = student_log2 - teacher_log2
                mean = ratios * student_inverse
                kd_other = -on_student * LN_2 * student_inverse
                if KD == REVERSE:
                    value = LN_2 * (mean + pivot - log2_ratio)
                else:
                    of_teacher = js_teacher * teacher_inverse + log2_ratio
                    value = LN_2 * (beta * of_teacher + one_minus_beta * (mean + pivot))
                    kd_other *= one_minus_beta
                kd_student = kd_other * mean
            kd_sum += over_pixels(one * (temperature * temperature) * value)
        if FEATURE:
            squares = squared_difference(
                student_model,
                teacher_model,
                classes,
                valid,
                scale,
                STUDENT,
                TEACHER,
                CAREFUL,
                FLOAT,
            )
            feature_sum += over_pixels(tl.where(valid, squares, 0.0) * (1.0 / class_count))
            scale_of_term = gradient_scale(
                feature_bits, grad_totals, GRAD, STUDENT, SLOT_FEATURE, FEATURE_FIRST, FLOAT
            )
            feature_scale = one * (scale_of_term * feature_gradient_scale(class_count))

        # --- pixel: reliability, mixed_target, discrepancy -------------------------------------
        scale_of_term = 1.0
        if HETERO_TERM:
            scale_of_term = gradient_scale(
                hetero_bits, grad_totals, GRAD, STUDENT, SLOT_HETERO, True, FLOAT
            )
        if KNOWLEDGE:
            r_t, r_s = reliability(teacher_nll, student_nll, inverse_tau, PTX)
            d = discrepancy(kl_teacher_student)
            weight = one
            if EVALUATION:
                weight = one * d
            if HETERO_TERM:
                hetero_weight += over_pixels(weight)
                on_student = scale_of_term * temperature * weight
                if MIX_LOGITS:
                    mixed_bound, mixed_total, mixed_difference = mixed_logits(
                        student_model,
                        teacher_model,
                        classes,
                        valid,
                        scale,
                        r_t,
                        r_s,
                        STUDENT,
                        TEACHER,
                        STUDENT_FOLDED,
                        TEACHER_FOLDED,
                        CAREFUL,
                        FLOAT,
                    )
                    mixed_total = tl.where(valid, mixed_total, 1.0)
                    least = tl.minimum(least, mixed_total)
                    mixed_inverse = reciprocal(mixed_total, PTX)
                    value = kl(mixed_difference, mixed_inverse, log2(mixed_total), student_log2)
                    hetero_sum += over_pixels(weight * (temperature * temperature) * value)
                    hetero_student = on_student * student_inverse
                    hetero_other = on_student * mixed_inverse
                elif MIX_TEACHER:
                    value = kl_teacher_student
                    hetero_sum += over_pixels(weight * (temperature * temperature) * value)
                    hetero_student = on_student * student_inverse
                    hetero_other = on_student * teacher_inverse
                else:
                    teacher_weight = r_t * total_ratio
                    student_weight = r_s
                    hetero_other = on_student * student_inverse
                    hetero_student = hetero_other * r_t
                    # the value, sum_c x_c (log2 x_c - a_s,c), comes with the last loop; where a
                    # gradient is scaled, no value is read
                    late_scale = temperature * LN_2
                    late_sum = tl.zeros(label.shape, FLOAT)
            if MAPS:
                map_reliability = r_t
                map_discrepancy = d
        elif HETERO == PAPER:
            (
                map_reliability,
                map_discrepancy,
                weight_bound,
                mixed_bound,
                q_inverse,
                q,
                q_a,
            ) = paper_sums(
                student_model,
                teacher_model,
                classes,
                label,
                valid,
                scale,
                MIX_TEACHER,
                EVALUATION,
                STUDENT,
                TEACHER,
                PTX,
                CAREFUL,
                FLOAT,
            )
            if HETERO_TERM:
                q_inverse = tl.where(valid, q_inverse, 0.0)
                value = LN_2 * (student_log2 * q - q_a) * q_inverse
                hetero_sum += over_pixels(tl.where(valid, value, 0.0))
                hetero_other = q_inverse * (scale_of_term / temperature)
                hetero_student = hetero_other * q * student_inverse
        elif HETERO == PAPER_SPACE:
            if MAPS:
                map_reliability, map_discrepancy = paper_at_label(
                    student_model,
                    teacher_model,
                    classes,
                    label,
                    valid,
                    MIX_TEACHER,
                    STUDENT,
                    TEACHER,
                    PTX,
                    CAREFUL,
                    FLOAT,
                )
            if HETERO_TERM:
                # evaluation = none: a mean over pixels and classes, as the weights' own is
                mean = 1.0 if EVALUATION else 1.0 / class_count
                hetero_student = one * (scale_of_term * temperature * mean)
                late_scale = temperature
                late_sum = tl.zeros(label.shape, FLOAT)
        if MAPS:
            place = maps + (image * label_h + y) * label_w + x
            visible = inside & own
            tl.store(place, tl.where(valid, map_reliability, 0.0), mask=visible)
            place += batch * label_h * label_w
            tl.store(place, tl.where(valid, map_discrepancy, 0.0), mask=visible)
        if not CAREFUL:
            smallest = tl.minimum(smallest, worst(least))

        # --- gradients, and the values that take a logarithm per class ---------------------------
        LATE: tl.constexpr = HETERO_TERM and (PROBS or HETERO == PAPER_SPACE)
        if GRAD or LATE:
            student_plane = student
            teacher_plane = teacher
            gradient_plane = gradient + image * gradient_b
            if STUDENT == CORNERS:
                gradient_plane = gradient + image * classes * patch_plane
                # gradients of cell row i go to rows i and i + 1 of the logits, `row` and the next
                # of this chunk's TI + 1 rows
                corner = (chunk * (TI + 1) + t) * gradient_width + (column - 1)
                corner = tl.max_contiguous(corner, [1, 1, 2, 4])
                written = own & (column > 0)
                from_above = row > chunk * TI
                again = row * 0 + sub > 0
            else:
                gradient_place, _, _, _ = on_label_grid(y, x, gradient_y, gradient_x)
            for c in range(classes):
                if PAIR or HETERO > 0 or CE or FEATURE:
                    z_s, student_a = read(
                        student_model,
                        student_plane,
                        scale,
                        valid,
                        STUDENT,
                        STUDENT_FOLDED,
                        CAREFUL,
                        FLOAT,
                    )
                if SOFT or CE:
                    student_e = tl.exp2(student_a)
                if TEACHER >= 0:
                    z_t, teacher_a = read(
                        teacher_model,
                        teacher_plane,
                        scale,
                        valid,
                        TEACHER,
                        TEACHER_FOLDED,
                        CAREFUL,
                        FLOAT,
                    )
                if PAIR:
                    teacher_e = tl.exp2(teacher_a)
                if HETERO_TERM and PROBS:
                    mixed = mixed_target(teacher_weight, teacher_e, student_weight, student_e)
                    mixed_log2 = fast_log2(max_or_nan(mixed, _SMALLEST_NORMAL), PTX)
                    late_sum += mixed * (mixed_log2 - student_a)
                is_label = label == c
                g_ce, g_kd, g_hetero, g_feature = one, one, one, one  # if not computed
                if CE and GRAD:
                    if HARD_POWER == 0:
                        h = tl.exp2(student_a * temperature)
                    else:
                        h = power(student_e, HARD_POWER)
                    g = ce_hard * cross_entropy_gradient_numerator(is_label, h, student_others)
                    if SMOOTHING:
                        w = 1.0
                        if WEIGHTED:
                            w = tl.load(class_weight + c).to(FLOAT)
                        g += ce_soft * (weight_sum * (h * hard_inverse) - w)
                    g_ce = g
                if KD > 0 and GRAD:
                    if KD == FORWARD:
                        other = teacher_e
                    else:
                        f = log_ratio(
                            student_a,
                            teacher_a,
                            js_teacher_weight,
                            js_student_weight,
                            KD == REVERSE,
                            PTX,
                        )
                        other = student_e * (f - pivot)
                    g = kd_student * student_e - kd_other * other
                    g_kd = g
                if HETERO_TERM:
                    if PROBS:
                        g = hetero_student * student_e - hetero_other * (teacher_weight * teacher_e)
                    elif KNOWLEDGE and MIX_TEACHER:
                        g = hetero_student * student_e - hetero_other * teacher_e
                    elif KNOWLEDGE:
                        a = mixed_target(r_t, teacher_a, r_s, student_a) - mixed_bound
                        g = hetero_student * student_e - hetero_other * tl.exp2(a)
                    elif HETERO == PAPER:
                        strength, z_h, _, _ = paper_class(z_s, z_t, is_label, MIX_TEACHER, PTX)
                        other = tl.exp2((z_h - mixed_bound) * scale)
                        if EVALUATION:
                            other *= tl.exp2((strength - weight_bound) * LOG2_E)
                        g = hetero_student * student_e - hetero_other * other
                    else:
                        strength, z_h, _, _ = paper_class(z_s, z_t, is_label, MIX_TEACHER, PTX)
                        a = z_h / temperature
                        b = z_s / temperature
                        w = one
                        if EVALUATION:
                            shift = tl.load(space_shift + image * classes + c)
                            inverse = tl.load(space_weight + image * classes + c)
                            w = tl.exp2((strength - shift) * LOG2_E) * inverse
                        late_sum += w * bernoulli_kl(a, b, PTX)
                        g = hetero_student * tl.where(
                            valid, w * bernoulli_kl_gradient(a, b, PTX), 0.0
                        )
                    g_hetero = g
                if FEATURE and GRAD:
                    g = feature_scale * (z_s - z_t)
                    g_feature = g
                if GRAD:
                    for slot in tl.static_range(1 if STUDENT == DIRECT else SLOTS):
                        merged = sum_of(
                            g_ce,
                            g_kd,
                            g_hetero,
                            g_feature,
                            CE and (STUDENT == DIRECT or SLOT_CE == slot),
                            KD > 0 and (STUDENT == DIRECT or SLOT_KD == slot),
                            HETERO_TERM and (STUDENT == DIRECT or SLOT_HETERO == slot),
                            FEATURE and (STUDENT == DIRECT or SLOT_FEATURE == slot),
                            STUDENT == CORNERS and TERMS > SLOTS,
                        )
                        if STUDENT == DIRECT:
                            tl.store(
                                gradient_plane + gradient_place,
                                merged.to(gradient.dtype.element_ty),
                                mask=inside,
                            )
                        else:
                            add_to_corners(
                                merged,
                                fy,
                                fx,
                                gradient_plane + slot * slot_stride + corner,
                                from_above,
                                from_left,
                                left_lane,
                                written,
                                gradient_width,
                                SUB_R * SUB_C == 1,
                                again,
                            )
                    gradient_plane += gradient_c if STUDENT == DIRECT else patch_plane
                student_plane += student_c
                if TEACHER >= 0:
                    teacher_plane += teacher_c
            if LATE:
                late_weight = hetero_other if PROBS else hetero_student
                late = tl.where(valid, late_weight * late_sum, 0.0)
                hetero_sum += over_pixels(late) * late_scale
            if GRAD and STUDENT == CORNERS:
                # the next step reads what this one wrote
                tl.debug_barrier()

    # --- sums ------------------------------------------------------------------------------------
    tl.store(partial + 0, over_program(tl.where(own, ce_sum, 0.0)))
    tl.store(partial + 1, over_program(tl.where(own, kd_sum, 0.0)))
    tl.store(partial + 2, over_program(tl.where(own, hetero_sum, 0.0)))
    tl.store(partial + 3, over_program(tl.where(own, feature_sum, 0.0)))
    tl.store(partial + 4, over_program(tl.where(own, weight_of_labels, 0.0)))
    tl.store(partial + 6, over_program(tl.where(own, hetero_weight, 0.0)))
    if not CAREFUL:
        tl.store(partial + 5, 0.0)
        tl.store(partial + 7, 0.0)
        tl.store(partial + VALID, over_program(tl.where(own, valid_count, 0)))
        tl.store(partial + BAD, over_program(tl.where(own, label_count - valid_count, 0)))
        found = tl.where(smallest > SMALLEST_TOTAL, 0.0, 1.0)
        tl.store(partial + FLAG, over_program(found))
