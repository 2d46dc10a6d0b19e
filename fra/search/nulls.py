"""What channels must beat: scrambled heads and random atoms (other lags live in the search itself)."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer
from fra.dictionaries.codes import Codes, decoded
from fra.errors import FraError
from fra.search.channels import Arms, on_documents
from fra.search.designs import ChannelNulls

_ROWS_AT_ONCE = 256


def random_rotation(d_head: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "d_head d_head"]:
    """A random orthogonal matrix, uniform (Haar): QR of a Gaussian matrix with the signs of R's diagonal taken out."""
    q, r = torch.linalg.qr(torch.randn(d_head, d_head, generator=generator, dtype=torch.float64))
    turned: Tensor = (q * r.diagonal().sign()).to(like)
    return turned


def row_spread(frozen: FrozenLayer, head: int, documents: int = ChannelNulls.spread_documents) -> float:
    """Root mean square of the head's scores after centring every row over its unmasked keys, on the first documents."""
    few = on_documents(frozen, slice(documents))
    scores = few.scores(head).masked_fill(~frozen.mask, 0.0)
    count = frozen.mask.sum(-1, keepdim=True)
    centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~frozen.mask, 0.0)
    return float((centred.square().sum() / (len(scores) * frozen.mask.sum())).sqrt())


def scramble(frozen: FrozenLayer, head: int, rotation: Float[Tensor, "d_head d_head"], stretch: float) -> FrozenLayer:
    """The layer with the head's key map turned by an orthogonal matrix (before any rotary embedding) and stretched.

    Everything about the head that is not the pairing of its query with its key directions survives: norms, biases,
    spectrum.
    """
    W_k, b_k = frozen.W_k.clone(), frozen.b_k.clone()
    W_k[head] = stretch * W_k[head] @ rotation
    b_k[head] = stretch * b_k[head] @ rotation
    return dataclasses.replace(frozen, W_k=W_k, b_k=b_k)


def scrambled_arms(arms: Arms, head: int, rotation: Tensor, stretch: float) -> Arms:
    """Both arms under one scramble."""
    repeated, control = (
        arm.with_weights(scramble(arm.frozen, head, rotation, stretch)) for arm in (arms.repeated, arms.control)
    )
    return Arms(arms.batch, repeated, control)


def stretch_to_match(
    frozen: FrozenLayer,
    head: int,
    rotation: Tensor,
    documents: int = ChannelNulls.spread_documents,
    spread: float | None = None,
) -> float:
    """The factor that gives the scrambled head the row-centred score spread of the head (`spread`, where it is known),
    on the first documents. Raises FraError where the scrambled head has none.
    """
    turned = row_spread(scramble(frozen, head, rotation, 1.0), head, documents)
    if not turned > 0:
        raise FraError(
            f"the scores of layer {frozen.layer} head {head} do not vary once its key map is turned: a control that is "
            "dead cannot be exceeded or missed"
        )
    return (row_spread(frozen, head, documents) if spread is None else spread) / turned


def matching_pursuit(
    x: Float[Tensor, "n d_model"], atoms: Float[Tensor, "n_atoms d_model"], counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x in unit atoms by matching pursuit (Mallat & Zhang 1993), coefficients kept positive as an SAE's are.

    Args:
        counts: number of steps for each row, so that L0 is what it was (an atom chosen twice counts once).
    Returns:
        (row, atom, value) of the active entries, sorted by row, then atom.
    """
    gram = atoms @ atoms.T
    coded = torch.nonzero(counts)[:, 0]
    rows = []
    for some in torch.split(coded, _ROWS_AT_ONCE):  # so few that their correlations stay in a core's cache
        steps, every = counts[some], torch.arange(len(some), device=x.device)
        correlation = x[some] @ atoms.T
        code = torch.zeros_like(correlation)
        for step in range(int(steps.max())):
            best, atom = _largest(correlation)
            taken = torch.where(steps > step, best.clamp(min=0), 0.0)
            code[every, atom] += taken
            correlation.addcmul_(gram.index_select(0, atom), taken[:, None], value=-1)
        row, atom = code.nonzero(as_tuple=True)
        rows.append((some[row], atom, code[row, atom]))
    row, atom, value = (torch.cat(column) for column in zip(*rows, strict=True))
    return row, atom, value


def _largest(values: Float[Tensor, "n m"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """The largest of every row and where it stands, first of equals; numpy's argmax takes a third of torch's time on a
    CPU.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        best, at = values.max(dim=1)
        return best, at
    at = torch.from_numpy(values.numpy().argmax(1))
    return values.gather(1, at[:, None])[:, 0], at


def random_atoms(
    arm: Arm, atoms: Float[Tensor, "n_atoms d_model"], lengths: Int[Tensor, " batch"] | None = None
) -> Arm:
    """The arm with the dictionary's features replaced by random atoms of equal number and L0; what they leave joins the
    error.

    Bias terms stay the dictionary's own, so that only the choice of directions differs. Positions from a document's
    length on (`lengths`) are padding: they get no codes.
    """
    codes = arm.codes
    batch, pos = codes.shape
    target = (arm.frozen.x - codes.bias).flatten(0, 1)
    counts = torch.bincount(codes.row, minlength=batch * pos)
    if lengths is not None:
        counts *= (torch.arange(pos, device=counts.device) < lengths[:, None]).flatten()
    row, atom, value = matching_pursuit(target, atoms, counts)
    left = target - decoded(row, atom, value, atoms, len(target))
    replaced = Codes(row, atom, value, atoms, codes.bias, left.view_as(arm.frozen.x), codes.shape)
    return Arm(arm.frozen, replaced)


def draw_atoms(n: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "n d_model"]:
    """n random unit vectors."""
    atoms = torch.randn(n, like.shape[-1], generator=generator, dtype=torch.float64)
    unit: Tensor = (atoms / atoms.norm(dim=-1, keepdim=True)).to(like)
    return unit
