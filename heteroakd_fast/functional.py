"""Losses and evaluation as functions.

The formulas are in `docs/method.md`, what every call promises in `docs/contract.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._checks import check_temperature, refuse_unknown
from ._evaluate import DEFAULTS, LossOptions, Normalizer, Part, check_options, evaluate
from .evaluation import confusion_matrix, predict
from .output import DistillationOutput
from .projector import Projection
from .spec import Numbers, Shape, constant_while_tracing, numbers_of, shape_of, vector
from .terms import (
    CWD,
    FLAT,
    FLAT_DEFAULTS,
    FLAT_WEIGHTS,
    TERMS,
    FlatOptions,
    HeteroAKD,
    Term,
    check_flat,
    from_flat,
)

__all__ = [
    "DistillationOptions",
    "Normalizer",
    "channel_wise_distillation",
    "confusion_matrix",
    "cross_entropy",
    "distillation_loss",
    "predict",
    "segmentation_loss",
]


_RENAMED: Final = {"T": "temperature", "weight": "class_weight"}

#: What the keywords of `FlatOptions` are in a loss that is given terms.
OF_TERMS: Final = {
    "weight": "class_weight",
    **{
        name: f"{term.__name__}({option.name}=...), in `terms`,"
        for name, ((term, option), *_) in FLAT.items()
    },
}


class DistillationOptions(FlatOptions, LossOptions, total=False):
    """Keywords of `distillation_loss`: the options of every term, and those of every loss."""


def segmentation_loss(
    student_logits: Tensor | Projection,
    target: Tensor,
    teacher_logits: Tensor | Projection | None = None,
    *,
    terms: Sequence[Term],
    pixel_weight: Tensor | None = None,
    normalizer: Normalizer | None = None,
    return_maps: bool = False,
    diagnostics: bool = False,
    **options: Unpack[LossOptions],
) -> DistillationOutput:
    """Weighted sum of terms over the label grid, in as few passes as possible.

    Args:
        student_logits: [B, C, h, w], float32, bfloat16, float16 or float64, any strides, 1 <= C <=
            4096; or a `Projection` that makes them.
        target: [B, H, W], int64, int32 or uint8; values in [0, C), `ignore_index` or
            `unlabelled_index`.
        teacher_logits: [B, C, h', w'], same dtype choices, h', w' free, or a `Projection`; None
            when no term needs it. Only `TeacherCrossEntropy` sends a gradient to it, so without
            that term it must not require one.
        terms: of `heteroakd_fast.terms`; those of weight 0 are not computed.
        pixel_weight: [B, H, W], floating point, finite and >= 0, without gradient, or None for
            ones: multiplies the pixel's share in every term, numerator and denominator; a pixel of
            weight 0 is excluded as one of `ignore_index` is. In `CWD` and other terms over space it
            multiplies the pixel's share in the softmax.
        normalizer: a scalar that replaces the number of valid pixels wherever that is the
            denominator, or a mapping from terms' names to denominators, which is needed where
            there are two such numbers (`unlabelled_index`).
        return_maps: fills `DistillationOutput.maps`, with the options of the first `HeteroAKD`.
        diagnostics: fills `DistillationOutput.diagnostics` in the same pass, which then takes the
            exact way over the classes and writes a few numbers of each pixel: for a step in a
            hundred.
        class_weight: [C] floating point, >= 0, of the cross entropies and `Focal`, or None
            (default) for ones.
        ignore_index: label of the pixels that are excluded from every term; any integer outside
            [0, C), 255 by default, or None if no pixel is ignored.
        unlabelled_index: label of the pixels that only the teacher labels, an integer outside
            [0, C) such as 254, or None (default): the terms that need a label (`CrossEntropy`,
            `TeacherCrossEntropy`, `DKD`, `Focal`) leave them out, all others count them, and
            `HeteroAKD` takes the teacher as reliable there (r_t = 1).
        allow_ignored_class: True lets `ignore_index` be one of the classes: its pixels are then
            excluded, and the class has no loss of its own.
        align_corners: as in `torch.nn.functional.interpolate`; False by default.
        resolution: "label" (default) upsamples the logits to the labels; "logits" takes the labels
            by nearest neighbour on the student's grid.
        process_group: averages the denominators over this `torch.distributed` group, so that
            gradients averaged over its ranks are those of the whole batch. A `normalizer` is
            taken as it is.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None (default) leaves the choice to
            `use_backend`, the environment, and the device.

    Returns:
        `DistillationOutput`; `loss` is the weighted sum.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    refuse_unknown(options.keys() - DEFAULTS.keys(), tuple(DEFAULTS), OF_TERMS)
    checked = check_terms(terms)
    shape, numbers = encode(with_maps(checked) if return_maps else checked)
    part = Part(shape, numbers, student_logits, teacher_logits)
    found = check_options(options)
    return evaluate([part], target, found, normalizer, return_maps, pixel_weight, diagnostics)


#: mmrazor and others.
CWD_RENAMED: Final = {"tau": "temperature", "T": "temperature"}
CWD_OPTIONS: Final = tuple(name for name in DEFAULTS if name != "class_weight")


def channel_wise_distillation(
    student_logits: Tensor | Projection,
    target: Tensor,
    teacher_logits: Tensor | Projection,
    *,
    temperature: float = 4.0,
    pixel_weight: Tensor | None = None,
    normalizer: Normalizer | None = None,
    **options: Unpack[LossOptions],
) -> DistillationOutput:
    """`segmentation_loss` of the term `CWD` alone.

    Args:
        student_logits: [B, C, h, w], and `target`, `teacher_logits`: as there; of the labels only
            matters which are ignored; `pixel_weight` too.
        temperature: T, from 1e-4 to 1e4; 4 in the paper. mmrazor calls it tau.
        normalizer: replaces N C, images with a valid pixel times classes; a number, or
            {"cwd": number} as in `denominators`.
        options: those of `segmentation_loss` but `class_weight`. resolution="logits" is what was
            published.

    Returns:
        A `DistillationOutput` with `loss`, the term `cwd`, `valid` and `denominators`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    refuse_unknown(options.keys() - set(CWD_OPTIONS), ("temperature", *CWD_OPTIONS), CWD_RENAMED)
    if teacher_logits is None:
        raise TypeError(
            "teacher_logits: got None, expected a tensor [B, C, h', w'] or a Projection"
        )
    shape, numbers = encode((CWD(1.0, check_temperature(temperature, "temperature")),))
    if normalizer is not None and not isinstance(normalizer, Mapping):
        normalizer = {CWD.name: normalizer}
    part = Part(shape, numbers, student_logits, teacher_logits)
    return evaluate([part], target, check_options(options), normalizer, False, pixel_weight)


def distillation_loss(
    student_logits: Tensor | Projection,
    target: Tensor,
    teacher_logits: Tensor | Projection | None = None,
    *,
    pixel_weight: Tensor | None = None,
    normalizer: Normalizer | None = None,
    return_maps: bool = False,
    diagnostics: bool = False,
    **options: Unpack[DistillationOptions],
) -> DistillationOutput:
    """`segmentation_loss` with the options of all terms as keywords of one call.

    Args:
        student_logits: [B, C, h, w], and the arguments up to `diagnostics`: as there.
        options: those of `segmentation_loss`, and `terms.FlatOptions`: `ce_weight` (1 by default),
            `teacher_ce_weight`, `kd_weight`, `hetero_weight`, `feature_weight` (0 by default),
            `label_smoothing` of both cross entropies, `temperature` of kd and hetero,
            `kd_divergence`, `kd_beta`, `kd_alpha` and `kd_standardize` (of `terms.KD`), `preset`,
            `tau`, `mix`, `evaluation` and `weight_axis` (of `terms.HeteroAKD`).

    Returns:
        `DistillationOutput`; `loss` is the weighted sum.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    of_loss: dict[str, Any] = {}
    of_terms: dict[str, Any] = {}
    for name, value in options.items():
        (of_loss if name in DEFAULTS else of_terms)[name] = value
    refuse_unknown(of_terms.keys() - FLAT.keys(), (*FLAT, *DEFAULTS), _RENAMED)
    shape, numbers = encode_flat(of_terms, return_maps)
    part = Part(shape, numbers, student_logits, teacher_logits, weights=FLAT_WEIGHTS)
    checked = check_options(of_loss)
    return evaluate([part], target, checked, normalizer, return_maps, pixel_weight, diagnostics)


def cross_entropy(
    logits: Tensor | Projection,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    pixel_weight: Tensor | None = None,
    normalizer: Normalizer | None = None,
    diagnostics: bool = False,
    **options: Unpack[LossOptions],
) -> DistillationOutput:
    """Bilinear upsampling and cross entropy in one pass.

    Equal to `F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear",
    align_corners=align_corners), target, class_weight, ignore_index=ignore_index,
    label_smoothing=label_smoothing)`, except that it is 0 and not NaN where every pixel is
    ignored; the compiled backends never store the upsampled logits.

    Args:
        logits: [B, C, h, w], and `target`, `pixel_weight`, `normalizer`, `diagnostics`, `options`:
            as in `segmentation_loss`. A scalar `normalizer` replaces the number of valid pixels;
            with class weights, where the denominator is their sum, only `{"ce": ...}` replaces it.
        label_smoothing: in [0, 1].

    Returns:
        `DistillationOutput` with `loss`, the term `ce`, and `valid`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        BackendUnavailableError: `backend` was named and cannot run this call.
    """
    known = ("label_smoothing", *DEFAULTS)
    refuse_unknown(options.keys() - DEFAULTS.keys(), known, _RENAMED)
    shape, numbers = encode_flat({"label_smoothing": label_smoothing}, False)
    part = Part(shape, numbers, logits, weights=FLAT_WEIGHTS, called="logits")
    checked = check_options(options)
    return evaluate([part], target, checked, normalizer, False, pixel_weight, diagnostics)


# --- terms, encoded ------------------------------------------------------------------------------


def check_terms(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms, one of which has a weight.

    Raises:
        TypeError: names what is no term, and says what to write.
        ValueError: none has a weight.
    """
    if isinstance(terms, Term):
        name = type(terms).__name__
        raise TypeError(f"terms: got {name}, expected a sequence of terms; write [{name}(...)]")
    terms = tuple(terms) if isinstance(terms, Iterable) else (terms,)
    for term in terms:
        if type(term) in TERMS:
            continue
        got, hint = type(term).__name__, "such as KD(0.1)"
        if isinstance(term, (list, tuple)):
            hint = "unpack it with a star, as in SegmentationLoss(*terms)"
        elif isinstance(term, type) and issubclass(term, Term):
            got, hint = f"the class {term.__name__}", f"call it, {term.__name__}()"
        elif isinstance(term, Term):
            hint = "not subclasses of them, which have no kernel"
        raise TypeError(f"terms: got {got}, expected terms of heteroakd_fast.terms; {hint}")
    if not any(term.weight != 0.0 for term in terms):
        raise ValueError(f"terms: got {len(terms)}, expected one whose weight is not 0")
    return terms


def with_maps(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """With `HeteroAKD` of weight 0 where no term has the options of maps."""
    has = any(isinstance(term, HeteroAKD) for term in terms)
    return terms if has else (*terms, HeteroAKD(0.0))


@lru_cache(maxsize=256)
def encode(terms: tuple[Term, ...]) -> tuple[Shape, Numbers]:
    return shape_of(terms), numbers_of(terms)


def encode_flat(options: Mapping[str, Any], maps: bool) -> tuple[Shape, Numbers]:
    """Of `FlatOptions`, some of which may be missing.

    Raises:
        TypeError, ValueError: names the keyword.
    """
    if torch.compiler.is_compiling():
        return _encode_traced({**FLAT_DEFAULTS, **options})
    try:
        # of their types too: True is no weight, though it equals 1.0
        return _encode_flat(tuple(options.items()), tuple(map(type, options.values())), maps)
    except TypeError:  # what cannot be hashed is no option, and now it is said which
        check_flat(options)
        raise


@lru_cache(maxsize=256)
def _encode_flat(
    options: tuple[tuple[str, Any], ...], types: tuple[type, ...], maps: bool
) -> tuple[Shape, Numbers]:
    terms = from_flat(check_flat({**FLAT_DEFAULTS, **dict(options)}))
    return encode(tuple(t for t in terms if t.weight or (maps and isinstance(t, HeteroAKD))))


def _encode_traced(options: dict[str, Any]) -> tuple[Shape, Numbers]:
    """The same, with numbers that the compiler does not see as constants."""
    names = _flat_numbers()
    check_flat({name: options[name] for name in names})
    choices = tuple((name, value) for name, value in options.items() if name not in names)
    asked = tuple(name for name in names if name.endswith("_weight") and options[name] != 0.0)
    return _flat_shape(choices, asked), vector([options[name] for name in names])


@constant_while_tracing
def _flat_numbers() -> tuple[str, ...]:
    """The keyword of each number that `numbers_of` lists for all terms."""
    return tuple(
        name
        for term in from_flat(FLAT_DEFAULTS)
        for option in fields(term)
        if "choices" not in option.metadata
        for name, targets in FLAT.items()
        if (type(term), option) in targets
    )


@constant_while_tracing
def _flat_shape(choices: tuple[tuple[str, Any], ...], asked: tuple[str, ...]) -> Shape:
    weights = {name: float(name in asked) for name in FLAT if name.endswith("_weight")}
    return shape_of(from_flat(check_flat({**FLAT_DEFAULTS, **dict(choices), **weights})))
