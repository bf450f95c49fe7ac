"""Keyword arguments of a stock decoder layer, made for the whole prompt, for the tokens that are left."""

from typing import Any

import torch
from torch import Tensor

NAMES = ("attention_mask", "position_ids", "cache_position")
TABLES = "position_embeddings"  # with this beginning; decoders with two kinds of rotary tables have two such names
KINDS = 4  # objects of one name that are remembered; decoders have a mask for each kind of attention


class LayerKwargs:
    """Narrows the keyword arguments of decoder layers between two prunes.

    Args:
        index: What is left [B, L], as indices of the whole prompt.
        padding: [B, L], True where a sample that lost more tokens than another is padded; None if nowhere.
    """

    def __init__(self, index: Tensor, padding: Tensor | None) -> None:
        self.index, self.padding = index, padding
        self.narrowed: dict[str, list[tuple[Any, Any]]] = {}

    def narrow(self, kwargs: dict[str, Any], mask_4d: bool) -> None:
        """Narrow a layer's keyword arguments, in place.

        Args:
            kwargs: The arguments, made for the whole prompt.
            mask_4d: Whether the attention takes [B, 1, L, L] where a mask is needed and none was given.
        """
        for name, given in kwargs.items():
            if name not in NAMES and not name.startswith(TABLES):
                continue
            # The decoder's loop passes the same objects to all layers of a kind, so each is narrowed once a stage. It
            # is kept beside what it became, since a later object may get the identity of one that is gone.
            # Layers that take their masks in different forms may both be given none.
            kind = name if mask_4d or name != "attention_mask" else f"{name}, not 4D"
            known = self.narrowed.setdefault(kind, [])
            found = next((pair for pair in known if pair[0] is given), None)
            if found is None:
                found = given, self._narrow(name, given, mask_4d)
                self.narrowed[kind] = [*known, found][-KINDS:]
            kwargs[name] = found[1]

    def _narrow(self, name: str, given: Any, mask_4d: bool) -> Any:
        if name == "attention_mask":
            return narrow_mask(given, self.index, self.padding, mask_4d)
        if given is None:
            return None
        # Where layers lie on several devices, their arguments stay on the device of the prompt.
        index = self.index.to(given[0].device)
        if name == "cache_position":
            return given[: index.shape[1]]
        if name == "position_ids":
            return given.take_along_dim(index[(None,) * (given.dim() - 2)], -1)
        return tuple(table.take_along_dim(index[(None,) * (table.dim() - 3)][..., None], -2) for table in given)


def narrow_mask(given: Tensor | None, index: Tensor, padding: Tensor | None, mask_4d: bool) -> Tensor | None:
    """Return an attention mask for some of its tokens.

    Args:
        given: The mask [B, S] or [B or 1, 1, S, S], additive or boolean; None for a causal one.
        index: The tokens [B, L].
        padding: [B, L], which of these shall be hidden; None for none.
        mask_4d: See `LayerKwargs.narrow`.

    Returns:
        The mask [B, L] or [B, 1, L, L], of the kind that was given; None for a causal one without padding.
    """
    device = index.device if given is None else given.device
    index, padding = index.to(device), None if padding is None else padding.to(device)
    if given is None:
        if padding is None:
            return None
        if not mask_4d:
            return ~padding
        seen = torch.ones(index.shape[1], index.shape[1], dtype=torch.bool, device=device).tril()
        mask = seen.expand(len(index), 1, -1, -1)
    elif given.dim() == 2:
        mask = given.gather(1, index)
        return mask if padding is None else mask.masked_fill(padding, 0)
    else:
        mask = given.take_along_dim(index[:, None, :, None], -2).take_along_dim(index[:, None, None], -1)
    if padding is None:
        return mask
    # A row that sees nothing would be NaN, and NaN spreads; therefore padding sees itself.
    itself = torch.eye(index.shape[1], dtype=torch.bool, device=device)
    hidden = padding[:, None, None] & ~itself
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
