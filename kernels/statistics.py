"""Loops over the classes that end in sums per pixel. Shapes: see `interpolation.py`.

A `model` is (plane, class_stride, taps, fractions, fold, m, exact_m, troubled): where class 0 lies,
the way to the next class, what `read_logits` takes, the bound, and for the careful pass the exact
maximum and the pixels that need it. Each loop reads the logits again instead of
keeping them: they are low-resolution and in the first cache, and registers are what limits this
kernel. What a call does not need is compiled away.
"""

import triton
import triton.language as tl

from .formulas import (
    LOG2_E,
    binary_cross_entropy,
    class_discrepancy,
    class_reliability,
    fast_log2,
    max_or_nan,
    mixed_target,
    power,
    reverse_ratio,
)
from .interpolation import CORNERS, exactly_scaled, read_logits

# A bound may lie so far above the maximum that totals are no smaller than this.
SMALLEST_TOTAL = tl.constexpr(2.0**-32)
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def read(
    model,
    plane,
    scale,
    valid,
    SOURCE: tl.constexpr,
    FOLDED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """z and a = (z - m) * scale of the class at `plane`; FOLDED: no z, unless CAREFUL."""
    _, _, taps, fractions, fold, m, exact_m, troubled = model
    if CAREFUL and SOURCE == CORNERS:
        # an ordinary pixel gets the bits that it has beside other neighbours
        z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, FOLDED, True, False, FLOAT
        )
        a = z if FOLDED else (z - m) * scale
        exact_z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, False, False, True, FLOAT
        )
        a = tl.where(troubled, exactly_scaled(exact_z, exact_m, scale, FLOAT), a)
        z = exact_z if FOLDED else tl.where(troubled, exact_z, z)
    else:
        z = read_logits(
            plane, taps, fractions, fold, scale, valid, SOURCE, FOLDED, False, CAREFUL, FLOAT
        )
        if FOLDED:
            a = z
        elif CAREFUL:
            a = exactly_scaled(z, exact_m, scale, FLOAT)
        else:
            a = (z - m) * scale
    return z, a


@triton.jit
def usual_totals(
    model,
    classes,
    valid,
    scale,
    temperature,
    SOURCE: tl.constexpr,
    FOLDED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The smaller of both temperatures' sums of e over the model's bound."""
    total = tl.zeros(valid.shape, FLOAT)
    hard = total
    plane = model[0]
    for _ in range(classes):
        _, a = read(model, plane, scale, valid, SOURCE, FOLDED, CAREFUL, FLOAT)
        total += tl.exp2(a)
        hard += tl.exp2(a * temperature)
        plane += model[1]
    return tl.minimum(total, hard)


@triton.jit
def one_model(
    student,
    classes,
    label,
    valid,
    scale,
    temperature,
    class_weight,
    STUDENT: tl.constexpr,
    STUDENT_FOLDED: tl.constexpr,
    HARD: tl.constexpr,
    PICK_LABEL: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POWER: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """total = sum e at T; others = sum without the label at T = 1; a of the label; weighted = sum
    w_c a_c and weight_sum = sum w_c (label smoothing)."""
    total = tl.zeros(label.shape, FLOAT)
    others = total
    label_a = total
    weighted = total
    weight_sum = tl.sum(tl.zeros([1], FLOAT))
    plane = student[0]
    for c in range(classes):
        _, a = read(student, plane, scale, valid, STUDENT, STUDENT_FOLDED, CAREFUL, FLOAT)
        e = tl.exp2(a)
        total += e
        if HARD:
            if POWER == 0:
                h = tl.exp2(a * temperature)
            else:
                h = power(e, POWER)
            is_label = label == c
            others += tl.where(is_label, 0.0, h)
            if PICK_LABEL:
                label_a = tl.where(is_label, a, label_a)
        if SMOOTHING:
            if WEIGHTED:
                w = tl.load(class_weight + c).to(FLOAT)
                weighted += w * a
                weight_sum += w
            else:
                weighted += a
                weight_sum += 1.0
        plane += student[1]
    return total, others, label_a, weighted, weight_sum


@triton.jit
def two_models(
    student,
    teacher,
    classes,
    label,
    valid,
    scale,
    temperature,
    class_weight,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT_FOLDED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    HARD: tl.constexpr,
    PICK_LABEL: tl.constexpr,
    PICK_TOP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POWER: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Both at once. HARD: whose sums at T = 1 are wanted: 0 none, 1 the student's, 2 both;
    PICK_LABEL: and the label's a with them.

    difference = sum e_t (a_t - a_s); PICK_TOP: both a of the class where the student's is largest.
    """
    student_total = tl.zeros(label.shape, FLOAT)
    teacher_total = student_total
    student_others = student_total
    teacher_others = student_total
    student_label = student_total
    teacher_label = student_total
    difference = student_total
    lowest = -1e300 if FLOAT == tl.float64 else -3e38
    student_top = student_total + lowest
    teacher_top = student_total
    weighted = student_total
    weight_sum = tl.sum(tl.zeros([1], FLOAT))
    student_plane = student[0]
    teacher_plane = teacher[0]
    for c in range(classes):
        _, student_a = read(
            student, student_plane, scale, valid, STUDENT, STUDENT_FOLDED, CAREFUL, FLOAT
        )
        _, teacher_a = read(
            teacher, teacher_plane, scale, valid, TEACHER, TEACHER_FOLDED, CAREFUL, FLOAT
        )
        student_e = tl.exp2(student_a)
        teacher_e = tl.exp2(teacher_a)
        student_total += student_e
        teacher_total += teacher_e
        difference += teacher_e * (teacher_a - student_a)
        if PICK_TOP:
            above = student_a > student_top
            student_top = tl.where(above, student_a, student_top)
            teacher_top = tl.where(above, teacher_a, teacher_top)
        if HARD > 0:
            is_label = label == c
            if POWER == 0:
                student_h = tl.exp2(student_a * temperature)
            else:
                student_h = power(student_e, POWER)
            student_others += tl.where(is_label, 0.0, student_h)
            if PICK_LABEL:
                student_label = tl.where(is_label, student_a, student_label)
            if HARD > 1:
                if POWER == 0:
                    teacher_h = tl.exp2(teacher_a * temperature)
                else:
                    teacher_h = power(teacher_e, POWER)
                teacher_others += tl.where(is_label, 0.0, teacher_h)
                if PICK_LABEL:
                    teacher_label = tl.where(is_label, teacher_a, teacher_label)
        if SMOOTHING:
            if WEIGHTED:
                w = tl.load(class_weight + c).to(FLOAT)
                weighted += w * student_a
                weight_sum += w
            else:
                weighted += student_a
                weight_sum += 1.0
        student_plane += student[1]
        teacher_plane += teacher[1]
    return (
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
    )


@triton.jit
def squared_difference(
    student,
    teacher,
    classes,
    valid,
    scale,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """sum_c (z_s,c - z_t,c)^2"""
    total = tl.zeros(valid.shape, FLOAT)
    student_plane = student[0]
    teacher_plane = teacher[0]
    for _ in range(classes):
        z_s, _ = read(student, student_plane, scale, valid, STUDENT, False, CAREFUL, FLOAT)
        z_t, _ = read(teacher, teacher_plane, scale, valid, TEACHER, False, CAREFUL, FLOAT)
        x = z_s - z_t
        total += x * x
        student_plane += student[1]
        teacher_plane += teacher[1]
    return total


@triton.jit
def mixed_logits(
    student,
    teacher,
    classes,
    valid,
    scale,
    r_t,
    r_s,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT_FOLDED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """mix = logits: of e_h = 2^(a_h - bound), a_h = r_t a_t + r_s a_s: bound, total, and
    sum_c e_h (a_h - bound - a_s). a_h <= 0, so 0 is a bound; if CAREFUL, the exact one where 0 is
    too far above."""
    bound = tl.zeros(valid.shape, FLOAT)
    if CAREFUL:
        total = bound
        exact = tl.where(valid, float("-inf"), float("-inf")).to(FLOAT)
        student_plane = student[0]
        teacher_plane = teacher[0]
        for _ in range(classes):
            _, student_a = read(
                student, student_plane, scale, valid, STUDENT, STUDENT_FOLDED, CAREFUL, FLOAT
            )
            _, teacher_a = read(
                teacher, teacher_plane, scale, valid, TEACHER, TEACHER_FOLDED, CAREFUL, FLOAT
            )
            a = mixed_target(r_t, teacher_a, r_s, student_a)
            total += tl.exp2(a)
            exact = max_or_nan(exact, a)
            student_plane += student[1]
            teacher_plane += teacher[1]
        bound = tl.where(total > SMALLEST_TOTAL, bound, exact)
    total = tl.zeros(valid.shape, FLOAT)
    difference = total
    student_plane = student[0]
    teacher_plane = teacher[0]
    for _ in range(classes):
        _, student_a = read(
            student, student_plane, scale, valid, STUDENT, STUDENT_FOLDED, CAREFUL, FLOAT
        )
        _, teacher_a = read(
            teacher, teacher_plane, scale, valid, TEACHER, TEACHER_FOLDED, CAREFUL, FLOAT
        )
        a = mixed_target(r_t, teacher_a, r_s, student_a) - bound
        e = tl.exp2(a)
        total += e
        difference += e * (a - student_a)
        student_plane += student[1]
        teacher_plane += teacher[1]
    return bound, total, difference


@triton.jit
def ratio_sums(
    student,
    teacher,
    classes,
    valid,
    scale,
    teacher_weight,
    student_weight,
    pivot,
    REVERSE: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT_FOLDED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    PTX: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """sum e_s (f_c - pivot), and of js sum e_t (a_t - log2 x_c)."""
    of_student = tl.zeros(valid.shape, FLOAT)
    of_teacher = of_student
    student_plane = student[0]
    teacher_plane = teacher[0]
    for _ in range(classes):
        _, student_a = read(
            student, student_plane, scale, valid, STUDENT, STUDENT_FOLDED, CAREFUL, FLOAT
        )
        _, teacher_a = read(
            teacher, teacher_plane, scale, valid, TEACHER, TEACHER_FOLDED, CAREFUL, FLOAT
        )
        f = log_ratio(student_a, teacher_a, teacher_weight, student_weight, REVERSE, PTX)
        of_student += tl.exp2(student_a) * (f - pivot)
        if not REVERSE:
            log2_x = js_log2(student_a, teacher_a, teacher_weight, student_weight, PTX)
            of_teacher += tl.exp2(teacher_a) * (teacher_a - log2_x)
        student_plane += student[1]
        teacher_plane += teacher[1]
    return of_student, of_teacher


@triton.jit
def js_log2(student_a, teacher_a, teacher_weight, student_weight, PTX: tl.constexpr):
    """js: log2 of x_c."""
    x = mixed_target(teacher_weight, tl.exp2(teacher_a), student_weight, tl.exp2(student_a))
    return fast_log2(max_or_nan(x, _SMALLEST_NORMAL), PTX)


@triton.jit
def log_ratio(
    student_a,
    teacher_a,
    teacher_weight,
    student_weight,
    REVERSE: tl.constexpr,
    PTX: tl.constexpr,
):
    """f_c of the reverse KL, or of js with its weights; see `formulas.py`."""
    if REVERSE:
        f = reverse_ratio(student_a, teacher_a)
    else:
        f = student_a - js_log2(student_a, teacher_a, teacher_weight, student_weight, PTX)
    return f


@triton.jit
def paper_class(z_s, z_t, is_label, MIX_TEACHER: tl.constexpr, PTX: tl.constexpr):
    """preset paper, one class: H_s + dH, z_h, r_t and dH. MIX_TEACHER: z_h is z_t, without a
    product by 0 that an infinite z_s would turn into NaN."""
    h_s = binary_cross_entropy(z_s, is_label)
    h_t = binary_cross_entropy(z_t, is_label)
    r_t = class_reliability(h_t, h_s, PTX)
    if MIX_TEACHER:
        z_h = z_t
    else:
        z_h = mixed_target(r_t, z_t, 1.0 - r_t, z_s)
    gap = class_discrepancy(h_s, binary_cross_entropy(z_h, is_label))
    return h_s + gap, z_h, r_t, gap


@triton.jit
def paper_sums(
    student,
    teacher,
    classes,
    label,
    valid,
    scale,
    MIX_TEACHER: tl.constexpr,
    EVALUATION: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    PTX: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """preset paper: with q_c = W_c m_c, without their denominators,

    r_t and dH of the label; bounds of H_s + dH and of z_h; the inverse of both denominators'
    product; sum q_c and sum q_c a_s,c. Running maxima: one loop instead of two, because what is
    expensive here is the knowledge of a class, not its two exponentials.
    """
    lowest = -1e300 if FLOAT == tl.float64 else -2e38
    reliable = tl.zeros(valid.shape, FLOAT)
    gap_of_label = reliable
    weight_total = reliable
    mixed_total = reliable
    q = reliable
    q_a = reliable
    weight_bound = reliable + lowest
    mixed_bound = weight_bound
    student_plane = student[0]
    teacher_plane = teacher[0]
    for c in range(classes):
        z_s, student_a = read(student, student_plane, scale, valid, STUDENT, False, CAREFUL, FLOAT)
        z_t, _ = read(teacher, teacher_plane, scale, valid, TEACHER, False, CAREFUL, FLOAT)
        is_label = label == c
        strength, z_h, r_t, gap = paper_class(z_s, z_t, is_label, MIX_TEACHER, PTX)
        reliable = tl.where(is_label, r_t, reliable)
        gap_of_label = tl.where(is_label, gap, gap_of_label)
        bound = max_or_nan(mixed_bound, z_h)
        shrink = tl.exp2((mixed_bound - bound) * scale)
        x = tl.exp2((z_h - bound) * scale)
        mixed_bound = bound
        mixed_total = mixed_total * shrink + x
        if EVALUATION:
            bound = max_or_nan(weight_bound, strength)
            weight_shrink = tl.exp2((weight_bound - bound) * LOG2_E)
            w = tl.exp2((strength - bound) * LOG2_E)
            weight_bound = bound
            weight_total = weight_total * weight_shrink + w
            shrink *= weight_shrink
            x *= w
        q = q * shrink + x
        q_a = q_a * shrink + x * student_a
        student_plane += student[1]
        teacher_plane += teacher[1]
    inverse = 1.0 / mixed_total
    if EVALUATION:
        inverse = inverse / weight_total
    return reliable, gap_of_label, weight_bound, mixed_bound, inverse, q, q_a


@triton.jit
def paper_at_label(
    student,
    teacher,
    classes,
    label,
    valid,
    MIX_TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    PTX: tl.constexpr,
    CAREFUL: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """preset paper, weight_axis = space: r_t and dH of the label, for the maps."""
    reliable = tl.zeros(valid.shape, FLOAT)
    gap_of_label = reliable
    student_plane = student[0]
    teacher_plane = teacher[0]
    for c in range(classes):
        z_s, _ = read(student, student_plane, 1.0, valid, STUDENT, False, CAREFUL, FLOAT)
        z_t, _ = read(teacher, teacher_plane, 1.0, valid, TEACHER, False, CAREFUL, FLOAT)
        is_label = label == c
        _, _, r_t, gap = paper_class(z_s, z_t, is_label, MIX_TEACHER, PTX)
        reliable = tl.where(is_label, r_t, reliable)
        gap_of_label = tl.where(is_label, gap, gap_of_label)
        student_plane += student[1]
        teacher_plane += teacher[1]
    return reliable, gap_of_label
