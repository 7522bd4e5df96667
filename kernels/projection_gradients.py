"""Gradients of a 1x1 projection's features and weight from g = dL/dz (projection.py)."""

import triton
import triton.language as tl

from .projection import labels_of, pixel_offsets, product


@triton.jit(do_not_specialize=["classes", "tiles", "width"])
def features_gradient(
    gradient,  # [B, h w, GC] float32
    weight,  # [C, D], dense
    out,  # [B, D, h, w], any strides
    classes,
    pixels,
    tiles,
    width,
    depth,
    out_b,
    out_d,
    out_y,
    out_x,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
    GC: tl.constexpr,
    BD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    pixel = (program % tiles) * P + tl.arange(0, P)
    inside = pixel < pixels
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    exists = d < depth
    f = tl.zeros([P, BD], tl.float32)
    for start in range(0, classes, BC):
        c = start + tl.arange(0, BC)
        is_class = c < classes
        g = tl.load(
            gradient + (image * pixels + pixel)[:, None] * GC + c[None, :],
            mask=inside[:, None] & (c < GC)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + tl.cast(c, tl.int64)[:, None] * depth + d[None, :],
            mask=is_class[:, None] & exists[None, :],
            other=0.0,
        )
        f = product(g, w, f, PRECISION, WIDEN)
    place = pixel_offsets(pixel, width, out_y, out_x, FLAT)
    tl.store(
        out + image * out_b + place[:, None] + tl.cast(d, tl.int64)[None, :] * out_d,
        f.to(out.dtype.element_ty),
        mask=inside[:, None] & exists[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "classes",
        "tiles",
        "all_tiles",
        "per_split",
        "width",
        "target_b",
        "target_y",
        "target_x",
        "ignore_index",
    ]
)
def weight_gradient(
    gradient,  # [B, h w, GC] float32
    features,  # [B, D, h, w], any strides
    target,  # [B, h, w] labels
    partials,  # [splits, C, D + 1] float32 out; the last column for the bias
    classes,
    pixels,
    tiles,  # of an image
    all_tiles,  # of all images
    per_split,
    width,
    depth,
    features_b,
    features_d,
    features_y,
    features_x,
    target_b,
    target_y,
    target_x,
    ignore_index,
    FLAT: tl.constexpr,
    LABELS_FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
    GC: tl.constexpr,
    BD: tl.constexpr,
):
    split = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    exists = d < depth
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    is_class = c < classes
    total = tl.zeros([BC, BD], tl.float32)
    bias = tl.zeros([BC], tl.float32)
    first = split * per_split
    for tile in range(first, tl.minimum(first + per_split, tl.cast(all_tiles, tl.int64))):
        image = tile // tiles
        pixel = (tile % tiles) * P + tl.arange(0, P)
        inside = pixel < pixels
        g = tl.load(
            gradient + (image * pixels + pixel)[None, :] * GC + c[:, None],
            mask=inside[None, :] & (c < GC)[:, None],
            other=0.0,
        )
        place = pixel_offsets(pixel, width, features_y, features_x, FLAT)
        f = tl.load(
            features
            + image * features_b
            + place[:, None]
            + tl.cast(d, tl.int64)[None, :] * features_d,
            mask=inside[:, None] & exists[None, :],
            other=0.0,
        )
        # 0 times what an ignored pixel holds may be NaN
        label, _ = labels_of(
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
        f = tl.where((label >= 0)[:, None], f, 0.0)
        total = product(g, f, total, PRECISION, WIDEN)
        bias += tl.sum(g, 1)
    row = (split * classes + c) * (depth + 1)
    tl.store(partials + row[:, None] + d[None, :], total, mask=is_class[:, None] & exists[None, :])
    if tl.program_id(0) == 0:
        tl.store(partials + row + depth, bias, mask=is_class)


@triton.jit(do_not_specialize=["classes", "depth", "splits"])
def add_splits(
    partials,  # [splits, C, D + 1] float32
    weight,  # [C, D] out, dense
    bias,  # [C] out, written if BIAS
    classes,
    depth,
    splits,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entries = tl.cast(classes, tl.int64) * (depth + 1)
    inside = entry < entries
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials + split * entries + entry, mask=inside, other=0.0)
    c = entry // (depth + 1)
    d = entry % (depth + 1)
    tl.store(weight + c * depth + d, total.to(weight.dtype.element_ty), mask=inside & (d < depth))
    if BIAS:
        tl.store(bias + c, total.to(bias.dtype.element_ty), mask=inside & (d == depth))
