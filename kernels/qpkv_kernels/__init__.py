"""Tensor operations of the packed cache: torch references (Triton kernels will stand beside them).

Knows no plan and no model.
"""
