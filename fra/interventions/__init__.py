"""Changing what a head does inside a forward pass: channels of its scores, features of its output, or the whole head.

Every function returns an `Intervention`: a context manager (`with fra.remove(...): model(tokens)`) that also carries
its list of hooks (`.hooks`). What is taken away is computed from the activation that stands at the dictionary's hook in
the very pass that is changed, so it is right under other interventions, too; `clean=tokens` takes it from a pass of its
own without any hooks. No change ever touches a masked entry: no logit depends on later tokens under any of them.

The norm's scale and a QK-norm's gain of the head's own layer are those of the pass: removing a channel leaves them as
they are. Scales further down adapt; `freeze_scales` holds them. Gradients take what is removed as a constant.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
