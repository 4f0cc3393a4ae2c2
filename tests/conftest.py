"""Strict by default: 8 CPU devices, checked shapes, no silent broadcasting."""

from jaxtyping import install_import_hook

install_import_hook("jvdit", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
