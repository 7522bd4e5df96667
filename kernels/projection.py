"""1x1 projection and loss in one kernel, at the features' resolution: Z never reaches memory.

    projected_pass     z = W f + b of P pixels and all C classes, a tile of products in registers;
                       then the terms of docs/method.md, 3 to 5, on that tile. Forward: sums.
                       Backward, with the terms' scales known: the same again, and g = dL/dz.
    features_gradient  dL/df = W^T g
    weight_gradient    dL/dW = sum over pixels of g f^T, and dL/db = the sum of g: partial sums, and
    add_splits         their sum in one order. The cut depends on shapes only; nothing is atomic.

Terms: ce, teacher_ce, kd (forward), feature, and hetero in its preset `softmax-kl`; their formulas
are those of `formulas.py`.

A tile has CP columns, the next power of two from C on, at least 16. Columns that are no class have
the logit `ABSENT` below the maximum: e is 0 and differences of two of them are 0, nothing is NaN.
Ignored pixels may hold anything: a pixel has a row of its own in every product but that of
`weight_gradient`, which reads their features as 0.

Products: two factors of 16 bits are multiplied as they are, with a float32 sum, which is exact up
to the sum. A factor of 16 bits beside one of float32 (g always is) is exact in tf32, so that on
NVIDIA three passes of the tensor cores (`tf32x3`) are as good as float32 there. `precision` decides
about the rest: "ieee" multiplies float32 in float32, off the tensor cores.

Cost per pixel, with e bytes per feature, F_s = e D_s, F_t = e D_t, and C classes (of CP columns in
flops). Bytes here:

    forward              F_s + F_t
    backward, g          F_s + F_t + 4 C     (teacher_ce: its own 4 C too)
    dL/df                4 C + F_s
    dL/dW                4 C + F_s           in all 4 F_s + 2 F_t + 12 C

with Z written (float32) and a fused loss reading it twice, once per direction:

    Z_s, Z_t             F_s + F_t + 8 C
    loss, forward        8 C
    loss, backward       12 C
    dL/df, dL/dW         2 F_s + 8 C         in all 3 F_s + F_t + 36 C

So fusing saves 24 C bytes and pays e (D_s + D_t) for reading the features again. Even are, for
D_s = D_t = 256: C = 43 in 16 bits, 85 in float32. C = 150, D = 256, 16 bits: 4.9 against 7.4 kB per
pixel, a third less; C = 19: 3.3 kB against 2.7, a fifth more; small C and large D lose, whatever
else. A projection that first copies 16-bit features to float32 (`projector.py`) adds at least
8 (D_s + D_t) to the other side, and then fusing wins for every C. What fusing always saves is
memory: no Z (8 C per pixel) and no copy (4 D) live from forward to backward, only g in backward.

Flops: 2 CP (D_s + D_t) in forward and again in backward; for each gradient 2 C D_s, with C rounded
up to 32 (features) or 64 (weight). C = 150 pays for 256 columns. W is read once per program, from
the second cache: e C (D_s + D_t) / P bytes per pixel. Of many classes fewer pixels fit in a program
(P = 32 for 256 columns of 16 bits), and that is then several times what comes from memory: C = 150
gains less than the bytes above say. Nothing here has been timed.
"""

import triton
import triton.language as tl

from . import terms
from .formulas import (
    LN_2,
    LOG2_E,
    kl,
    log,
    log2,
    log2_of_share,
    max_or_nan,
    mixed_target,
    negative_log_likelihood,
    number,
    power,
    reciprocal,
    reliability,
)
from .partials import BAD, ROW, SHARES, VALID
from .tiles import checked_labels

# What z - max is in columns that are no class. Times log2(e) / T it stays in float32's range.
ABSENT = tl.constexpr(-1e30)


# --- products ----------------------------------------------------------------------------------


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a b. WIDEN: Triton's interpreter has no arithmetic for bfloat16."""
    if WIDEN or a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def pixel_offsets(pixel, width, stride_y, stride_x, FLAT: tl.constexpr):
    """FLAT: rows follow each other without a gap."""
    if FLAT:
        offset = pixel * stride_x
    else:
        offset = (pixel // width) * stride_y + (pixel % width) * stride_x
    return offset


@triton.jit
def labels_of(
    target, pixel, inside, width, stride_y, stride_x, classes, ignore_index, FLAT: tl.constexpr
):
    """`checked_labels` [P]."""
    place = pixel_offsets(pixel, width, stride_y, stride_x, FLAT)
    raw = tl.load(target + place, mask=inside, other=0).to(tl.int64)
    return checked_labels(raw, inside, classes, ignore_index)


@triton.jit
def projected(
    features,  # pointers [P] to the pixels' first feature
    stride_d,
    depth,
    weight,  # [C, D], dense
    bias,  # [C] float32, read if BIAS
    inside,
    c,
    is_class,
    BIAS: tl.constexpr,
    P: tl.constexpr,
    CP: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """z [P, CP]; nothing of worth in columns that are no class."""
    z = tl.zeros([P, CP], tl.float32)
    row = tl.cast(c, tl.int64) * depth
    for start in range(0, depth, BD):
        d = start + tl.arange(0, BD)
        exists = d < depth
        f = tl.load(
            features[:, None] + tl.cast(d, tl.int64)[None, :] * stride_d,
            mask=inside[:, None] & exists[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + row[None, :] + d[:, None],
            mask=is_class[None, :] & exists[:, None],
            other=0.0,
        )
        z = product(f, w, z, PRECISION, WIDEN)
    if BIAS:
        z += tl.load(bias + c, mask=is_class, other=0.0)[None, :]
    return z


# --- a tile of logits ----------------------------------------------------------------------------


@triton.jit
def centred(z, is_class):
    """z - its pixel's maximum, taken off where the subtraction is still exact; the maximum."""
    bound = tl.max(tl.where(is_class[None, :], z, float("-inf")), 1)
    return tl.where(is_class[None, :], z - bound[:, None], ABSENT), bound


@triton.jit
def at_temperature_one(x, scale, POWER: tl.constexpr):
    """e of the labels' temperature; where that is a power of the other one, without exponential."""
    if POWER == 0:
        h = tl.exp2(x * LOG2_E)
    else:
        h = power(tl.exp2(x * scale), POWER)
    return h


@triton.jit
def label_sums(h, x, is_label, PTX: tl.constexpr):
    """Of e at T = 1: the sum without the label, the whole sum; and the negative log likelihood."""
    others = tl.sum(tl.where(is_label, 0.0, h), 1)
    label_x = tl.sum(tl.where(is_label, x, 0.0), 1)
    e = tl.exp2(max_or_nan(label_x, -1e30) * LOG2_E)
    nll = negative_log_likelihood(others, e, label_x, PTX)
    return others, others + e, nll


@triton.jit
def cross_entropy_sum(
    x, nll, total, valid, label_weight, w, smoothing, class_count, SMOOTHING: tl.constexpr
):
    """The sum over pixels, float64."""
    value = (1.0 - smoothing) * label_weight * nll
    if SMOOTHING:
        behind = tl.sum(w, 0) * log(total) - tl.sum(w[None, :] * x, 1)
        value += smoothing / class_count * behind
    return over_pixels(value, valid)


@triton.jit
def softmax(x, scale, log2_total):
    """2^(x scale) / total. Again from x where a gradient is made, because an e that was kept since
    the sums would take a tile of registers; `label_sums` and this share no exponential."""
    return tl.exp2(x * scale - log2_total[:, None])


@triton.jit
def cross_entropy_gradient(
    x,
    is_label,
    others,
    total,
    label_weight,
    w,
    scale,
    smoothing,
    class_count,
    PTX: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    p = softmax(x, LOG2_E, log2(total))
    hard = scale * (1.0 - smoothing) * label_weight
    # p - 1 of a confident pixel keeps its relative precision in the sum of the others
    g = hard[:, None] * tl.where(is_label, -(others * reciprocal(total, PTX))[:, None], p)
    if SMOOTHING:
        g += scale * (smoothing / class_count) * (tl.sum(w, 0) * p - w[None, :])
    return g


@triton.jit
def over_pixels(value, valid):
    """The sum over the program's valid pixels: `where`, so that an ignored NaN stays out."""
    return tl.sum(tl.where(valid, value.to(tl.float64), 0.0), 0)


@triton.jit
def scale_of(scales, SLOT: tl.constexpr):
    """What the gradient of a term's numerator is multiplied with; SLOT < 0: no such term."""
    scale = 0.0
    if SLOT >= 0:
        scale = tl.load(scales + SLOT).to(tl.float32)
    return scale


@triton.jit
def write_gradient(gradient, g, valid, inside, image, pixels, pixel, c, classes, GC: tl.constexpr):
    """Rows of GC columns, all written; 0 where no class or no valid pixel is."""
    g = tl.where(valid[:, None] & (c < classes)[None, :], g, 0.0)
    place = gradient + (image * pixels + pixel)[:, None] * GC + c[None, :]
    tl.store(place, g, mask=inside[:, None] & (c < GC)[None, :])


@triton.jit(
    do_not_specialize=[
        "classes",
        "tiles",
        "width",
        "target_b",
        "target_y",
        "target_x",
        "ignore_index",
        "temperature_bits",
        "tau_bits",
        "smoothing_bits",
        "teacher_smoothing_bits",
    ]
)
def projected_pass(
    student,  # [B, D_s, h, w] features, any strides; read if STUDENT
    student_weight,  # [C, D_s], dense
    student_bias,  # [C] float32
    teacher,  # [B, D_t, h, w]; read if TEACHER
    teacher_weight,
    teacher_bias,
    target,  # [B, h, w] labels
    class_weight,  # [C] float32, read if WEIGHTED
    scales,  # float64: of the terms, read if GRAD
    student_gradient,  # [B, h w, GC] float32 out, written if GRAD and STUDENT
    teacher_gradient,  # the same of teacher_ce
    partials,  # [2, programs, ROW] float64 out if not GRAD: the second for teacher_ce
    classes,
    pixels,  # h w
    tiles,  # of an image
    width,
    student_depth,
    teacher_depth,
    student_b,
    student_d,
    student_y,
    student_x,
    teacher_b,
    teacher_d,
    teacher_y,
    teacher_x,
    target_b,
    target_y,
    target_x,
    ignore_index,
    temperature_bits,
    tau_bits,
    smoothing_bits,
    teacher_smoothing_bits,  # of teacher_ce
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_FLAT: tl.constexpr,
    TEACHER_FLAT: tl.constexpr,
    LABELS_FLAT: tl.constexpr,
    CE: tl.constexpr,  # the place of the term, -1 without; so are the next four
    TEACHER_CE: tl.constexpr,
    KD: tl.constexpr,
    HETERO: tl.constexpr,
    FEATURE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIX_LOGITS: tl.constexpr,
    MIX_TEACHER: tl.constexpr,
    EVALUATION: tl.constexpr,
    POWER: tl.constexpr,  # e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
    GRAD: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    P: tl.constexpr,
    CP: tl.constexpr,
    GC: tl.constexpr,
    BD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    pixel = (program % tiles) * P + tl.arange(0, P)
    inside = pixel < pixels
    c = tl.arange(0, CP)
    is_class = c < classes
    temperature = number(temperature_bits, tl.float32)
    inverse_tau = 1.0 / number(tau_bits, tl.float32)
    smoothing = number(smoothing_bits, tl.float32)
    teacher_smoothing = number(teacher_smoothing_bits, tl.float32)
    scale = LOG2_E / temperature
    class_count = tl.cast(classes, tl.float32)

    # --- projection ----------------------------------------------------------------------------
    if STUDENT:
        place = pixel_offsets(pixel, width, student_y, student_x, STUDENT_FLAT)
        student_z = projected(
            student + image * student_b + place,
            student_d,
            student_depth,
            student_weight,
            student_bias,
            inside,
            c,
            is_class,
            STUDENT_BIAS,
            P,
            CP,
            BD,
            STUDENT_PRECISION,
            WIDEN,
        )
    if TEACHER:
        place = pixel_offsets(pixel, width, teacher_y, teacher_x, TEACHER_FLAT)
        teacher_z = projected(
            teacher + image * teacher_b + place,
            teacher_d,
            teacher_depth,
            teacher_weight,
            teacher_bias,
            inside,
            c,
            is_class,
            TEACHER_BIAS,
            P,
            CP,
            BD,
            TEACHER_PRECISION,
            WIDEN,
        )

    # --- labels --------------------------------------------------------------------------------
    label, counts = labels_of(
        target + image * target_b,
        pixel,
        inside,
        width,
        target_y,
        target_x,
        classes,
        ignore_index,
        LABELS_FLAT,
    )
    valid = label >= 0
    is_label = label[:, None] == c[None, :]
    w = tl.where(is_class, 1.0, 0.0)
    label_weight = tl.where(valid, 1.0, 0.0)
    if WEIGHTED:
        w = tl.load(class_weight + c, mask=is_class, other=0.0)
        label_weight = tl.load(class_weight + tl.maximum(label, 0), mask=valid, other=0.0)
    nothing = tl.sum(tl.zeros([P], tl.float64), 0)
    ce_sum = nothing
    teacher_ce_sum = nothing
    kd_sum = nothing
    hetero_sum = nothing
    hetero_weight = nothing
    feature_sum = nothing
    if STUDENT:
        student_x, student_bound = centred(student_z, is_class)
    if TEACHER:
        teacher_x, teacher_bound = centred(teacher_z, is_class)

    # --- likelihoods and softened distributions --------------------------------------------------
    PAIR: tl.constexpr = KD >= 0 or HETERO >= 0
    if CE >= 0 or HETERO >= 0:
        e = at_temperature_one(student_x, scale, POWER)
        student_others, student_hard, student_nll = label_sums(e, student_x, is_label, PTX)
    if TEACHER_CE >= 0 or HETERO >= 0:
        e = at_temperature_one(teacher_x, scale, POWER)
        teacher_others, teacher_hard, teacher_nll = label_sums(e, teacher_x, is_label, PTX)
    if PAIR:
        student_log2 = log2(tl.sum(tl.exp2(student_x * scale), 1))
        e = tl.exp2(teacher_x * scale)
        teacher_total = tl.sum(e, 1)
        teacher_log2 = log2(teacher_total)
        kl_teacher_student = kl(
            tl.sum(e * ((teacher_x - student_x) * scale), 1),
            reciprocal(teacher_total, PTX),
            teacher_log2,
            student_log2,
        )

    # --- reliability, discrepancy ----------------------------------------------------------------
    if HETERO >= 0:
        r_t, r_s = reliability(teacher_nll, student_nll, inverse_tau, PTX)
        weight = tl.where(valid, 1.0, 0.0)
        if EVALUATION:
            weight = max_or_nan(kl_teacher_student, 0.0)
        if MIX_LOGITS:
            mixed_a = mixed_target(r_t[:, None], teacher_x * scale, r_s[:, None], student_x * scale)
            mixed_bound = tl.max(mixed_a, 1)
            mixed_a -= mixed_bound[:, None]
            mixed = tl.exp2(mixed_a)
            mixed_total = tl.sum(mixed, 1)

    # --- values ----------------------------------------------------------------------------------
    if not GRAD:
        if CE >= 0:
            ce_sum = cross_entropy_sum(
                student_x,
                student_nll,
                student_hard,
                valid,
                label_weight,
                w,
                smoothing,
                class_count,
                SMOOTHING,
            )
        if TEACHER_CE >= 0:
            teacher_ce_sum = cross_entropy_sum(
                teacher_x,
                teacher_nll,
                teacher_hard,
                valid,
                label_weight,
                w,
                teacher_smoothing,
                class_count,
                SMOOTHING,
            )
        if KD >= 0:
            kd_sum = over_pixels(temperature * temperature * kl_teacher_student, valid)
        if FEATURE >= 0:
            difference = (student_x - teacher_x) + (student_bound - teacher_bound)[:, None]
            squares = tl.where(is_class[None, :], difference * difference, 0.0)
            feature_sum = over_pixels(tl.sum(squares, 1) / class_count, valid)
        if HETERO >= 0:
            if MIX_LOGITS:
                value = kl(
                    tl.sum(mixed * (mixed_a - student_x * scale), 1),
                    reciprocal(mixed_total, PTX),
                    log2(mixed_total),
                    student_log2,
                )
            elif MIX_TEACHER:
                value = kl_teacher_student
            else:
                # m times the student's total
                mixed = mixed_target(
                    r_t[:, None],
                    softmax(teacher_x, scale, teacher_log2 - student_log2),
                    r_s[:, None],
                    tl.exp2(student_x * scale),
                )
                cross = tl.sum(mixed * (log2_of_share(mixed, PTX) - student_x * scale), 1)
                value = LN_2 * cross * tl.exp2(-student_log2)
            hetero_sum = over_pixels(weight * (temperature * temperature) * value, valid)
            hetero_weight = over_pixels(weight, valid)

    # --- gradients -------------------------------------------------------------------------------
    if GRAD and TEACHER_CE >= 0:
        g = cross_entropy_gradient(
            teacher_x,
            is_label,
            teacher_others,
            teacher_hard,
            label_weight,
            w,
            scale_of(scales, TEACHER_CE),
            teacher_smoothing,
            class_count,
            PTX,
            SMOOTHING,
        )
        write_gradient(teacher_gradient, g, valid, inside, image, pixels, pixel, c, classes, GC)
    if GRAD and STUDENT:
        g = tl.zeros([P, CP], tl.float32)
        if CE >= 0:
            g += cross_entropy_gradient(
                student_x,
                is_label,
                student_others,
                student_hard,
                label_weight,
                w,
                scale_of(scales, CE),
                smoothing,
                class_count,
                PTX,
                SMOOTHING,
            )
        if PAIR:
            # of kd, and with it of hetero where m is one of probabilities or the teacher's
            push = tl.where(valid, scale_of(scales, KD) * temperature, 0.0)
            if HETERO >= 0:
                on_student = scale_of(scales, HETERO) * temperature * weight
                if MIX_LOGITS:
                    mixed_p = softmax(mixed_a, 1.0, log2(mixed_total))
                    p = softmax(student_x, scale, student_log2)
                    g += on_student[:, None] * (p - mixed_p)
                elif MIX_TEACHER:
                    push += on_student
                else:
                    push += on_student * r_t
            if KD >= 0 or not MIX_LOGITS:
                p = softmax(student_x, scale, student_log2)
                g += push[:, None] * (p - softmax(teacher_x, scale, teacher_log2))
        if FEATURE >= 0:
            difference = (student_x - teacher_x) + (student_bound - teacher_bound)[:, None]
            g += difference * (scale_of(scales, FEATURE) * 2.0 / class_count)
        write_gradient(student_gradient, g, valid, inside, image, pixels, pixel, c, classes, GC)

    # --- results -------------------------------------------------------------------------------
    if not GRAD:
        weight_of_labels = over_pixels(label_weight, valid)
        bad = tl.sum((counts & (label < 0)).to(tl.int32), 0)
        count = tl.sum(valid.to(tl.int32), 0)
        row = partials + program * ROW
        tl.store(row + terms.CE, ce_sum)
        tl.store(row + terms.KD, kd_sum)
        tl.store(row + terms.HETERO, hetero_sum)
        tl.store(row + terms.FEATURE, feature_sum)
        tl.store(row + SHARES + terms.CE, weight_of_labels)
        tl.store(row + SHARES + terms.HETERO, hetero_weight)
        tl.store(row + VALID, count)
        tl.store(row + BAD, bad)
        if TEACHER_CE >= 0:
            row += tl.num_programs(0).to(tl.int64) * ROW
            tl.store(row + terms.CE, teacher_ce_sum)
            tl.store(row + SHARES + terms.CE, weight_of_labels)
            tl.store(row + VALID, count)


# --- gradients of the projection -----------------------------------------------------------------
