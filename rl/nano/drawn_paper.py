"""Receipts, invoices and labels drawn for volume, with the place of every character and the fields as ground truth.

A page comes from one seed: words (`words.py`) are set on a strip (`printer.py`), which is then worn and scanned
(`scan.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

from nano import words
from nano.paper import Line, Paper, transcribed
from nano.printer import Strip, Type, pick_type
from nano.scan import scanned

_TITLES: Final = words.listed(
    "TAX INVOICE,CASH RECEIPT,Receipt,INVOICE,CASH SALES,Simplified Tax Invoice,CASH BILL,OFFICIAL RECEIPT,BILL"
)
_DATES: Final = words.listed("Date,DATE,Invoice Date,Date/Time,Bill Date,DT,Trans Date,Printed on")
LABELS: Final = words.listed(
    "Invoice No,INV NO.,Bill No,Receipt #,Doc No.,Trans No,GST ID,GST Reg No,Tel,Fax,Reg No,Table,Pump,Ref,Order,"
    "Cashier,Counter,Terminal,Till,Member,Card No,Approval Code,Batch,Slip,Pax,Shift,Staff,Salesperson,Customer,A/C,"
    "Check,Room"
)
_TOTALS: Final = words.listed(
    "TOTAL,Total,Grand Total,TOTAL AMOUNT,Total Sales,Nett Total,AMOUNT DUE,Total (RM),Total Incl. GST,TOTAL RM,"
    "Total Payable,Balance Due,Net Total,TOTAL SALES (INCLUSIVE GST)"
)
_PAYMENTS: Final = words.listed("CASH,Cash,VISA,MASTERCARD,Tendered,Paid,Payment,Credit Card,CASH TENDERED")
_BEFORE: Final = words.listed(
    "Sub Total,SUBTOTAL,Total Excl. GST,Discount,Service Charge 10%,Rounding,Rounding Adj,GST 6%,Tax 6%,Item Disc"
)
_HEADS: Final = (
    ("Item", "Qty", "Price", "Amount"),
    ("Description", "Qty", "U.Price", "Total"),
    ("QTY", "DESC", "PRICE", "AMT"),
    ("CODE", "QTY", "RM", "RM"),
    ("ITEM", "QTY", "S/PRICE", "AMOUNT"),
)


class _Sheet:
    """A strip with a cursor: rows are set one below the other."""

    def __init__(self, rng: Random, *, width: int, height: int) -> None:
        self.rng, self.width = rng, width
        self.strip = Strip(width, height)
        self.type = pick_type(rng, width=width)
        self.left = width * rng.uniform(0.01, 0.08)
        self.right = width * rng.uniform(0.92, 0.99)
        self.leading = rng.uniform(1.15, 1.7)
        self.y = rng.uniform(8, 60)
        self.money = rng.choice(
            ("{:.2f}", "{:.2f}", "{:.2f}", "{:,.2f}", "RM{:.2f}", "RM {:.2f}", "${:.2f}", "{:.2f} SR")
        )
        self.colon = rng.choice((":", " :", "", ": ", ":"))

    @property
    def full(self) -> bool:
        return self.y > self.strip.image.height - 6 * self.type.size

    def down(self, type_: Type | None = None, *, gap: float = 0.0) -> None:
        size = (type_ or self.type).size * (type_ or self.type).stretch[1]
        self.y += size * self.leading + gap * self.type.size

    def row(self, cells: Sequence[tuple[str, str, float]], type_: Type | None = None) -> None:
        """Print cells of (text, alignment, place): "l", "r" or "c", at a share of the printed width.

        What there is no room for is left out.
        """
        set_in = type_ or self.type
        if sum(set_in.width(text) for text, _, _ in cells) > 0.9 * (self.right - self.left):
            set_in = self.type
        end = -1.0
        for text, align, place in cells:
            text = text.strip()
            while text and set_in.width(text) > self.right - self.left:
                text = text[:-1].strip()
            if not text or self.full:
                continue
            width = set_in.width(text)
            x = self.left + place * (self.right - self.left)
            x -= {"l": 0.0, "r": width, "c": width / 2}[align]
            x = min(max(x, 1.0, end + 0.8 * set_in.size), self.width - 2 - width)
            if x < end + 0.4 * set_in.size:
                continue
            self.strip.put(text, set_in, x=x, y=self.y)
            end = x + width
        self.down(set_in)

    def rule(self) -> None:
        if self.rng.random() < 0.6:
            self.strip.rule(round(self.y + 0.1 * self.type.size), self.rng, self.type)
            self.y += 0.6 * self.type.size

    def emphasis(self, chance: float) -> Type:
        """Return a larger type, at a chance."""
        if self.rng.random() > chance:
            return self.type
        return self.type.scaled(*self.rng.choice(((1, 2), (2, 1), (2, 2))))


def _receipt(rng: Random, sheet: _Sheet) -> dict[str, str]:
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
        sheet.row([(f"{rng.choice(LABELS)}{sheet.colon} {rng.choice((words.code, words.phone))(rng)}", align, place)])
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
    return {"company": name, "date": day, "address": " ".join(where), "total": paid}


def _meta(rng: Random, sheet: _Sheet, day: str) -> None:
    """Print rows of labels and values; one of them is the date."""
    values: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 6)):
        value = rng.choice((words.code, words.code, words.made_up, words.clock, words.noise))(rng)
        values.append((rng.choice(LABELS), value))
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


def _goods(rng: Random, sheet: _Sheet) -> float:
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
        if sheet.full:
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


def _sums(rng: Random, sheet: _Sheet, total: float) -> str:
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


def _dense_page(rng: Random, sheet: _Sheet) -> dict[str, str]:
    """Print lines of everything, close together: most characters for the least paper."""
    makers: list[Callable[[Random], str]] = [
        words.item,
        words.company,
        words.code,
        words.noise,
        words.phone,
        words.foot,
        words.clock,
        lambda rng: words.dated(rng, words.day(rng)),
        lambda rng: sheet.money.format(words.amount(rng, 9000)),
        lambda rng: words.address(rng)[0],
    ]
    while not sheet.full:
        if rng.random() < 0.25:
            sheet.type = pick_type(rng, width=sheet.width)
        set_in = sheet.emphasis(0.1)
        cells, place = [], 0.0
        while place < 0.9:
            text = rng.choice(makers)(rng)
            cells.append((text, "l", place))
            place += set_in.width(text) / sheet.width + rng.uniform(0.03, 0.2)
        sheet.row(cells, set_in)
    return {}


def draw_paper(seed: int) -> Paper:
    """Draw the page of this seed: a receipt, or (half of them) a page of unrelated lines."""
    rng = Random(f"paper/{seed}")
    width = rng.choice((360, 384, 420, 480, 512, 576, 576, 640))
    dense = rng.random() < 0.5
    height = round(width * (rng.uniform(0.8, 1.6) if dense else rng.uniform(1.6, 3.2)))
    sheet = _Sheet(rng, width=width, height=height)
    fields = _dense_page(rng, sheet) if dense else _receipt(rng, sheet)
    bottom = min(height, round(sheet.y + rng.uniform(10, 80)))
    image = sheet.strip.image.crop((0, 0, width, bottom))
    lines = [line for line in sheet.strip.lines if line.text.strip() and line.box[3] < bottom]
    return scanned(rng, Paper(image, tuple(lines), _printed(fields, lines), name=f"drawn/{seed}"))


def _printed(fields: Mapping[str, str], lines: Sequence[Line]) -> dict[str, str]:
    """Return the fields that stand on the page whole: a strip may be too narrow or too short for some."""
    found = transcribed(" ".join(line.text for line in lines)).replace(",", "")
    known = {name: transcribed(value) for name, value in fields.items()}
    return {name: value for name, value in known.items() if value and value.replace(",", "") in found}
