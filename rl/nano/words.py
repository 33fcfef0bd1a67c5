"""The words of drawn paper: shops, streets, goods, dates, amounts and codes, put together from short lists.

Half of the words are made up from syllables, so that print is read and not guessed from a vocabulary.
"""

from datetime import date, timedelta
from random import Random
from typing import Final


def listed(text: str) -> tuple[str, ...]:
    """Return the parts of a text between commas."""
    return tuple(text.split(","))


_ONSETS: Final = listed("b,c,d,f,g,h,j,k,l,m,n,p,qu,r,s,t,v,w,x,y,z,br,ch,dr,kl,ng,pr,sh,sr,st,th,tr")
_VOWELS: Final = listed("a,e,i,o,u,ai,au,ea,ee,ia,oo,ou")
_ENDS: Final = listed(",,,n,r,s,t,l,ng,h,k,m,d,x")
_LEGAL: Final = listed(
    "Sdn Bhd,SDN. BHD.,Sdn. Bhd.,(M) Sdn Bhd,Enterprise,Trading,Ltd,Inc.,& Co.,GmbH,LLC,Bros,Store,Mart,Hardware,"
    "Restaurant,Cafe,Bakery,Pharmacy,Supermarket,Stationery,Electrical,Motors,Books,Kitchen,Services,Holdings,Group"
)
_WAYS: Final = listed(
    "Jalan,Jln,Lorong,Persiaran,Lebuh,Taman,Street,St.,Road,Rd,Avenue,Ave,Lane,Drive,Square,Plaza,Park,Bandar,Kampung,"
    "Seksyen,Lot,Block,Unit,Level,Ground Floor,1st Floor,Building,Mall,Centre,Complex,Desa,Pusat,Bukit,Sungai"
)
_STATES: Final = listed(
    "Selangor,Johor,Kuala Lumpur,Penang,Perak,Melaka,W.P.,Singapore,Malaysia,London,Texas,California,Berlin,Sydney"
)
_GOODS: Final = listed(
    "milk,bread,rice,egg,chicken,fish,beef,noodle,soup,tea,coffee,ice,juice,water,cola,orange,apple,banana,sugar,salt,"
    "oil,soap,tissue,paper,pen,file,book,glue,tape,nail,screw,paint,brush,bulb,cable,plug,battery,hose,valve,pipe,"
    "cement,tile,lock,key,bag,box,cup,plate,bowl,spoon,fork,knife,cake,bun,roti,nasi,mee,kopi,teh,ayam,ikan,sayur,"
    "diesel,petrol,parking,ticket,service,delivery,large,small,hot,cold,fresh,white,black,red,blue,green,special,set,"
    "pack,bottle,can,sheet,roll,pair,steel,wood,plastic,cotton,shirt,shoe,towel,toy,clay,card,stamp,photo,copy"
)
LABELS: Final = listed(
    "Invoice No,INV NO.,Bill No,Receipt #,Doc No.,Trans No,GST ID,GST Reg No,Tel,Fax,Reg No,Table,Pump,Ref,Order,"
    "Cashier,Counter,Terminal,Till,Member,Card No,Approval Code,Batch,Slip,Pax,Shift,Staff,Salesperson,Customer,A/C,"
    "Check,Room"
)
_FOOT: Final = listed(
    "Thank you,THANK YOU,Please come again,Goods sold are not returnable,NO REFUND,Have a nice day,Customer copy,"
    "This is a computer generated receipt,Keep this receipt for exchange within 7 days,Terima kasih,Sila datang lagi,"
    "All prices inclusive of GST,Items exchanged with original receipt only,Powered by,Follow us on,Welcome,"
    "E. & O.E.,CASHIER COPY,Signature not required,Thank you for shopping with us,Wifi password"
)
MONTHS: Final = listed("Jan,Feb,Mar,Apr,May,Jun,Jul,Aug,Sep,Oct,Nov,Dec")
DATE_FORMS: Final = (
    ("{d:02}/{m:02}/{y}", 30),
    ("{d:02}-{m:02}-{y}", 12),
    ("{d:02}/{m:02}/{yy:02}", 10),
    ("{d:02}-{m:02}-{yy:02}", 5),
    ("{d}/{m}/{y}", 8),
    ("{y}-{m:02}-{d:02}", 6),
    ("{d:02} {mon} {y}", 6),
    ("{d:02}-{mon}-{y}", 4),
    ("{d:02}/{mon}/{y}", 3),
    ("{mon} {d:02}, {y}", 3),
    ("{d:02}.{m:02}.{y}", 4),
    ("{d:02}.{m:02}.{yy:02}", 2),
)
_CODE_FORMS: Final = (
    "#######",
    "######",
    "##########",
    "@@####",
    "@#######",
    "##-####",
    "@@-######",
    "####-@@@-##",
    "#@#@##",
)


def made_up(rng: Random) -> str:
    """Return a word of one to three syllables that nobody knows."""
    count = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_ENDS)


def cased(rng: Random, text: str) -> str:
    """Return `text` in capitals, in title case, or as it is."""
    return rng.choices((text.upper(), text.title(), text), weights=(5, 4, 1))[0]


def code(rng: Random) -> str:
    """Return a number of a document, an article or a member."""
    form = rng.choice(_CODE_FORMS)
    fill = {"#": "0123456789", "@": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    return "".join(rng.choice(fill[char]) if char in fill else char for char in form)


def noise(rng: Random) -> str:
    """Return random print: every character of the alphabet has to be read somewhere."""
    chars = rng.choice(
        (
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
            "abcdefghijklmnopqrstuvwxyz",
            "0123456789.,-/:",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789#$%&'()*+,-./:;=?@[]_!\"<>",
        )
    )
    return "".join(rng.choice(chars) for _ in range(rng.randint(2, 12)))


def company(rng: Random) -> str:
    words = [made_up(rng) if rng.random() < 0.75 else rng.choice(_GOODS) for _ in range(rng.randint(1, 3))]
    return cased(rng, " ".join(words).title()) + " " + rng.choice(_LEGAL)


def address(rng: Random) -> list[str]:
    """Return an address in two to four lines."""
    way = f"{rng.choice(_WAYS)} {made_up(rng).title()}"
    lines = [
        f"{rng.choice(('No.', 'No ', '', 'Lot ', '#'))}{rng.randint(1, 399)}{rng.choice(('', 'A', '-1', '&3'))}, {way}"
    ]
    if rng.random() < 0.7:
        lines.append(f"{rng.choice(_WAYS)} {made_up(rng).title()} {rng.choice(('', str(rng.randint(1, 40))))}".strip())
    lines.append(f"{rng.randint(10000, 99999)} {made_up(rng).title()}")
    if rng.random() < 0.6:
        lines.append(rng.choice(_STATES))
    comma = rng.random() < 0.8
    lines = [line + ("," if comma and at < len(lines) - 1 else "") for at, line in enumerate(lines)]
    return [line.upper() for line in lines] if rng.random() < 0.6 else lines


def item(rng: Random) -> str:
    words = [rng.choice(_GOODS) if rng.random() < 0.5 else made_up(rng) for _ in range(rng.randint(1, 4))]
    size = rng.choice(("", "", "", f" {rng.randint(1, 900)}{rng.choice(('G', 'ML', 'KG', 'CM', 'PCS', 'L', 'X'))}"))
    return cased(rng, " ".join(words)) + size


def amount(rng: Random, most: float = 400.0) -> float:
    value: float = rng.uniform(0.5, most) ** rng.choice((0.5, 0.8, 1.0))
    return round(value * 20) / 20 if rng.random() < 0.6 else round(value, 2)


def day(rng: Random) -> date:
    return date(2012, 1, 1) + timedelta(days=rng.randrange(5200))


def date_form(rng: Random) -> str:
    """Return a form of dates, to print several alike."""
    return rng.choices([form for form, _ in DATE_FORMS], weights=[weight for _, weight in DATE_FORMS])[0]


def dated(rng: Random, when: date, form: str | None = None) -> str:
    """Return a date as shops print it, in a form of `date_form`."""
    form = date_form(rng) if form is None else form
    month = MONTHS[when.month - 1]
    month = month.upper() if rng.random() < 0.5 else month
    return form.format(d=when.day, m=when.month, y=when.year, yy=when.year % 100, mon=month)


def clock(rng: Random) -> str:
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    form = rng.choice(("{h:02}:{m:02}", "{h:02}:{m:02}:{s:02}", "{t}:{m:02} {p}", "{t:02}:{m:02}:{s:02}{p}"))
    return form.format(h=hour, m=minute, s=second, t=hour % 12 or 12, p="AM" if hour < 12 else "PM")


def phone(rng: Random) -> str:
    form = rng.choice(("0#-#######", "0#-####-####", "(0#)### ####", "+60#-#######", "0##-####### ", "### ### ####"))
    return "".join(str(rng.randrange(10)) if char == "#" else char for char in form).strip()


def foot(rng: Random) -> str:
    return rng.choice(_FOOT)
