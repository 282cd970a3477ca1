"""Softmax cross-entropy in Triton: loss and gradient.

    loss = a log(sum_c exp(x_c - m)) - sum_c q_c (x_c - m)      d loss/d x_c = up (a p_c - q_c)

with q the target mass, a = sum_c q_c, m = max_c x_c (csrc/rules/softmax.h has the variants).

Memory sees one read and one write per logit. A block holds whole rows while they fit in registers;
longer rows are swept twice, the second time backwards, while they are in L2 (one program a row,
at most one an SM). Blocks are 2-D, rows and classes: lanes run over classes where they are
contiguous, else over positions, so that one text serves (N, C), channels_last and (N, C, d1, ...).

Arithmetic in float32 (float64 for float64), rounded once, at the store; row losses and total
weight are added up in float64. No atomics: the same bits every run. No value is read on the host.
A label out of range is no address: its row becomes NaN.

    launch.py    the ops: checks, what is allocated, launches
    plan.py      which blocks a call is cut into
    forward.py   the loss of every row, with its gradient; blocks.py: its parts
    sums.py      what the mean divides by, and the loss of all rows
    scale.py     a gradient times one factor
"""
