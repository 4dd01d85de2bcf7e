"""What the site does to the pages: formulas are drawn, links out of the documentation are text.

Formulas are MathML, which browsers draw by themselves: no script, no fonts. Of LaTeX it knows what
the pages use; anything else is an error of the build, and a line here.
"""

import html
import posixpath
import re

FORMULA = re.compile(
    r"^( *)(?P<fence>```+).*?^\1(?P=fence)$"  # code stays as it is
    r"|(?P<ticks>`+).+?(?P=ticks)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?(?:\n[^$\n]+)?)\$(?!\w)",
    re.DOTALL | re.MULTILINE,
)
TOKEN = re.compile(r"\\([a-zA-Z]+|.)|(\d+(?:\.\d+)?)|(\s+)|(.)", re.DOTALL)
SYMBOLS = {
    **{"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ϵ", "varepsilon": "ε"},
    **{"eta": "η", "theta": "θ", "lambda": "λ", "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ"},
    **{"Sigma": "Σ", "ell": "ℓ", "partial": "∂", "nabla": "∇", "top": "⊤", "infty": "∞"},
}
OPERATORS = {
    **{"sim": "∼", "mid": "∣", "to": "→", "le": "≤", "ge": "≥", "circ": "∘", "cdot": "·"},
    **{"approx": "≈", "otimes": "⊗", "times": "×", "in": "∈", "pm": "±", "ldots": "…"},
    **{"lVert": "‖", "rVert": "‖", "langle": "⟨", "rangle": "⟩", "{": "{", "}": "}", "|": "‖"},
}
FUNCTIONS = {"log", "exp", "tanh", "min", "max", "arg", "det", "tr"}
SPACES = {",": 0.17, ":": 0.22, ";": 0.28, "!": -0.17, " ": 0.33, "quad": 1, "qquad": 2}
ALPHABETS = {"mathbb": {"E": "𝔼", "R": "ℝ"}, "mathcal": {"L": "ℒ", "N": "𝒩", "F": "ℱ"}}
ACCENTS = {"hat": "^", "bar": "¯", "overline": "‾", "tilde": "~"}
IGNORED = {"displaystyle", "textstyle", "limits"}


def space(name: str) -> str:
    return f'<mspace width="{SPACES[name]}em"></mspace>'


class Unknown(ValueError):
    """A command that is not in the tables above."""


class Parser:
    """From a formula to the inside of a `<math>` element, by recursive descent."""

    def __init__(self, formula: str) -> None:
        self.tokens = [
            ("\\" + command if command else number or rest)
            for command, number, space, rest in TOKEN.findall(formula)
            if not space
        ]
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def row(self, *ends: str) -> str:
        """All up to one of the tokens that end it, or up to the end."""
        parts = []
        while self.peek() and self.peek() not in ends:
            parts.append(self.scripted())
        return "".join(parts)

    def argument(self) -> str:
        """A group in braces, or a single token; of a number its first digit."""
        token = self.peek()
        if token[0].isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = token[0], token[1:]
        if token != "{":
            return self.atom()
        self.take()
        inside = self.row("}")
        self.take()
        return f"<mrow>{inside}</mrow>"

    def letters(self) -> str:
        """A group in braces as it is written."""
        self.take()
        end = self.tokens.index("}", self.at)
        text = "".join(self.tokens[self.at : end])
        self.at = end + 1
        return text

    def scripted(self) -> str:
        """An atom with what stands below and above of it."""
        base, below, above = self.atom(), "", ""
        large = "∑" in base or "<mi>min</mi>" in base
        while self.peek() and self.peek() in "_^'":
            mark = self.take()
            if mark == "_":
                below = self.argument()
            else:
                above += "<mo>′</mo>" if mark == "'" else self.argument()
        if above:
            above = f"<mrow>{above}</mrow>"
        under, over = ("munder", "mover") if large else ("msub", "msup")
        if below and above:
            both = "munderover" if large else "msubsup"
            return f"<{both}>{base}{below}{above}</{both}>"
        if below or above:
            tag = under if below else over
            return f"<{tag}>{base}{below or above}</{tag}>"
        return base

    def atom(self) -> str:
        token = self.peek()
        if token == "{":
            return self.argument()
        self.take()
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        fixed = ' stretchy="false"' if token in "()[]|/" else ""
        return f"<mo{fixed}>{html.escape({'-': '−', '*': '∗'}.get(token, token))}</mo>"

    def command(self, name: str) -> str:
        if name in SYMBOLS:
            return f"<mi>{SYMBOLS[name]}</mi>"
        if name in OPERATORS:
            return f"<mo>{OPERATORS[name]}</mo>"
        if name in FUNCTIONS:
            after = "" if self.peek() in ("(", "_") else space(",")
            return f"<mrow>{space(',')}<mi>{name}</mi>{after}</mrow>"
        if name in SPACES:
            return space(name)
        if name in ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo>{ACCENTS[name]}</mo></mover>'
        if name in ALPHABETS:
            letter = self.letters() if self.peek() == "{" else self.take()
            return f"<mi>{ALPHABETS[name][letter]}</mi>"
        if name in IGNORED:
            return ""
        if name == "sum":
            return "<mo>∑</mo>"
        if name in ("frac", "tfrac"):
            return f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name in ("text", "mathrm", "operatorname"):
            return f"<mtext>{self.letters()}</mtext>"
        if name in ("left", "right"):
            return f'<mo stretchy="true">{self.take()}</mo>'
        if name == "begin":
            return self.matrix(self.letters())
        raise Unknown(f"\\{name}")

    def matrix(self, environment: str) -> str:
        if environment != "pmatrix":
            raise Unknown(f"\\begin{{{environment}}}")
        rows: list[list[str]] = [[]]
        while True:
            cell = self.row("&", "\\\\", "\\end")
            rows[-1].append(f"<mtd>{cell}</mtd>")
            end = self.take()
            if end == "\\end":
                self.letters()
                break
            if end == "\\\\":
                rows.append([])
        table = "".join(f"<mtr>{''.join(row)}</mtr>" for row in rows)
        return f"<mo>(</mo><mtable>{table}</mtable><mo>)</mo>"


def mathml(formula: str, display: bool = False) -> str:
    """A formula in LaTeX as a `<math>` element.

    Raises:
      Unknown: it uses a command that is not known.
    """
    kind = ' display="block"' if display else ""
    return f"<math{kind}><mrow>{Parser(formula).row()}</mrow></math>"


def formulas(text: str) -> list[tuple[str, bool]]:
    """The formulas of a page, and whether each has a line of its own."""
    found = FORMULA.finditer(text)
    pairs = ((m["display"] or m["inline"], bool(m["display"])) for m in found)
    return [(formula, display) for formula, display in pairs if formula]


LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)")


def within(text: str, folder: str) -> str:
    """A page whose links to files outside of the documentation are their text.

    They lead to programs, which the repository's host shows and the site does not have.
    """

    def plain(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2].partition("#")[0]))
        return link[1] if path.startswith("..") else link[0]

    return LINK.sub(plain, text)


_pages: dict[str, list[str]] = {}


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Takes the formulas out, so that Markdown does not read them."""
    kept = _pages[page.file.src_uri] = []

    def take(match: re.Match[str]) -> str:
        formula = match["display"] or match["inline"]
        if not formula:
            return match[0]
        try:
            kept.append(mathml(formula, bool(match["display"])))
        except Unknown as error:
            raise ValueError(f"{page.file.src_uri}: {error} in ${formula}$") from error
        return f"⟦{len(kept) - 1}⟧"

    folder = posixpath.dirname(page.file.src_uri)
    return within(FORMULA.sub(take, markdown), folder)


def on_page_content(content: str, page, **kwargs) -> str:
    """Puts them back."""
    kept = _pages.pop(page.file.src_uri)
    return re.sub(r"⟦(\d+)⟧", lambda match: kept[int(match[1])], content)
