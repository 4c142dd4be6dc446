"""Names, for `jax.checkpoint`, of what `models.stages.REMAT` may keep for the backward pass."""

# Of tensors that take a product of matrices, or a convolution, to compute again.
PRODUCT = "product"
# Of means and variances, two numbers for each token.
STATISTICS = "statistics"
