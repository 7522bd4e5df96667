"""Triton kernels of `heteroakd_fast`, installed as `heteroakd_fast.kernels`.

One file per kernel family, laid out like `heteroakd_fast/reference.py` and `csrc/math`:
reliability, mixed_target, discrepancy and the terms under the same names in the same order.
This version has none yet; `heteroakd_fast.backends.triton` says so when asked.
"""
