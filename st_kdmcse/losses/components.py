"""The value of a loss, term by term."""

from __future__ import annotations

import torch
from torch import Tensor


class LossComponents(dict[str, Tensor]):
    """A dictionary of scalar terms whose sum is the training loss.

    The Trainer sums the values for the backward pass and logs them by name. ``MatryoshkaLoss``
    scales and adds losses; so can these, term by term.

    Args:
        terms: the terms by name, each a scalar tensor.
        metrics: further scalars by name that are logged but are no part of the loss.

    Example:
        >>> loss = 0.5 * LossComponents({"text": torch.tensor(2.0), "image": torch.tensor(1.0)})
        >>> (loss + loss).total
        tensor(3.)
    """

    def __init__(self, terms: dict[str, Tensor], metrics: dict[str, Tensor] | None = None) -> None:
        super().__init__(terms)
        self.metrics = metrics or {}

    @property
    def total(self) -> Tensor:
        """The training loss, a scalar."""
        return torch.stack(list(self.values())).sum()

    def __mul__(self, factor: float) -> LossComponents:
        return LossComponents({name: term * factor for name, term in self.items()}, self.metrics)

    __rmul__ = __mul__

    def __add__(self, other: LossComponents | float) -> LossComponents:
        if not isinstance(other, LossComponents):
            return self if other == 0 else NotImplemented  # 0 is the start of a running sum
        terms = dict(self)
        for name, term in other.items():
            terms[name] = terms[name] + term if name in terms else term
        return LossComponents(terms, {**self.metrics, **other.metrics})

    __radd__ = __add__
