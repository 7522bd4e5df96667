"""The formulas that several terms (terms/) or kernels share, in the names and the order of
`reference.py` and `csrc/math`.

A pixel arrives as sums over its classes. For one model with logits z_c, a bound m of them (no
smaller than their maximum) and a temperature T,

    a_c = (z_c - m) log2(e) / T,   e_c = 2^a_c,   total = sum_c e_c,   softmax_T(z)_c = e_c / total.

`others` is the same sum without the labelled class. Base 2, because that is what the machine has.
Every argument is a tensor of pixels (any shape, float32 or float64) unless said otherwise.

`tl.exp2` is one instruction on NVIDIA (2 ulp). PTX: whether its other such instructions may be
named; elsewhere, and in float64, Triton's own operations stand in.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
RELIABILITY_EPS = tl.constexpr(1e-6)
BITS_MASK = tl.constexpr(0x5A5A5A5A5A5A5A5B)
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


# --- elementary --------------------------------------------------------------------------------


@triton.jit
def number(bits, FLOAT: tl.constexpr):
    """A float64 that came as its bits: arguments are float32, and a new value compiles nothing.
    (`bits_of` in launch.py keeps them from being a 32-bit integer, or one that is divisible.)"""
    bits = tl.cast(bits, tl.int64) ^ BITS_MASK
    return tl.cast(bits, tl.float64, bitcast=True).to(FLOAT)


@triton.jit
def max_or_nan(a, b):
    """The larger of two; NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x, 1 ulp; of 0 and denormals infinity."""
    if PTX and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def fast_log2(x, PTX: tl.constexpr):
    """log2 of x in (0, 1], 2^-22 off in absolute terms: for sums of m_c log2 m_c, whose rounding
    costs as much."""
    if PTX and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def log2_of_share(x, PTX: tl.constexpr):
    """`fast_log2` of x >= 0, finite at 0. A NaN comes through."""
    return fast_log2(max_or_nan(x, _SMALLEST_NORMAL), PTX)


@triton.jit
def split_exponent(x):
    """x = 2^n (1 + t) of normal float32 x > 0, 1 + t in [sqrt(1/2), sqrt(2)) -> n, t."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (n << 23)).to(tl.float32, bitcast=True)
    return n.to(tl.float32), mantissa - 1.0


@triton.jit
def log1p_near_zero(t):
    """ln(1 + t) for 1 + t in [sqrt(1/2), sqrt(2))."""
    p = t * -0.07634497433900833 + 0.1276157796382904
    p = p * t - 0.13160182535648346
    p = p * t + 0.14201757311820984
    p = p * t - 0.16623356938362122
    p = p * t + 0.20001226663589478
    p = p * t - 0.2500081956386566
    p = p * t + 0.3333333134651184
    square = t * t
    return t + (square * t * p - 0.5 * square)


@triton.jit
def log(x):
    """ln x for normal x > 0, 2 ulp; NaN gives NaN. Half the instructions of the library's, which
    takes denormals and signs too."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        n, t = split_exponent(x)
        # ln 2 in two parts: n * the first is exact; x - x is 0, or NaN
        y = n * 0.693359375 + (n * -2.12194440e-4 + log1p_near_zero(t)) + (x - x)
    return y


@triton.jit
def log2(x):
    """log2 x for normal x > 0, 1e-7 and an ulp; exact for powers of two. NaN gives NaN."""
    if x.dtype == tl.float64:
        y = tl.log2(x)
    else:
        n, t = split_exponent(x)
        y = log1p_near_zero(t) * LOG2_E + n + (x - x)
    return y


@triton.jit
def log1p_unit(x):
    """ln(1 + x) for x in [0, 1], to 3 ulp: relative precision where x is small."""
    if x.dtype == tl.float64:
        u = x + 1.0
        y = log(u) + (x - (u - 1.0)) / u
    else:
        p = x * -0.003242799313738942 + 0.0198456309735775
        p = p * x - 0.05694785714149475
        p = p * x + 0.10602375864982605
        p = p * x - 0.1530475914478302
        p = p * x + 0.19675610959529877
        p = p * x - 0.24954058229923248
        p = p * x + 0.33329951763153076
        p = p * x - 0.4999990165233612
        y = (p * x) * x + x
    return y


@triton.jit
def power(x, POWER: tl.constexpr):
    """x^POWER for POWER in {1, 2, 4}: the exponential at T = 1 from the one at T = POWER."""
    if POWER == 2:
        x = x * x
    elif POWER == 4:
        x = x * x
        x = x * x
    return x


# --- section 3: terms --------------------------------------------------------------------------


@triton.jit
def negative_log_likelihood(others, label_e, label_x, PTX: tl.constexpr):
    """-log softmax(z)_label = log(1 + others / e_label); label_x = z_label - m.

    The textbook log(total) - z_label loses the value's relative precision for a confident pixel,
    where others / e_label is small: there 1 + it is what is taken the logarithm of, and what that
    sum rounded away is given back, to first order. Where the label is unlikely, e_label may be 0,
    and the textbook form has nothing to lose.
    """
    ratio = others * reciprocal(label_e, PTX)
    confident = ratio < 1.0
    u = tl.where(confident, 1.0 + ratio, others + label_e)
    return log(u) + tl.where(confident, ratio - (u - 1.0), -label_x)


@triton.jit
def kl(weighted_difference, inverse_total_a, log2_total_a, log2_total_b):
    """KL(a || b), from sum_c e_a,c (a_a,c - a_b,c)."""
    return LN_2 * (weighted_difference * inverse_total_a - log2_total_a + log2_total_b)


@triton.constexpr_function
def small_exponent(dtype):
    return 1.0 / 64.0 if dtype == tl.float64 else 0.5


@triton.jit
def exponential_series(x):
    """(e^x - 1 - x) / x^2 to a rounding of itself, for |x| < small_exponent(x.dtype)."""
    series = x * (1.0 / 40320.0) + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    return series * x + 0.5


@triton.jit
def exponential_less_one(x):
    """e^x - 1 of x >= 0, in relative precision."""
    small = x * x * exponential_series(x) + x
    return tl.where(x < small_exponent(x.dtype), small, tl.exp2(x * LOG2_E) - 1.0)


@triton.jit
def root(x, PTX: tl.constexpr):
    """The root of x >= 0, exact to rounding: a step of Newton's from what logarithms give."""
    near = tl.exp2(0.5 * log2(max_or_nan(x, 1e-37)))
    return 0.5 * (near + x * reciprocal(near, PTX))


@triton.jit
def reverse_ratio(student_a, teacher_a):
    """Reverse KL: f_c. Bounded so that the difference of two is finite."""
    return -max_or_nan(-max_or_nan(student_a - teacher_a, -1e38), -1e38)


# --- section 4: reliability and mixed target ---------------------------------------------------


@triton.jit
def reliability(teacher_nll, student_nll, inverse_tau, PTX: tl.constexpr):
    """preset softmax-kl: softmax(-e_t / tau, -e_s / tau) -> (r_t, r_s), each side to full relative
    precision."""
    a = (student_nll - teacher_nll) * inverse_tau * LOG2_E
    x = tl.exp2(max_or_nan(-tl.abs(a), -1e30))
    larger = reciprocal(1.0 + x, PTX)
    smaller = x * larger
    student_is_better = a < 0.0
    return (
        tl.where(student_is_better, smaller, larger),
        tl.where(student_is_better, larger, smaller),
    )


@triton.jit
def mixed_target(teacher_weight, teacher, student_weight, student):
    """mix = probs: total_s m_c from e_c, with r_t total_s / total_t and r_s; mix = logits: a_h,c
    from a_c, with r. mix = teacher needs none of it: m is p_t, z_h is z_t, and r is for looking at
    only."""
    return teacher_weight * teacher + student_weight * student


@triton.jit
def softplus(x):
    return max_or_nan(x, 0.0) + log1p_unit(tl.exp2(tl.abs(x) * -LOG2_E))


@triton.jit
def binary_cross_entropy(z, is_label):
    """preset paper (Eq. 5): BCE(sigmoid(z), y) for y = 1 (the labelled class) or 0."""
    return softplus(tl.where(is_label, -z, z))


@triton.jit
def class_reliability(teacher_h, student_h, PTX: tl.constexpr):
    """preset paper (Eq. 6): r_t of one class; one half where both are perfect."""
    total = teacher_h + student_h + 2 * RELIABILITY_EPS
    return (student_h + RELIABILITY_EPS) * reciprocal(total, PTX)


# --- section 5: discrepancy and the term -------------------------------------------------------


@triton.jit
def class_discrepancy(student_h, mixed_h):
    """preset paper (Eq. 8): the positive reliability gap of one class."""
    return max_or_nan(student_h - mixed_h, 0.0)


@triton.jit
def sigmoid(z, PTX: tl.constexpr):
    x = tl.exp2(tl.abs(z) * -LOG2_E)
    larger = reciprocal(1.0 + x, PTX)
    return tl.where(z < 0.0, x * larger, larger)


@triton.jit
def bernoulli_kl(a, b, PTX: tl.constexpr):
    """weight_axis = space: KL(sigmoid(a) || sigmoid(b)) = p (log sigmoid(a) - log sigmoid(b)) +
    (1 - p) (the same of -a, -b) = p (a - b) + softplus(b) - softplus(a)."""
    return sigmoid(a, PTX) * (a - b) + (softplus(b) - softplus(a))


@triton.jit
def bernoulli_kl_gradient(a, b, PTX: tl.constexpr):
    """The derivative of `bernoulli_kl` by b."""
    return sigmoid(b, PTX) - sigmoid(a, PTX)
