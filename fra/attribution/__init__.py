"""Direct feature attribution (DFA): which heads and which source positions make a head-output feature fire.

A dictionary on `hook_z` reads the concatenated head outputs linearly before its activation function, and a head's
output is a sum over the positions that it attends to, so that a feature's pre-activation is a sum over heads and over
source positions (Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders"):

    pre_f(t) = sum_h gain_t z[t,h] . W_enc[h,:,f] + bias_f,    z[t,h] = sum_s A_h(t,s) v[s,h]

`observe` runs documents once and answers everything about them; `pre_activation`, `by_head` and `by_source` are short
forms for one document; `recursive` goes on to every component upstream. The pattern and the dictionary's normalisation,
where it has one, are frozen at their values.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
