"""Invoices on a page of the form of A4: parties, numbers and dates, a table of items, sums, and terms of payment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random
from typing import Final, Literal

from nano import words
from nano.bills import Bill, Item, draw_bill
from nano.printer import Type
from nano.sheet import Cell, Sheet, broken

Pair = tuple[str, str]
"""A label and its value."""
_TITLES: Final = words.listed("INVOICE,Invoice,TAX INVOICE,Tax Invoice,PROFORMA INVOICE,BILL,STATEMENT,SALES INVOICE")
_NUMBERS: Final = words.listed("Invoice No,Invoice No.,Invoice #,INVOICE NO,Inv. No.,Invoice Number,Number,No.")
_DATES: Final = words.listed("Date,Invoice Date,DATE,Date of issue,INVOICE DATE,Issued,Inv. Date")
_DUES: Final = words.listed("Due Date,Payment due,DUE DATE,Due,Pay by,Due on")
_OTHERS: Final = words.listed(
    "Order No,P.O. Number,Customer ID,Account,Terms,Salesperson,Ship via,Reference,Your ref,Project,D/O No,Contract"
)
_TERMS: Final = words.listed("30 days,14 DAYS,Net 30,COD,Cash,60 days net,Immediate")
_CUSTOMERS: Final = words.listed("Bill to,BILL TO,To,Customer,Sold to,Invoice to,SHIP TO,Messrs")
_SUBTOTALS: Final = words.listed("Subtotal,SUBTOTAL,Sub Total,Sub-total,Net subtotal")
_TAXES: Final = words.listed("Tax {}%,GST {}%,VAT {}%,SALES TAX ({}%),Tax ({}%),SST @ {}%")
_TOTALS: Final = words.listed("TOTAL,Total,Total due,AMOUNT DUE,Grand Total,Balance due,TOTAL AMOUNT,Total payable")
_NOTES: Final = words.listed(
    "Please pay within the stated time.,Make all cheques payable to the company.,Thank you for your business!,"
    "Interest is charged on overdue accounts.,Goods remain our property until paid in full.,"
    "Claims within seven days of delivery only.,This invoice is valid without signature."
)
_SUMS_ROWS: Final = 8
"""Rows that are kept for the sums."""
_PAD: Final = 0.012
"""Room at either side of a column of the table, as a share of the printed width."""
_NAME: Final = 0.25
"""Least width of the column of names, as a share of the printed width."""
_Field = Literal["number", "code", "name", "pieces", "price", "rate", "amount"]
_HEADS: Final[dict[_Field, tuple[str, ...]]] = {
    "number": ("No", "#", "Pos.", "Item"),
    "code": ("Code", "SKU", "Art. No", "Part No"),
    "name": ("Description", "DESCRIPTION", "Item description", "Particulars", "Product", "Service"),
    "pieces": ("Qty", "QTY", "Quantity", "Units", "Pcs"),
    "price": ("Unit Price", "Price", "U/PRICE", "Rate", "Unit cost"),
    "rate": ("Tax", "VAT", "GST"),
    "amount": ("Amount", "AMOUNT", "Line Total", "Total", "Net"),
}


@dataclass(frozen=True)
class _Column:
    """A column of the table of items; edges are shares of the printed width."""

    field: _Field
    head: str
    left: float
    right: float

    def cell(self, text: str) -> Cell:
        right = self.field in ("pieces", "price", "rate", "amount")
        return (text, "r", self.right - _PAD) if right else (text, "l", self.left + _PAD)


def draw_invoice(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return an invoice and its company, date, address and total."""
    width = rng.choice((640, 720, 800, 880))
    sheet = Sheet(rng, width=width, height=round(1.414 * width), columns=(64, 98), margin=(0.035, 0.1))
    sheet.y = width * rng.uniform(0.02, 0.09)
    sheet.leading = rng.uniform(1.15, 1.4)
    sheet.money = rng.choice(("{:.2f}", "{:,.2f}", "{:,.2f}", "${:,.2f}", "{:,.2f} EUR"))
    seller, where = words.company(rng), words.address(rng)
    when = words.day(rng)
    form = words.date_form(rng)
    day = words.dated(rng, when, form)
    due = words.dated(rng, when + timedelta(days=rng.choice((7, 14, 30, 60))), form)
    pairs = [(rng.choice(_NUMBERS), words.code(rng)), (rng.choice(_DATES), day)]
    if rng.random() < 0.8:
        pairs.append((rng.choice(_DUES), due))
    for name in rng.sample(_OTHERS, rng.randint(0, 3)):
        pairs.append((name, rng.choice(_TERMS) if name == "Terms" else words.code(rng)))
    if rng.random() < 0.2:
        rng.shuffle(pairs)
    _head(rng, sheet, [seller, *where], pairs)
    sheet.down(gap=rng.uniform(0, 1))
    room = int((sheet.rows_left - _SUMS_ROWS) / 1.7)  # a row of the table is higher, and some items take two
    bill = draw_bill(rng, count=max(1, min(round(rng.lognormvariate(1.6, 0.7)), room)))
    _table(rng, sheet, bill, _columns(rng, sheet, bill))
    _sums(rng, sheet, bill)
    _foot(rng, sheet, seller)
    if rng.random() < 0.7:
        sheet.y = sheet.strip.image.height
    return sheet, {"company": seller, "date": day, "address": " ".join(where), "total": f"{bill.total:.2f}"}


def _head(rng: Random, sheet: Sheet, seller: Sequence[str], pairs: list[Pair]) -> None:
    """Print title, seller, customer, numbers and dates in one of several arrangements."""
    title = rng.choice(_TITLES)
    contact = [
        f"{name}{sheet.colon} {words.phone(rng)}" for name in rng.sample(("Tel", "Fax", "Phone"), rng.randint(0, 2))
    ]
    if rng.random() < 0.5:
        contact.append(f"{rng.choice(('GST No', 'VAT ID', 'Tax ID', 'Reg. No'))}{sheet.colon} {words.code(rng)}")
    name = sheet.large(rng.uniform(1.1, 1.7)) if rng.random() < 0.6 else sheet.type
    customer = [f"{words.made_up(rng)} {words.made_up(rng)}".title(), *words.address(rng)]

    def sender(align: str = "l", place: float = 0.0) -> None:
        sheet.rows(seller[:1], name, align=align, place=place)
        sheet.rows([*seller[1:], *contact], align=align, place=place)

    def heading(align: str = "r", place: float = 1.0) -> None:
        sheet.row([(title, align, place)], sheet.large(rng.uniform(1.6, 2.6)))

    def numbers() -> None:
        _pairs(rng, sheet, pairs)

    def buyer() -> None:
        sheet.row([(f"{rng.choice(_CUSTOMERS)}{sheet.colon}", "l", 0.0)])
        sheet.rows(customer)

    kind = rng.randrange(4)
    if kind == 0:  # seller beside the title and the numbers

        def corner() -> None:
            heading()
            numbers()

        sheet.side_by_side((0.0, 0.55, sender), (0.6, 1.0, corner))
        sheet.down(gap=0.5)
        sheet.side_by_side((0.0, 0.6, buyer))
    elif kind == 1:  # a letterhead
        sender("c", 0.5)
        sheet.line(weight=rng.choice((1, 2)))
        heading(*rng.choice((("c", 0.5), ("l", 0.0), ("r", 1.0))))
        sheet.side_by_side((0.0, 0.52, buyer), (0.58, 1.0, numbers))
    elif kind == 2:  # the numbers as a row of a table
        sheet.side_by_side((0.0, 0.6, sender), (0.6, 1.0, heading))
        sheet.down(gap=0.5)
        sheet.side_by_side((0.0, 0.6, buyer))
        sheet.down(gap=0.5)
        _boxes(sheet, pairs)
    else:
        heading("l", 0.0)
        sheet.side_by_side((0.0, 0.6, sender), (0.62, 1.0, numbers))
        sheet.down(gap=0.7)
        sheet.side_by_side((0.0, 0.6, buyer))


def _pairs(rng: Random, sheet: Sheet, pairs: Sequence[Pair]) -> None:
    """Print labels and values, one pair a row."""
    style = rng.randrange(3)
    for label, value in pairs:
        named = f"{label}{sheet.colon}"
        if style == 0:
            sheet.rows([f"{named} {value}"])
        elif style == 1:
            sheet.row([(named, "l", 0.0), (value, "l", 0.5)])
        else:
            sheet.row([(named, "l", 0.0), (value, "r", 1.0)])


def _boxes(sheet: Sheet, pairs: Sequence[Pair]) -> None:
    """Print labels in a row of boxes, as many as have room, and their values below."""
    widest = max(sheet.type.width(text) for pair in pairs for text in pair)
    pairs = pairs[: max(1, min(4, int(sheet.wide / (widest + 2 * sheet.type.size))))]
    top, pad = sheet.y, 0.4 * sheet.type.size
    places = [at / len(pairs) + 0.012 for at in range(len(pairs))]
    for texts in ([label for label, _ in pairs], [value for _, value in pairs]):
        sheet.y += pad
        sheet.row([(text, "l", place) for text, place in zip(texts, places, strict=True)])
    sheet.y += pad
    for at in range(len(pairs)):
        x = sheet.left + at * sheet.wide / len(pairs)
        sheet.strip.draw.rectangle((x, top, x + sheet.wide / len(pairs), sheet.y), outline=0)


def _texts(bill: Bill, number: int, item: Item) -> dict[_Field, str]:
    return {
        "number": str(number),
        "code": item.code,
        "name": item.name,
        "pieces": str(item.pieces),
        "price": f"{item.price:,.2f}",
        "rate": f"{bill.rate}%",
        "amount": f"{item.amount:,.2f}",
    }


def _columns(rng: Random, sheet: Sheet, bill: Bill) -> list[_Column]:
    """Return the columns of a table of items, as wide as what stands in them; the names have the room that is left."""
    fields: list[_Field] = ["name", "pieces", "price", "amount"]
    if rng.random() < 0.25:
        fields[:2] = ["pieces", "name"]
    extra: list[tuple[_Field, float, int]] = [("rate", 0.15, -1), ("code", 0.35, 0), ("number", 0.35, 0)]
    for field, chance, at in extra:
        if rng.random() < chance:
            fields.insert(at, field)
    heads = {field: rng.choice(_HEADS[field]) for field in fields}
    rows = [_texts(bill, number, item) for number, item in enumerate(bill.items, 1)]
    wide: dict[_Field, float] = {
        field: max(sheet.type.width(text) for text in (heads[field], *(row[field] for row in rows))) / sheet.wide
        for field in fields
        if field != "name"
    }
    for field, _, _ in extra:
        if 1 - sum(wide.values()) - 2 * _PAD * len(fields) < _NAME and field in wide:
            fields.remove(field)
            del wide[field]
    left, columns = 0.0, []
    for field in fields:
        right = left + 2 * _PAD + wide.get(field, 1 - sum(wide.values()) - 2 * _PAD * len(fields))
        columns.append(_Column(field, heads[field], left, right))
        left = right
    return columns


def _table(rng: Random, sheet: Sheet, bill: Bill, columns: Sequence[_Column]) -> None:
    """Print the items, with or without lines between rows and columns."""
    grid, shade, between = rng.random() < 0.3, rng.random() < 0.35, rng.random() < 0.3
    pad = sheet.type.size * rng.uniform(0.2, 0.5)
    top = sheet.y
    tall = sheet.type.size * sheet.leading + 2 * pad
    if shade:
        sheet.strip.draw.rectangle((sheet.left, top, sheet.right, top + tall), fill=rng.randint(190, 235))
    sheet.y += pad
    sheet.row([column.cell(column.head) for column in columns])
    sheet.y = top + tall
    marks = [top, sheet.y]
    for number, item in enumerate(bill.items, 1):
        sheet.y += pad
        _item(sheet, bill, columns, number, item)
        sheet.y += pad * 0.3
        marks += [sheet.y] * (between or item is bill.items[-1])
    for y in marks if grid or between or not shade else marks[-1:]:
        sheet.strip.draw.line((sheet.left, y, sheet.right, y), fill=0)
    if grid:
        for share in (0.0, *(column.right for column in columns)):
            x = sheet.left + share * sheet.wide
            sheet.strip.draw.line((x, top, x, sheet.y), fill=0)
    sheet.down(gap=-0.6)


def _item(sheet: Sheet, bill: Bill, columns: Sequence[_Column], number: int, item: Item) -> None:
    """Print an item; a long name goes on in a second row."""
    (name,) = (column for column in columns if column.field == "name")
    names = broken(item.name, sheet.type, (name.right - name.left - 2 * _PAD) * sheet.wide) or [""]
    texts = _texts(bill, number, item) | {"name": names[0]}
    sheet.row([column.cell(texts[column.field]) for column in columns])
    for more in names[1:2]:
        sheet.row([name.cell(more)])


def _sums(rng: Random, sheet: Sheet, bill: Bill) -> None:
    """Print what is added to the items and taken off, and the total."""
    sheet.down(gap=-0.5)
    rows: list[Pair] = [(rng.choice(_SUBTOTALS), sheet.money.format(bill.subtotal))]
    if bill.off:
        rows.append((rng.choice(("Discount", "DISCOUNT", "Less discount")), sheet.money.format(-bill.off)))
    if bill.shipping:
        rows.append((rng.choice(("Shipping", "Delivery", "Freight")), sheet.money.format(bill.shipping)))
    if bill.rate:
        rows.append((rng.choice(_TAXES).format(bill.rate), sheet.money.format(bill.tax)))
    total: Pair = (rng.choice(_TOTALS), sheet.money.format(bill.total))
    bold: Type = rng.choice((sheet.type, sheet.type, sheet.large(1.3)))
    needed = max(sheet.type.width(f"{label}{sheet.colon}  {value}") for label, value in rows)
    needed = max(needed, bold.width(f"{total[0]}{sheet.colon}  {total[1]}")) / 0.9 / sheet.wide

    def fill() -> None:
        for label, value in rows:
            sheet.row([(f"{label}{sheet.colon}", "l", 0.0), (value, "r", 1.0)])
        if rng.random() < 0.6:
            sheet.y += 0.2 * sheet.type.size
            sheet.line(weight=rng.choice((1, 2)))
        sheet.row([(f"{total[0]}{sheet.colon}", "l", 0.0), (total[1], "r", 1.0)], bold)

    right = 1 - _PAD
    sheet.side_by_side((max(0.0, min(rng.choice((0.5, 0.55, 0.6)), right - needed)), right, fill))


def _foot(rng: Random, sheet: Sheet, seller: str) -> None:
    """Print how to pay, notes and the number of the page."""
    sheet.down(gap=rng.uniform(0, 2))
    if rng.random() < 0.5:
        sheet.row([(rng.choice(("Payment details", "BANK DETAILS", "Remittance")), "l", 0.0)])
        labels = rng.sample(("Bank", "Account No", "IBAN", "SWIFT", "Branch", "Sort code"), rng.randint(1, 3))
        sheet.side_by_side((0.0, 0.5, lambda: _pairs(rng, sheet, [(label, words.code(rng)) for label in labels])))
    for note in rng.sample(_NOTES, rng.randint(0, 2)):
        sheet.rows([note], replace(sheet.type, size=max(9, round(0.9 * sheet.type.size))), align="l")
    if rng.random() < 0.3:
        sheet.row([("Authorised signature", "r", 1.0)])
    if rng.random() < 0.4:
        sheet.row([(f"{seller} - page 1 of 1", "c", 0.5)])
