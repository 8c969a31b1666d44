"""The operations of :mod:`reference` in Triton (https://triton-lang.org): same names, arguments and results.

Memory bounds all of them: each reads and writes every large tensor once. Sums over tokens go through ``partials``: each
of ``PARTS`` programs adds up its share of the tokens, so that the result does not depend on timing. Tokens per program
and numbers of warps are those that were fastest on an H100.
"""

from .activation import act, act_backward, column_sums
from .launcher import ERRORS, finish, partials
from .norm import add_norm, norm_backward, row_norm
from .rotary import qkv_backward, rotate_

__all__ = [
    "ERRORS",
    "act",
    "act_backward",
    "add_norm",
    "column_sums",
    "finish",
    "norm_backward",
    "partials",
    "qkv_backward",
    "rotate_",
    "row_norm",
]
