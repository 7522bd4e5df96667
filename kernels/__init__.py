"""Triton kernels of `heteroakd_fast`, installed as `heteroakd_fast.kernels`; docs/triton.md.

One file per subject, laid out like `heteroakd_fast/reference.py` and `csrc/math`: reliability,
mixed_target, discrepancy and the terms under the same names in the same order. Nothing is imported
here: `config` is of use without Triton.
"""
