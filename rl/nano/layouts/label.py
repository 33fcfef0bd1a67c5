"""Labels: prices on shelves, goods that were weighed and packed, and parcels."""

from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Final

from nano import words
from nano.sheet import Sheet

_PACKED: Final = words.listed("PACKED ON,Packed on,PKD,MFG DATE,Prod. date,DATE,Packing date")
_UNTIL: Final = words.listed("USE BY,Best before,EXP,SELL BY,Expiry,BB")
_LOTS: Final = words.listed("LOT,Lot No,BATCH,Batch No,L")
_WEIGHTS: Final = words.listed("NET WT,Net weight,WEIGHT,Wt,NET")
_PRICES: Final = words.listed("PRICE,Price,OUR PRICE,Now only,NOW,Special price")
_SERVICES: Final = words.listed("PRIORITY,EXPRESS,GROUND,STANDARD,PARCEL,ECONOMY,AIR MAIL,SAME DAY,COURIER")
_UNITS: Final = words.listed("kg,KG,lb,100g,L")


def draw_label(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return a label and those of company, date, address and total that it has."""
    draw: Callable[[Random], tuple[Sheet, dict[str, str]]] = rng.choice((_price_label, _product_label, _parcel_label))
    sheet, fields = draw(rng)
    sheet.y += rng.uniform(4, 16)
    if rng.random() < 0.5:
        edges = (3, 3, sheet.width - 4, round(sheet.y) - 4)
        sheet.strip.draw.rounded_rectangle(edges, radius=rng.choice((0, 8, 16)), outline=0, width=rng.choice((1, 2)))
    return sheet, fields


def _label(rng: Random, *, widths: tuple[int, int], columns: tuple[float, float]) -> Sheet:
    """Return an empty label, much higher than what is printed on it."""
    width = rng.randint(*widths)
    sheet = Sheet(rng, width=width, height=2 * width + 200, columns=columns, margin=(0.035, 0.08))
    sheet.y = rng.uniform(10, 24)
    sheet.leading = rng.uniform(1.15, 1.45)
    return sheet


def _bars(rng: Random, sheet: Sheet) -> None:
    """Print a barcode and its number."""
    number = "".join(rng.choice("0123456789") for _ in range(rng.choice((8, 12, 13))))
    start = rng.uniform(0.0, 0.2)
    sheet.barcode(start, 1 - start, tall=sheet.type.size * rng.uniform(1.6, 3.5))
    sheet.row([(number, "c", 0.5)])


def _price_label(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return what stands at a shelf: a thing, its price, and its price for a unit."""
    sheet = _label(rng, widths=(240, 400), columns=(16, 30))
    fields = {}
    if rng.random() < 0.4:
        fields["company"] = words.company(rng)
        sheet.row([(fields["company"], "c", 0.5)])
    sheet.rows([words.item(rng)], sheet.large(rng.uniform(1.0, 1.5)))
    price = words.amount(rng, 90)
    name = rng.choice(_PRICES)
    if rng.random() < 0.5:
        sheet.row([(name, "l", 0.0), (sheet.money.format(price), "r", 1.0)], sheet.large(rng.uniform(1.2, 1.8)))
    else:
        align, place = rng.choice((("c", 0.5), ("r", 1.0)))
        sheet.row([(sheet.money.format(price), align, place)], sheet.large(2.6))
    if rng.random() < 0.6:
        sheet.row([(f"{sheet.money.format(price * rng.uniform(0.2, 3))} / {rng.choice(_UNITS)}", "l", 0.0)])
    if rng.random() < 0.5:
        sheet.row([(f"{rng.choice(('SKU', 'Art.', 'CODE', 'Item no'))}{sheet.colon} {words.code(rng)}", "l", 0.0)])
    if rng.random() < 0.3:
        fields["date"] = words.dated(rng, words.day(rng))
        sheet.row([(fields["date"], "r", 1.0)])
    if rng.random() < 0.7:
        _bars(rng, sheet)
    return sheet, fields


def _product_label(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return what a scale prints for goods that were packed: dates, lot, weight and price."""
    sheet = _label(rng, widths=(300, 460), columns=(24, 40))
    company, where, when, form = words.company(rng), words.address(rng), words.day(rng), words.date_form(rng)
    maker_first = rng.random() < 0.5
    fields = {"company": company, "address": " ".join(where)}

    def maker() -> None:
        sheet.row([(company, "c" if maker_first else "l", 0.5 if maker_first else 0.0)])
        sheet.rows(where, align="c" if maker_first else "l", place=0.5 if maker_first else 0.0)

    if maker_first:
        maker()
        sheet.rule()
    sheet.rows([words.item(rng)], sheet.large(rng.uniform(1.1, 1.7)))
    if rng.random() < 0.4:
        parts = ", ".join(words.item(rng).lower() for _ in range(rng.randint(2, 6)))
        sheet.rows([f"{rng.choice(('Ingredients', 'INGREDIENTS', 'Contains'))}: {parts}"])
    fields["date"] = words.dated(rng, when, form)
    weight, price = rng.uniform(0.05, 4), words.amount(rng, 60)
    until = words.dated(rng, when + timedelta(days=rng.randint(2, 400)), form)
    rows = [(rng.choice(_PACKED), fields["date"]), (rng.choice(_LOTS), words.code(rng))]
    if rng.random() < 0.7:
        rows.append((rng.choice(_UNTIL), until))
    rows.append((rng.choice(_WEIGHTS), f"{weight:.3f} {rng.choice(('kg', 'KG', 'lb'))}"))
    if rng.random() < 0.7:
        rows.append((rng.choice(("UNIT PRICE", "Price/kg", "Per kg")), f"{price:.2f}"))
    if rng.random() < 0.3:
        rng.shuffle(rows)
    right = rng.random() < 0.5
    for name, value in rows:
        sheet.row([(f"{name}{sheet.colon}", "l", 0.0), (value, "r" if right else "l", 1.0 if right else 0.5)])
    if rng.random() < 0.8:
        fields["total"] = f"{weight * price:.2f}"
        cost = sheet.money.format(float(fields["total"]))
        sheet.row([(rng.choice(("TOTAL PRICE", "TOTAL", "Total")), "l", 0.0), (cost, "r", 1.0)], sheet.large(1.4))
    if rng.random() < 0.7:
        _bars(rng, sheet)
    if not maker_first:
        maker()
    return sheet, fields


def _parcel_label(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return the label of a parcel: from whom, to whom, by which service, how heavy."""
    sheet = _label(rng, widths=(380, 540), columns=(28, 46))
    company, where, day = words.company(rng), words.address(rng), words.dated(rng, words.day(rng))

    def sender() -> None:
        sheet.row([(rng.choice(("FROM:", "From", "SENDER", "Ship from:")), "l", 0.0)])
        sheet.rows([company, *where])

    def facts() -> None:
        rows = [(rng.choice(("DATE", "Ship date", "Shipped")), day)]
        weight = f"{rng.uniform(0.1, 40):.1f} {rng.choice(('KG', 'LB'))}"
        rows.append((rng.choice(("WEIGHT", "WT", "Actual wt")), weight))
        if rng.random() < 0.5:
            rows.append((rng.choice(("REF", "Order no", "INV", "P.O.")), words.code(rng)))
        sheet.rows([f"{name}{sheet.colon} {value}" for name, value in rows])

    if rng.random() < 0.5:
        sheet.side_by_side((0.0, 0.55, sender), (0.6, 1.0, facts))
    else:
        sender()
        facts()
    sheet.line(weight=2)
    sheet.row([(rng.choice(("TO:", "SHIP TO:", "Deliver to", "CONSIGNEE")), "l", 0.0)])
    person = f"{words.made_up(rng)} {words.made_up(rng)}".title()
    receiver, set_in = [person, *words.address(rng)], sheet.large(rng.uniform(1.0, 1.4))
    sheet.side_by_side((0.08, 1.0, lambda: sheet.rows(receiver, set_in)))
    sheet.line(weight=2)
    service = rng.choice(_SERVICES)
    sheet.row([(service, "l", 0.0), (f"{rng.randint(1, 3)} OF {rng.randint(3, 5)}", "r", 1.0)], sheet.large(1.8))
    sheet.row([(f"{rng.choice(('TRACKING #', 'Tracking no', 'AWB'))}{sheet.colon} {words.code(rng)}", "l", 0.0)])
    _bars(rng, sheet)
    return sheet, {"company": company, "date": day, "address": " ".join(where)}
