"""The compiled EM step: kernels for the E-step, sums for the M-step.

A graph whose bindings are all selections is a mixture over rows (`rows`) or a homogeneous chain
(`chain`), or it is neither and the generic contraction does its work. To add a kernel: a function
that recognises a collapsed graph, and an ``e_step`` from arguments to `Sums`.
"""

from pyro_em.compiled.iteration import Iteration, Point, compile_iteration
from pyro_em.compiled.step import Handover

__all__ = ["Handover", "Iteration", "Point", "compile_iteration"]
