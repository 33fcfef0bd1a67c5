"""Receipts of shops, short and long, on a narrow strip."""

from random import Random
from typing import Final

from nano import words
from nano.sheet import Sheet

_TITLES: Final = words.listed(
    "TAX INVOICE,CASH RECEIPT,Receipt,INVOICE,CASH SALES,Simplified Tax Invoice,CASH BILL,OFFICIAL RECEIPT,BILL"
)
_DATES: Final = words.listed("Date,DATE,Invoice Date,Date/Time,Bill Date,DT,Trans Date,Printed on")
_TOTALS: Final = words.listed(
    "TOTAL,Total,Grand Total,TOTAL AMOUNT,Total Sales,Nett Total,AMOUNT DUE,Total (RM),Total Incl. GST,TOTAL RM,"
    "Total Payable,Balance Due,Net Total,TOTAL SALES (INCLUSIVE GST)"
)
_PAYMENTS: Final = words.listed("CASH,Cash,VISA,MASTERCARD,Tendered,Paid,Payment,Credit Card,CASH TENDERED")
_BEFORE: Final = words.listed(
    "Sub Total,SUBTOTAL,Total Excl. GST,Discount,Service Charge 10%,Rounding,Rounding Adj,GST 6%,Tax 6%,Item Disc"
)
_SUMS_ROWS: Final = 10
"""Rows that are kept for the sums."""
_HEADS: Final = (
    ("Item", "Qty", "Price", "Amount"),
    ("Description", "Qty", "U.Price", "Total"),
    ("QTY", "DESC", "PRICE", "AMT"),
    ("CODE", "QTY", "RM", "RM"),
    ("ITEM", "QTY", "S/PRICE", "AMOUNT"),
)


def draw_receipt(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return a receipt and its company, date, address and total."""
    width = rng.choice((360, 384, 420, 480, 512, 576, 576, 640))
    rng.random()  # so that the seeds of `demo_receipt.LIKE_SCANS` give the pages that were chosen
    sheet = Sheet(rng, width=width, height=round(width * rng.uniform(1.6, 3.2)))
    align, place = rng.choices((("c", 0.5), ("l", 0.0)), weights=(8, 2))[0]
    name, where = words.company(rng), words.address(rng)
    if rng.random() < 0.1:
        sheet.row([(words.made_up(rng), "c", 0.5)], sheet.emphasis(0.9))
    sheet.row([(name, align, place)], sheet.emphasis(0.3))
    if rng.random() < 0.6:
        sheet.row([(rng.choice(("({})", "Co. Reg No: {}", "{}", "ROC NO {}")).format(words.code(rng)), align, place)])
    for line in where:
        sheet.row([(line, align, place)])
    for _ in range(rng.randint(0, 3)):
        label, value = rng.choice(words.LABELS), rng.choice((words.code, words.phone))(rng)
        sheet.row([(f"{label}{sheet.colon} {value}", align, place)])
    sheet.y += rng.uniform(0, 1.5) * sheet.type.size
    if rng.random() < 0.6:
        sheet.row([(rng.choice(_TITLES), "c", 0.5)], sheet.emphasis(0.3))
    when = words.day(rng)
    day = words.dated(rng, when)
    _meta(rng, sheet, day)
    sheet.rule()
    total = _goods(rng, sheet)
    sheet.rule()
    paid = _sums(rng, sheet, total)
    for _ in range(rng.randint(0, 5)):
        sheet.row([(words.foot(rng) if rng.random() < 0.7 else words.noise(rng), "c", 0.5)])
    sheet.y += rng.uniform(10, 80)
    return sheet, {"company": name, "date": day, "address": " ".join(where), "total": paid}


def _meta(rng: Random, sheet: Sheet, day: str) -> None:
    """Print rows of labels and values; one of them is the date."""
    values: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 6)):
        value = rng.choice((words.code, words.code, words.made_up, words.clock, words.noise))(rng)
        values.append((rng.choice(words.LABELS), value))
    label = rng.choice(_DATES) if rng.random() < 0.8 else ""
    moment = f"{day} {words.clock(rng)}" if rng.random() < 0.5 else day
    values.insert(rng.randrange(len(values) + 1), (label, moment))
    column = rng.uniform(0.25, 0.5)
    style = rng.random()
    while values:
        name, value = values.pop(0)
        if style < 0.3:
            sheet.row([(f"{name}{sheet.colon} {value}" if name else value, "l", 0.0)])
        elif style < 0.6:
            sheet.row([(name, "l", 0.0), (f"{sheet.colon}{value}", "l", column)])
        elif style < 0.8 and values:
            other, more = values.pop(0)
            sheet.row([(f"{name}{sheet.colon}{value}", "l", 0.0), (f"{other}{sheet.colon}{more}", "r", 1.0)])
        else:
            sheet.row([(name, "l", 0.0), (value, "r", 1.0)])


def _goods(rng: Random, sheet: Sheet) -> float:
    """Print what was bought and return its price."""
    form = rng.randrange(4)
    heads = rng.choice(_HEADS)
    places = (0.0, rng.uniform(0.45, 0.58), rng.uniform(0.66, 0.8), 1.0)
    if rng.random() < 0.6:
        sheet.row([(head, "l" if at == 0 else "r", places[at]) for at, head in enumerate(heads)])
        sheet.rule()
    total = 0.0
    count = max(1, round(rng.lognormvariate(1.2, 0.8)))
    for _ in range(min(count, 60)):
        if total and sheet.rows_left < _SUMS_ROWS:
            break
        pieces = rng.choice((1, 1, 1, 2, 3, rng.randint(1, 40)))
        price = words.amount(rng)
        cost = round(pieces * price, 2)
        total += cost
        name = words.item(rng) if rng.random() < 0.9 else words.noise(rng)
        numbers = [
            (str(pieces), "r", places[1]),
            (f"{price:.2f}", "r", places[2]),
            (sheet.money.format(cost), "r", 1.0),
        ]
        if form == 0:
            sheet.row([(name, "l", 0.0)])
            sheet.row([(words.code(rng), "l", 0.0), *numbers])
        elif form == 1:
            sheet.row([(name[:18], "l", 0.0), *numbers])
        elif form == 2:
            sheet.row([(f"{pieces} {name}", "l", 0.0), (sheet.money.format(cost), "r", 1.0)])
        else:
            sheet.row([(name, "l", 0.0)])
            times = rng.choice(("{} x {:.2f}", "{}X{:.2f}", "{} @ {:.2f}", "{} PCS * {:.2f}")).format(pieces, price)
            sheet.row([(times, "l", rng.uniform(0.05, 0.2)), (sheet.money.format(cost), "r", 1.0)])
    return round(total, 2)


def _sums(rng: Random, sheet: Sheet, total: float) -> str:
    """Print the sums and return the total."""
    place = rng.choice((0.0, 0.0, rng.uniform(0.2, 0.6)))
    align = "l" if place < 0.5 else "r"
    for name in rng.sample(_BEFORE, rng.randint(0, 4)):
        value = total if "otal" in name or "TOTAL" in name else words.amount(rng, 20)
        sheet.row([(f"{name}{sheet.colon}", align, place), (sheet.money.format(value), "r", 1.0)])
    if rng.random() < 0.3:
        sheet.rule()
    cells = [(f"{rng.choice(_TOTALS)}{sheet.colon}", align, place), (sheet.money.format(total), "r", 1.0)]
    sheet.row(cells, sheet.emphasis(0.35))
    if rng.random() < 0.8:
        paid = total if rng.random() < 0.4 else float(-(-total // 10) * 10)
        sheet.row([(rng.choice(_PAYMENTS), align, place), (sheet.money.format(paid), "r", 1.0)])
        sheet.row(
            [
                (rng.choice(("CHANGE", "Change", "Change Due")), align, place),
                (sheet.money.format(paid - total), "r", 1.0),
            ]
        )
    if rng.random() < 0.4:
        sheet.row([("GST Summary", "l", 0.0), ("Amount(RM)", "r", 0.7), ("Tax(RM)", "r", 1.0)])
        sheet.row([("SR @ 6%", "l", 0.0), (f"{total / 1.06:.2f}", "r", 0.7), (f"{total - total / 1.06:.2f}", "r", 1.0)])
    return f"{total:.2f}"
