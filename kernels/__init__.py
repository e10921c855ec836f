"""GPU kernels beside their plain PyTorch twins, one folder per operation.

Hugging Face publishes a package of the same name, for which transformers looks when it is imported. This one therefore
states no version and imports nothing. `llm.core.compat.require_own_kernels` tells a user who has both.
"""

OWNER = "manyformer"
