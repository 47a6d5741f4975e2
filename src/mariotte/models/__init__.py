"""Models seen through their architecture entry, loaded, saved and scored."""

import logging

# torchao, which transformers imports where it is installed, says then which kernels for other machines it cannot load,
# and torch what torchao registers with it: nothing that a user could act on.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
