"""Which option a reply chooses: hedges, denials, languages, and letters that are something else."""

from __future__ import annotations

from qzoom_agent.evaluation.scorers.letters import choice
from tests.cases import each_case

COLOURS = ("red", "blue", "green", "black")
REPLIES = (
    ("A. red - no\nB. blue - yes", None),
    ("A. red\nB. blue\n\nAnswer: B", "B"),
    ("B. blue\nThe van is blue.", "B"),
    ("The answer isn't B", None),
    ("B isn't correct", None),
    ("B is not right, C is", "C"),
    ("\u4e0d\u662fB", None),
    ("\u7b54\u6848\u4e0d\u662fB", None),
    ("\u7b54\u6848\u662fC\uff0c\u4e0d\u662fB", "C"),
    ("B\u4e0d\u5bf9\uff0c\u9009C", "C"),
    ("La respuesta es B.", "B"),
    ("La respuesta no es B", None),
    ("Antwort: B", "B"),
    ("Die richtige Antwort ist C.", "C"),
    ("r\xe9ponse B", "B"),
    ("La r\xe9ponse est D.", "D"),
    ("Ce n'est pas B", None),
    ("\u7b54\u3048\u306fB\u3067\u3059", "B"),
    ("B\u3067\u306f\u3042\u308a\u307e\u305b\u3093", None),
    ("\u6b63\u89e3\u306fC\u3067\u3059\u3002", "C"),
    ("A resposta \xe9 C", "C"),
    ("La risposta \xe8 D", "D"),
    ("\u041e\u0442\u0432\u0435\u0442: B", "B"),
    ("\u041f\u0440\u0430\u0432\u0438\u043b\u044c\u043d\u044b\u0439 \u043e\u0442\u0432\u0435\u0442 \u2014 C", "C"),
    ("\uc815\ub2f5\uc740 B\uc785\ub2c8\ub2e4", "B"),
    ("It is either B or C", None),
    ("Neither B nor C", None),
    ("None of the above", None),
    ("B, C", None),
    ("A and D are both correct", None),
    ("not B but C", "C"),
    ("B, not C", "B"),
    ("Not A, B or C. It is D", "D"),
    ("A, B and C are wrong, so D", "D"),
    ("Definitely C", "C"),
    ("A cat sits there", None),
    ("A man holds it, so (D)", "D"),
    ("I choose C.", "C"),
    ("I think it is B", "B"),
    ("B?", "B"),
    ("**B**", "B"),
    ("**B. blue**", "B"),
    ("(b)", "B"),
    ("b) blue", "B"),
    ("B. red", None),
    ("(C) green", "C"),
    ('{"answer": "B. blue"}', "B"),
    ("{'answer': 'D'}", "D"),
    ('```json\n{"reasoning": "It could be A", "answer": "D"}\n```', "D"),
    ("<think>A or B? I say (A)", None),
    ("<think>hm</think>", None),
    ("Reasoning B </think> C", "C"),
    ("<answer>B</answer><answer>C", "B"),
    ("The answer is B or C", None),
    ("The answer is B. Or maybe C.", None),
    ("the answer is b", "B"),
    ("option b", "B"),
    ("Option B is incorrect.", None),
    ("I rule out B", None),
    ("anything but B", None),
    ("Everything except B", None),
    ("It is blue.", "B"),
    ("blue or green", None),
    ("It isn't blue", None),
    ("It's not blue but green", "C"),
    ("The car is blue, not red.", "B"),
    ("The answer is not green", None),
    ("\u7b54\u6848\uff1a\uff23", "C"),
    ("\uff08B\uff09", "B"),
    ("\u24b7", "B"),
    ("\u9009\u9879B", "B"),
    ("\u6545\u9009\uff1aD", "D"),
    ("B\u548cC\u90fd\u5bf9", None),
    ("A\u6216B", None),
    ("A o B", None),
    ("Entweder A oder B", None),
    ("nicht B", None),
    ("La opci\xf3n B es correcta", "B"),
    ("La opci\xf3n B es incorrecta", None),
    ("Option B ist falsch", None),
    ("The correct answer: **C**", "C"),
    ("Final answer: C", "C"),
    ("### Answer\nC", "C"),
    ("\\boxed{B}", "B"),
    ("$\\boxed{\\text{C}}$", "C"),
    ("<|begin_of_box|>D<|end_of_box|>", "D"),
    ("The answer is:\nB", "B"),
    ("The best choice would be (D).", "D"),
    ("I'd go with C", "C"),
    ("It could be A. Therefore the answer is B.", "B"),
    ("E", None),
    ("", None),
    ("I cannot tell.", None),
    ("A", "A"),
    ("A.", "A"),
    ("A is right", "A"),
    ("A because it is red", "A"),
    ("So the answer must be A", "A"),
    ("B is the blue one", "B"),
    ("It's B!", "B"),
    ("Between A and B, I choose B", "B"),
    ("Both", None),
    ("All of them", None),
    ("B or not B", None),
    ("I am not sure, B", "B"),
    ("I'm not certain but B", "B"),
    ("Vitamin C", "C"),
    ("There is no blue", None),
    ("it looks blue to me", "B"),
    ("blue/green", None),
    ("(A) or B", None),
    ("A/B", None),
    ("A&B", None),
    ("B > A", None),
    ("B (not C)", "B"),
    ("The answer is B (blue)", "B"),
    ("La respuesta correcta es la B", "B"),
    ("Respuesta: C", "C"),
    ("C'est B", "B"),
    ("C'est la r\xe9ponse D.", "D"),
    ("Je choisis C", "C"),
    ("Ich w\xe4hle C", "C"),
    ("Es ist nicht B, sondern C", "C"),
    ("No es B sino C", "C"),
    ("B \u3067\u3057\u3087\u3046", "B"),
    ("B\u3060\u3068\u601d\u3044\u307e\u3059", "B"),
    ("B\u4ee5\u5916", None),
    ("\u0110\xe1p \xe1n l\xe0 C", "C"),
    ("\u0627\u0644\u0625\u062c\u0627\u0628\u0629 \u0647\u064a B", "B"),
    ("B de\u011fil", None),
    ("The answer is B, since A is too small", "B"),
    ("N/A", None),
    ("B+", None),
    ("Answer: (C) green", "C"),
    ("Answer - C", "C"),
    ("C - green", "C"),
    ("C: green", "C"),
    ("The answer can't be B", None),
    ("It can't be B", None),
    ("B can't be it", None),
    ("It cannot be B", None),
    ("B doesn't match", None),
    ("Definitely not B", None),
    ("No, B", "B"),
    ("It is B, isn't it?", "B"),
    ("Option A", "A"),
    ("the letter is D", "D"),
    ("D it is", "D"),
    ("I don't think it's B", None),
    ("B is wrong; C", "C"),
    ("I would say C, as B is wrong.", "C"),
    ("B is correct.", "B"),
    ("The option C is correct", "C"),
    ("The correct option is D as seen in the crop", "D"),
    ("A or B", None),
    ("Both B and C", None),
    ("The answer is not A. It is B.", "B"),
)
TEXTS = (
    (
        (
            "-5 \xb0C",
            "5 \xb0C",
        ),
        "-5 \xb0C",
        "A",
    ),
    (
        (
            "-5 \xb0C",
            "5 \xb0C",
        ),
        "It shows -5 \xb0C.",
        "A",
    ),
    (
        (
            "5 A",
            "10 A",
        ),
        "10 A",
        "B",
    ),
    (
        (
            "5 A",
            "10 A",
        ),
        "A",
        "A",
    ),
    (
        (
            "Gate A",
            "Gate B",
        ),
        "It says Gate B",
        "B",
    ),
    (
        (
            "<5",
            "5",
            ">5",
        ),
        ">5",
        "C",
    ),
    (
        (
            "<5",
            "5",
            ">5",
        ),
        "The value is <5",
        "A",
    ),
    (
        (
            "1/2",
            "12",
        ),
        "It is 1/2",
        "A",
    ),
    (
        (
            "A+",
            "A-",
            "A",
        ),
        "A-",
        "B",
    ),
    (
        (
            "A+",
            "B+",
        ),
        "The grade is A+.",
        "A",
    ),
    (
        (
            "red",
            "dark red",
        ),
        "It is dark red",
        "B",
    ),
    (
        (
            "yes",
            "no",
        ),
        "No, there is no dog",
        "B",
    ),
    (
        (
            "Yes",
            "No",
        ),
        "Yes, there is no car.",
        "A",
    ),
    (
        (
            "Yes",
            "No",
        ),
        "No.",
        "B",
    ),
    (
        (
            "visible",
            "not visible",
        ),
        "It is not visible",
        "B",
    ),
    (
        (
            "visible",
            "not visible",
        ),
        "not visible",
        "B",
    ),
    (
        (
            "10",
            "10-20",
        ),
        "10-20",
        "B",
    ),
    (
        (
            "10",
            "10-20",
        ),
        "The range is 10-20",
        "B",
    ),
    (
        (
            "5%",
            "5",
        ),
        "5%",
        "A",
    ),
    (
        (
            "$5",
            "\u20ac5",
        ),
        "\u20ac5",
        "B",
    ),
    (
        (
            "Vitamin A",
            "Vitamin C",
        ),
        "It contains Vitamin C.",
        "B",
    ),
    (
        (
            "C++",
            "C",
            "Java",
        ),
        "The language is C++",
        "A",
    ),
    (
        (
            "C++",
            "C",
            "Java",
        ),
        "It is Java",
        "C",
    ),
    (
        (
            "\u7ea2\u8272",
            "\u84dd\u8272",
        ),
        "\u8f66\u662f\u84dd\u8272\u7684",
        "B",
    ),
    (
        (
            "\u7ea2\u8272",
            "\u84dd\u8272",
        ),
        "\u4e0d\u662f\u84dd\u8272",
        None,
    ),
    (
        (
            "\u5de6",
            "\u53f3",
        ),
        "\u5728\u5de6\u8fb9",
        "A",
    ),
    (
        (
            "3 m",
            "3 mm",
        ),
        "3 mm",
        "B",
    ),
    (
        (
            "8 a.m.",
            "8 p.m.",
        ),
        "It opens at 8 p.m.",
        "B",
    ),
    (
        (
            "None of the above",
            "red",
        ),
        "None of the above",
        "A",
    ),
    (
        (
            "The left one",
            "The right one",
        ),
        "left one",
        "A",
    ),
    (
        (
            "-1",
            "1",
        ),
        "-1",
        "A",
    ),
    (
        (
            "-1",
            "1",
        ),
        "1",
        "B",
    ),
    (
        (
            "1,5",
            "15",
        ),
        "1.5",
        "A",
    ),
    (
        (
            "yes",
            "Yes",
        ),
        "YES",
        None,
    ),
    (
        (
            "A",
            "B",
            "C",
        ),
        "B",
        "B",
    ),
    (
        (
            "\xb0C",
            "\xb0F",
        ),
        "\xb0C",
        "A",
    ),
    (
        (
            "A. Smith",
            "B. Jones",
        ),
        "A. Smith",
        "A",
    ),
    (
        (
            "50",
            "50%",
        ),
        "50%",
        "B",
    ),
    (
        (
            "3:00",
            "3:30",
        ),
        "at 3:30",
        "B",
    ),
    (
        (
            "12 kg",
            "12 g",
        ),
        "12 g",
        "B",
    ),
    (
        (
            "Terminal B",
            "Terminal C",
        ),
        "(B) Terminal C",
        "B",
    ),
    (
        (
            "5",
            "10",
        ),
        "The answer is 10 kg",
        "B",
    ),
)


@each_case(("reply", "letter"), REPLIES)
def test_letter(reply: str, letter: str | None) -> None:
    assert choice(reply, COLOURS) == letter


@each_case(("options", "reply", "letter"), TEXTS)
def test_texts_of_options(options: tuple[str, ...], reply: str, letter: str | None) -> None:
    assert choice(reply, options) == letter


@each_case(
    ("reply", "letter"),
    [
        ("गाड़ी का नीला रंग है", "B"),
        ("लाल नहीं, नीला", "B"),
        ("नीलाम", None),
        ("नीली", None),
    ],
)
def test_vowel_signs_belong_to_their_word(reply: str, letter: str | None) -> None:
    assert choice(reply, ("लाल", "नीला", "हरा")) == letter


@each_case(("reply", "letter"), [("AではなくBです", "B"), ("排除A和C\uff0c选B", "B"), ("不选A\uff0c选项B也不对", None)])
def test_what_is_denied_in_east_asian_replies_is_not_chosen(reply: str, letter: str | None) -> None:
    assert choice(reply, ("x", "y", "z")) == letter
