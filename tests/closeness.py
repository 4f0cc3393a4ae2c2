"""When results of float32 agree: one rule, which follows from the arithmetic."""

import jax
import numpy as np

EPS = 2.0**-23  # of float32; a rounding errs by half of it at the most
ROUNDINGS = 256  # that add up on the way through a small network, there or back


def assert_close(found, want, roundings=ROUNDINGS):
    """Asserts that arrays, or trees of them, differ by rounding alone.

    What sums and products err by is a share of their largest terms, which may cancel:
    so an error is measured by the largest value of its array, never by the value beside
    it, and never by a number that suits the values of one test. Processors add in
    different orders, so only the number of roundings is bounded. An array of a tree
    that is zero but for them, as the gradient of a key's bias, is measured by the
    largest value of the tree.
    """
    leaves = jax.tree.leaves_with_path(want)
    largest = max(np.abs(x).max(initial=0) for _, x in leaves)
    for (path, theirs), ours in zip(leaves, jax.tree.leaves(found), strict=True):
        bound = EPS * (roundings * np.abs(theirs).max(initial=0) + largest)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=name)
