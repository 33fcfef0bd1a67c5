"""What is billed on an invoice; its amounts add up to the cent."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from random import Random
from typing import Final

from nano import words

_CENT: Final = Decimal("0.01")
_RATES: Final = (0, 5, 6, 6, 7, 8, 10, 19, 20, 21)


@dataclass(frozen=True)
class Item:
    """Some pieces of one thing."""

    name: str
    code: str
    pieces: int
    price: Decimal

    @property
    def amount(self) -> Decimal:
        return self.pieces * self.price


@dataclass(frozen=True)
class Bill:
    """Items, and what is taken off and added to them.

    Attributes:
        items: What is billed.
        rate: Tax in per cent.
        off: Discount, taken off before tax.
        shipping: Cost of delivery, added before tax.
    """

    items: tuple[Item, ...]
    rate: int
    off: Decimal
    shipping: Decimal

    @property
    def subtotal(self) -> Decimal:
        return sum((item.amount for item in self.items), Decimal(0))

    @property
    def tax(self) -> Decimal:
        taxed = self.subtotal - self.off + self.shipping
        return (taxed * self.rate / 100).quantize(_CENT, ROUND_HALF_UP)

    @property
    def total(self) -> Decimal:
        return self.subtotal - self.off + self.shipping + self.tax


def draw_bill(rng: Random, *, count: int) -> Bill:
    """Return a bill of `count` items."""
    most = rng.choice((30.0, 400.0, 4000.0))
    items = tuple(
        Item(
            words.item(rng).strip() if rng.random() < 0.8 else f"{words.made_up(rng).title()} {words.code(rng)}",
            words.code(rng),
            rng.choice((1, 1, 2, 3, 5, 10, 12, rng.randint(1, 250))),
            Decimal(f"{words.amount(rng, most):.2f}"),
        )
        for _ in range(count)
    )
    subtotal = sum((item.amount for item in items), Decimal(0))
    off = (subtotal * rng.choice((5, 10, 15)) / 100).quantize(_CENT) if rng.random() < 0.25 else Decimal(0)
    shipping = Decimal(f"{words.amount(rng, 60):.2f}") if rng.random() < 0.25 else Decimal(0)
    return Bill(items, rng.choice(_RATES), off, shipping)
