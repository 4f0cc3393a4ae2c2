"""Counts the matrix products of a program."""

import jax
import numpy as np


def count_products(jaxpr):
    """Twice the multiply-adds of every matrix product in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * size * int(np.prod(equation.outvars[0].aval.shape))
        for sub in jax.core.jaxprs_in_params(equation.params):
            total += count_products(sub)
    return total
