"""The terms of a loss, one class each: what it computes, its denominator, its options.

    from heteroakd_fast import SegmentationLoss
    from heteroakd_fast.terms import KD, CrossEntropy, HeteroAKD
    loss_fn = SegmentationLoss(CrossEntropy(), KD(0.1), HeteroAKD(1.0, temperature=2.0))

Notation: z_s, z_t [C] are the logits of student and teacher at a pixel of the label grid, y its
label, V the pixels that a term counts, softmax_T(z) = softmax(z / T). V are the pixels whose label
is not `ignore_index` and, of the terms that need a label (the cross entropies, DKD and Focal), not
`unlabelled_index` either. With `pixel_weight` a pixel's share in a sum over V, |V| included, is
multiplied by its weight.

The fields of these classes are the only list of options: the operators' encoding (`spec.py`), the
keywords of `functional.distillation_loss` and `HeteroAKDLoss` (`FLAT`) and the driver's table are
derived from them. Adding a term: CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Final, TypedDict

from ._checks import check_choice, check_number, check_temperature, check_weight

__all__ = [
    "CWD",
    "DKD",
    "FLAT",
    "FLAT_DEFAULTS",
    "FLAT_TERMS",
    "FLAT_WEIGHTS",
    "KD",
    "OFA",
    "TERMS",
    "TERM_WEIGHTS",
    "WITHOUT_TEACHER",
    "CrossEntropy",
    "Dice",
    "Feature",
    "FlatOptions",
    "Focal",
    "HeteroAKD",
    "TeacherCrossEntropy",
    "Term",
    "Tversky",
    "from_flat",
]


def _check_fraction(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {number}, expected [0, 1]")
    return number


def _check_part(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 <= number <= 1e6:
        raise ValueError(f"{name}: got {number}, expected [0, 1e6]")
    return number


def _check_exponent(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.01 <= number <= 16.0:
        raise ValueError(f"{name}: got {number}, expected [0.01, 16]")
    return number


def _check_alpha(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 1e-6 <= number < 1.0:
        raise ValueError(
            f"{name}: got {number}, expected a number in [1e-6, 1); 0 is "
            f"{name.replace('alpha', 'divergence')}='forward'"
        )
    return number


def _check_factor(value: object, name: str) -> float:
    return 1.0 if value is None else _check_part(value, name)


def _check_gamma(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 <= number <= 16.0:
        raise ValueError(f"{name}: got {number}, expected [0, 16]")
    return number


def _check_beta(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 < number < 1.0:
        raise ValueError(
            f"{name}: got {number}, expected a number in (0, 1); the ends are "
            f"{name.replace('beta', 'divergence')}='forward' and 'reverse'"
        )
    return number


def _check_power(value: object, name: str) -> float:
    number = check_number(value, name)
    if not 0.01 <= number <= 100.0:
        raise ValueError(f"{name}: got {number}, expected [0.01, 100]")
    return number


def _check_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return value


def _flag(default: bool, flat: str | None = None) -> Any:
    """A field that is True or False; flat: as of `_number`."""
    metadata = {"check": _check_flag, "flat": flat, "choices": (False, True)}
    return field(default=default, metadata=metadata)


def _number(
    default: float | None,
    check: Callable[[object, str], float] = check_number,
    flat: str | None = None,
) -> Any:
    """A field that is a number; flat: its keyword in `FLAT`, its own name if None."""
    return field(default=default, metadata={"check": check, "flat": flat})


def _choice(default: str | None, choices: tuple[str, ...], flat: str | None = None) -> Any:
    """A field that is one of `choices`; None stands for what the others imply."""

    def check(value: object, name: str) -> object:
        if value is not None or default is not None:
            check_choice(value, name, choices)
        return value

    return field(default=default, metadata={"check": check, "flat": flat, "choices": choices})


@dataclass(frozen=True)
class Term:
    """A term of a loss; `weight`, >= 0, multiplies its mean, and 0 leaves it out.

    Raises:
        TypeError, ValueError: an option has the wrong type or value.
    """

    weight: float = _number(1.0, check_weight)

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs_label: ClassVar[bool] = False
    """whether pixels of the label `unlabelled_index` are left out of it"""
    shares_temperature: ClassVar[bool] = True
    """whether its temperature is that of its pass, whose terms have the exponentials in common"""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = option.metadata["check"](getattr(self, option.name), option.name)
            object.__setattr__(self, option.name, value)
        self._resolve()

    def _resolve(self) -> None:
        """Replaces what is None and checks what cannot be checked option by option."""

    def denominator(self, weighted: bool) -> str:
        """What the term is divided by; terms of one call with the same one share a gradient.

        weighted: whether the call has class weights.
        """
        return "valid"

    @property
    def over_space(self) -> bool:
        """Whether it divides by sums over whole images."""
        return False

    @property
    def over_classes(self) -> bool:
        """Whether it is a function of sums over all pixels of the call, a few for each class."""
        return False


@dataclass(frozen=True)
class CrossEntropy(Term):
    """`F.cross_entropy` of the student's logits: -log softmax(z_s)_y, with label smoothing.

    Denominator: |V|, or with class weights the sum of w_y over V, as in PyTorch.

    Args:
        weight: of the term in the loss.
        label_smoothing: in [0, 1].
    """

    label_smoothing: float = _number(0.0, _check_fraction)

    name: ClassVar[str] = "ce"
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def denominator(self, weighted: bool) -> str:
        return "class_weight" if weighted else "valid"


@dataclass(frozen=True)
class TeacherCrossEntropy(Term):
    """`CrossEntropy` of the teacher's logits: the only term that sends them a gradient.

    Denominator: as of `CrossEntropy`.

    Args:
        weight: of the term in the loss.
        label_smoothing: in [0, 1].
    """

    label_smoothing: float = _number(0.0, _check_fraction)

    name: ClassVar[str] = "teacher_ce"
    needs_label: ClassVar[bool] = True

    def denominator(self, weighted: bool) -> str:
        return "class_weight" if weighted else "valid"


@dataclass(frozen=True)
class KD(Term):
    """T^2 times a divergence of the softened distributions p = softmax_T(z) of both sides.

    "forward" is KL(p_t || p_s) (Hinton et al., 2015), "reverse" KL(p_s || p_t), "js" the
    generalised Jensen-Shannon divergence beta KL(p_t || m) + (1 - beta) KL(p_s || m) with
    m = beta p_t + (1 - beta) p_s, "skew" the skewed KL(p_t || alpha p_t + (1 - alpha) p_s)
    (DistiLLM, Ko et al., ICML 2024), which stays finite where the student has nothing of a class.
    Denominator: |V|.

    Args:
        weight: of the term in the loss.
        temperature: T, from 1e-4 to 1e4.
        divergence: "forward", "reverse", "js" or "skew".
        beta: in (0, 1), read by "js".
        alpha: the teacher's share of the mixture, in [1e-6, 1), read by "skew".
        standardize: True replaces the logits of both sides by (z - mean) / (1e-7 + deviation) over
            the classes, with C - 1 in the deviation (Logit Standardization, Sun et al., CVPR 2024),
            and the gradient goes through both moments; of "forward" only. They take T 2 and a
            weight of 9 times the cross entropy's.
    """

    temperature: float = _number(1.0, check_temperature)
    divergence: str = _choice("forward", ("forward", "reverse", "js", "skew"), "kd_divergence")
    beta: float = _number(0.5, _check_beta, "kd_beta")
    alpha: float = _number(0.1, _check_alpha, "kd_alpha")
    standardize: bool = _flag(False, "kd_standardize")

    name: ClassVar[str] = "kd"

    def _resolve(self) -> None:
        if self.standardize and self.divergence != "forward":
            raise ValueError(
                f"standardize: got True with divergence={self.divergence!r}, standardised logits "
                "have divergence='forward' only"
            )


@dataclass(frozen=True)
class HeteroAKD(Term):
    """Mixed-target distillation, weighted by what the teacher knows better (docs/method.md).

    Preset "softmax-kl": the mixed target m = r_t softmax_T(z_t) + r_s softmax_T(z_s), reliabilities
    r from both cross entropies at tau, and d T^2 KL(m || softmax_T(z_s)) with the discrepancy
    d = KL(softmax_T(z_t) || softmax_T(z_s)). Denominator: the sum of d over V, |V| without
    evaluation. Preset "paper" (Eq. 5 to 10): class weights W times the soft cross entropy of the
    mixed logits. Denominator: |V|; with weight_axis="space" images with a valid pixel times C.
    Source: HeteroAKD (Huang et al., AAAI 2025, arXiv 2504.07691), from public descriptions of it.

    Args:
        weight: of the term in the loss; its size depends on the preset, that of "paper" is about C
            times smaller.
        preset: "softmax-kl" or "paper" (as public reimplementations state the equations; no results
            of the paper are claimed for it).
        temperature: T, from 1e-4 to 1e4.
        tau: how sharply reliability follows the difference in cross entropy ("softmax-kl"), from
            1e-4 to 1e4.
        mix: "probs" (default of "softmax-kl"), "logits" (default of "paper", which has no
            "probs"), or "teacher": the target is the teacher's own knowledge, the ablation
            without knowledge mixing.
        evaluation: "discrepancy" (default) or "none" (every pixel and class counts alike, the
            ablation without knowledge evaluation).
        weight_axis: "class" (default) or "space" ("paper" only): axis of the weights' softmax.
    """

    preset: str = _choice("softmax-kl", ("softmax-kl", "paper"))
    temperature: float = _number(1.0, check_temperature)
    tau: float = _number(1.0, check_temperature)
    mix: str | None = _choice(None, ("probs", "logits", "teacher"))
    evaluation: str | None = _choice(None, ("discrepancy", "none"))
    weight_axis: str = _choice("class", ("class", "space"))

    name: ClassVar[str] = "hetero"

    def _resolve(self) -> None:
        if self.mix is None:
            object.__setattr__(self, "mix", "logits" if self.preset == "paper" else "probs")
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", "discrepancy")
        if self.preset == "paper" and self.mix == "probs":
            raise ValueError(
                f"mix: got {self.mix!r}, the preset 'paper' mixes logits (Eq. 7) or, with "
                "mix='teacher', nothing; leave mix=None or use preset='softmax-kl'"
            )
        if self.preset != "paper" and self.weight_axis != "class":
            raise ValueError(
                f"weight_axis: got {self.weight_axis!r}, only preset='paper' has class weights"
            )

    @property
    def over_space(self) -> bool:
        return self.weight_axis == "space" and self.evaluation == "discrepancy"

    def denominator(self, weighted: bool) -> str:
        if self.evaluation == "none" or (self.preset == "paper" and self.weight_axis == "class"):
            return "valid"
        return "images" if self.preset == "paper" else "discrepancy"


@dataclass(frozen=True)
class Feature(Term):
    """Mean over classes of (z_s - z_t)^2, in the aligned logits space. Denominator: |V|.

    Args:
        weight: of the term in the loss.
    """

    name: ClassVar[str] = "feature"


@dataclass(frozen=True)
class CWD(Term):
    """T^2 KL(softmax of z_t / T || softmax of z_s / T) over the pixels of an image, for each class:
    where in the image a class lies, rather than which class a pixel has.

    The softmaxes are over the valid pixels.

    Denominator: images with a valid pixel times C. Source: Channel-wise Knowledge Distillation for
    Dense Prediction (Shu et al., ICCV 2021), Eq. 4. Published weights beside the cross entropy: 3
    with T = 4; 5 (Cityscapes) and 10 (ADE20K) with T = 1.

    Args:
        weight: of the term in the loss.
        temperature: T, from 1e-4 to 1e4. mmrazor calls it tau.
    """

    temperature: float = _number(4.0, check_temperature)

    name: ClassVar[str] = "cwd"
    shares_temperature: ClassVar[bool] = False

    def denominator(self, weighted: bool) -> str:
        return "images"

    @property
    def over_space(self) -> bool:
        return True


@dataclass(frozen=True)
class DKD(Term):
    """T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)): label against rest, and the rest alone.

    b is the pair (p_y, 1 - p_y) of p = softmax_T(z), q the softmax_T over the classes that are not
    the label's. Denominator: |V|. Source: Decoupled Knowledge Distillation (Zhao et al., CVPR
    2022), Eq. 7. Published for CIFAR-100: alpha 1, beta 8, T 4.

    Args:
        weight: of the term in the loss.
        alpha: weight of the first divergence, from 0 to 1e6.
        beta: weight of the second, from 0 to 1e6.
        temperature: T, from 1e-4 to 1e4.
    """

    alpha: float = _number(1.0, _check_part)
    beta: float = _number(8.0, _check_part)
    temperature: float = _number(4.0, check_temperature)

    name: ClassVar[str] = "dkd"
    needs_label: ClassVar[bool] = True


@dataclass(frozen=True)
class Focal(Term):
    """alpha (1 - p_y)^gamma (-log p_y) with p = softmax(z_s): `CrossEntropy` less its easy pixels,
    and with gamma 0 and alpha 1 the cross entropy itself, its class weights included.

    Denominator: |V|, or with class weights the sum of w_y over V. Source: Focal Loss for Dense
    Object Detection (Lin et al., ICCV 2017), Eq. 4, of a softmax in the place of their sigmoid.
    The losses of that name in segmentation_models_pytorch (mode "multiclass") and mmsegmentation
    are others: C binary ones of sigmoid(z_c), summed over the classes in the one and averaged in
    the other; weights tuned for those do not carry over.

    Args:
        weight: of the term in the loss.
        gamma: from 0 to 16.
        alpha: a factor, from 0 to 1e6; None (default) is 1.
    """

    gamma: float = _number(2.0, _check_gamma)
    alpha: float | None = _number(None, _check_factor)

    name: ClassVar[str] = "focal"
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def denominator(self, weighted: bool) -> str:
        return "class_weight" if weighted else "valid"


@dataclass(frozen=True)
class OFA(Term):
    """-sum_c ((p_t,c + [c = y])^eps - [c = y]) log p_s,c with p = softmax_T(z): the soft cross
    entropy, which for eps > 1 asks more of the label than the teacher gives it, and less of the
    other classes. eps 1 is KL(p_t || p_s) plus the entropy of p_t.

    There is no factor T^2. A pixel without a label has no [c = y]: its target is p_t^eps.
    Denominator: |V|. Source: One-for-All (Hao et al., NeurIPS 2023), as their code has it
    (`ofa_loss`); published with T 1 and eps from 1 to 1.5.

    Args:
        weight: of the term in the loss.
        eps: the exponent, from 0.01 to 16.
        temperature: T, from 1e-4 to 1e4.
    """

    eps: float = _number(1.0, _check_exponent)
    temperature: float = _number(1.0, check_temperature)

    name: ClassVar[str] = "ofa"


@dataclass(frozen=True)
class Dice(Term):
    """1 - (TP + smooth) / (TP + (FP + FN) / 2 + smooth) of each class, soft.

    With p = softmax(z_s), TP_c is the sum of p_c and FN_c that of 1 - p_c over the pixels of class
    c, FP_c that of p_c over those of other classes; over all labelled pixels of the call (of all
    images; each rank and micro-batch has its own). A class without a labelled pixel counts 0.

    Denominator: C, so that the mean is over all classes. Source: V-Net (Milletari et al., 3DV
    2016); the values are those of `DiceLoss("multiclass")` of segmentation_models_pytorch on valid
    pixels, its `eps` of 1e-7 included.

    Args:
        weight: of the term in the loss.
        smooth: added to both sides of the fraction, from 0 to 1e6; half of what it is in formulas
            with 2 TP.
        log: -log of the fraction instead of 1 - the fraction.
    """

    smooth: float = _number(0.0, _check_part)
    log: bool = _flag(False)

    name: ClassVar[str] = "dice"
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def denominator(self, weighted: bool) -> str:
        return "classes"

    @property
    def over_classes(self) -> bool:
        return True


@dataclass(frozen=True)
class Tversky(Term):
    """(mean over classes of 1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth))^gamma, with TP,
    FP and FN as of `Dice`, which alpha = beta = 0.5 and gamma = 1 are.

    Denominator: C, as of `Dice`. Source: Tversky loss (Salehi et al., 2017), with the exponent of
    the focal one; the values are those of `TverskyLoss("multiclass")` of
    segmentation_models_pytorch on valid pixels.

    Args:
        weight: of the term in the loss.
        alpha: weight of false positives, from 0 to 1e6.
        beta: weight of false negatives, from 0 to 1e6.
        gamma: exponent of the mean, from 0.01 to 100; where the mean is 0 the gradient is 0.
        smooth: added to both sides of the fraction, from 0 to 1e6.
    """

    alpha: float = _number(0.5, _check_part)
    beta: float = _number(0.5, _check_part)
    gamma: float = _number(1.0, _check_power)
    smooth: float = _number(0.0, _check_part)

    name: ClassVar[str] = "tversky"
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def denominator(self, weighted: bool) -> str:
        return "classes"

    @property
    def over_classes(self) -> bool:
        return True


#: Every term, in the order in which the operators number them.
TERMS: Final[tuple[type[Term], ...]] = (
    CrossEntropy,
    TeacherCrossEntropy,
    KD,
    HeteroAKD,
    Feature,
    CWD,
    DKD,
    Focal,
    OFA,
    Dice,
    Tversky,
)


#: Names of those that read no teacher's logits.
WITHOUT_TEACHER: Final = frozenset(term.name for term in TERMS if not term.needs_teacher)


class FlatOptions(TypedDict, total=False):
    """The options of all terms as keywords of one call: `functional.distillation_loss`,
    `HeteroAKDLoss`. Their meaning, range and default: the field of the term."""

    ce_weight: float
    teacher_ce_weight: float
    kd_weight: float
    hetero_weight: float
    feature_weight: float
    label_smoothing: float
    temperature: float
    kd_divergence: str
    kd_beta: float
    kd_alpha: float
    kd_standardize: bool
    preset: str
    tau: float
    mix: str | None
    evaluation: str | None
    weight_axis: str


def flat_name(term: type[Term], option: Field[Any]) -> str:
    """The keyword that an option of a term has beside those of all other terms."""
    if option.name == "weight":
        return f"{term.name}_weight"
    return option.metadata["flat"] or option.name


#: The terms that have keywords; others are given as objects.
FLAT_TERMS: Final = (CrossEntropy, TeacherCrossEntropy, KD, HeteroAKD, Feature)

#: Keywords of `FlatOptions`, each with the terms' fields that it sets.
FLAT: Final[Mapping[str, tuple[tuple[type[Term], Field[Any]], ...]]] = {
    name: tuple(
        (term, option)
        for term in FLAT_TERMS
        for option in fields(term)
        if flat_name(term, option) == name
    )
    for name in FlatOptions.__annotations__
}


#: Of `FlatOptions`; of all weights but the cross entropy's 0.
FLAT_DEFAULTS: Final[Mapping[str, Any]] = {
    name: 0.0 if name.endswith("_weight") and name != "ce_weight" else options[0][1].default
    for name, options in FLAT.items()
}


#: How a caller calls the weight of each term, by its name: in a loss that is given terms,
#: and as a keyword of `FlatOptions`.
TERM_WEIGHTS: Final[Mapping[str, str]] = {
    term.name: f"the weight of {term.__name__}" for term in TERMS
}
FLAT_WEIGHTS: Final[Mapping[str, str]] = {term.name: f"{term.name}_weight" for term in TERMS}


def check_flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are kept, each checked on its own.

    Raises:
        TypeError, ValueError: names the keyword.
    """
    return {
        name: FLAT[name][0][1].metadata["check"](value, name) for name, value in options.items()
    }


def from_flat(options: Mapping[str, Any]) -> tuple[Term, ...]:
    """Every term that has keywords, those of weight 0 too, with its options."""
    return tuple(
        term(**{option.name: options[flat_name(term, option)] for option in fields(term)})
        for term in FLAT_TERMS
    )
