"""What every figure is, in words and as a formula, for the readers of a report."""

from __future__ import annotations

from typing import NamedTuple


class Explained(NamedTuple):
    """A figure's heading and its explanation.

    Attributes:
      head: the head of its column.
      words: what it is, as plain text.
      formula: the same in MathML.
    """

    head: str
    words: str
    formula: str = ""


_SPACE = '<mspace width="0.15em"></mspace>'


def _i(name: str) -> str:
    """A variable; upper case ones are matrices."""
    return f"<mi>{name}</mi>"


def _o(sign: str) -> str:
    return f"<mo>{sign}</mo>"


def _sub(name: str, index: str) -> str:
    return f"<msub>{_i(name)}{_i(index)}</msub>"


def _over(above: str, below: str) -> str:
    return f"<mfrac><mrow>{above}</mrow><mrow>{below}</mrow></mfrac>"


def _norm(inner: str, index: str = "F") -> str:
    bar = '<mo stretchy="false">‖</mo>'
    return f"<msub><mrow>{bar}{inner}{bar}</mrow>{_i(index)}</msub>"


def _math(inner: str) -> str:
    return f'<math displaystyle="true">{inner}</math>'


def _trace(name: str) -> str:
    return f"<mi>tr</mi>{_SPACE}{_i(name)}"


def _distance(other: str, index: str = "F") -> str:
    return _math(_over(_norm(f"{_i(other)}{_o('−')}{_i('A')}", index), _norm(_i("A"), index)))


def _cosine(other: str) -> str:
    inner = f'<mo stretchy="false">⟨</mo>{_i("A")}{_o(",")}{_i(other)}<mo stretchy="false">⟩</mo>'
    return _math(_over(inner, _norm(_i("A")) + _norm(_i(other))))


def _model(step: str) -> str:
    """The reduction of the quadratic model with A by a step."""
    return f"{_i('q')}<mo stretchy='false'>(</mo>{step}<mo stretchy='false'>)</mo>"


_X_A, _X_B, _LAMBDA = _sub("x", "A"), _sub("x", "B"), "<mi>λ</mi>"
_Q = f"{_i('q')}<mo>(</mo>{_i('t')}<mo>)</mo>"
_LOG_Q = f"<mi>log</mi>{_SPACE}{_Q}"
_ROOT = f"<msub>{_LAMBDA}{_i('i')}</msub>"

SIZE = Explained(
    "entries",
    "Number of parameter entries n of the block: its matrices are n × n. Large ones were projected "
    "to random directions before they were compared.",
)

PAIR = {
    "trace_ratio": Explained(
        "trace ratio",
        "The scale of B against A: 1 where both are equally large in the mean.",
        _math(_over(_trace("B"), _trace("A"))),
    ),
    "cosine": Explained(
        "cosine",
        "The shape, whatever the scale: 1 where one matrix is a multiple of the other.",
        _cosine("B"),
    ),
    "frobenius_distance": Explained(
        "distance (Frobenius)",
        "How far B is from A, scale and shape together, relative to the size of A.",
        _distance("B"),
    ),
    "spectral_distance": Explained(
        "distance (spectral)",
        "The same along the direction where the two differ most.",
        _distance("B", "2"),
    ),
}

DIRECTIONS = {
    "angle": Explained(
        "angle",
        "Between the natural-gradient steps of A and B, with the ends of its 95 % interval.",
        _math(
            f"{_i('x')}{_o('=')}{_o('−')}<msup><mrow><mo stretchy='false'>(</mo>{_i('C')}{_o('+')}"
            f"{_LAMBDA}{_i('I')}<mo stretchy='false'>)</mo></mrow><mrow>{_o('−')}<mn>1</mn></mrow>"
            f"</msup>{_i('g')}"
        ),
    ),
    "cosine": Explained("cosine", "Of that angle: 1 where both steps point the same way."),
    "length_ratio": Explained(
        "length",
        "How much longer the step of B is.",
        _math(_over(_norm(_X_B, "2"), _norm(_X_A, "2"))),
    ),
    "decrease": Explained(
        "decrease",
        "What the step of B takes off the quadratic model with A, as a share of what the step of A "
        "takes off. Negative: it raises the model.",
        _math(_over(_model(_X_B), _model(_X_A))),
    ),
    "best_decrease": Explained(
        "at best length",
        "The same after B's step has been given its best length: what is lost by direction alone.",
    ),
    "agreement": Explained(
        "agree from damping",
        "The smallest damping from which on the cosine of the two steps is 0.99 or more; 0 where "
        "it always is.",
    ),
}

SPECTRA = {
    "trace": Explained("trace", "The sum of the eigenvalues."),
    "largest": Explained("largest eigenvalue", "The curvature along the sharpest direction."),
    "effective_dimension": Explained(
        "effective dimension",
        "How many directions have an eigenvalue that stands out from the damping λ.",
        _math(f"<munder><mo>∑</mo>{_i('i')}</munder>{_over(_ROOT, _ROOT + _o('+') + _LAMBDA)}"),
    ),
    "sampling_error": Explained(
        "sampling error",
        "Relative error of the samples A′ that one training step would draw; nothing where the "
        "kind draws none.",
        _math(_over(_norm(f"<msup>{_i('A')}{_o('′')}</msup>{_o('−')}{_i('A')}"), _norm(_i("A")))),
    ),
}

STRUCTURED = {
    "trace_ratio": Explained(
        "trace ratio",
        "The scale of the approximation K against the block A that it stands for.",
        _math(_over(_trace("K"), _trace("A"))),
    ),
    "cosine": Explained(
        "cosine", "The shape, whatever the scale: 1 where K is a multiple of A.", _cosine("K")
    ),
    "frobenius_distance": Explained(
        "distance (Frobenius)",
        "How far K is from A, relative to the size of A: 0 where it is exact.",
        _distance("K"),
    ),
}

STATE = {
    "examples": Explained("examples", "How many the comparison saw."),
    "loss": Explained("loss", "Its mean over the examples."),
    "wrong": Explained(
        "wrong",
        "The share of predictions whose likeliest target is not the given one. An example may hold "
        "many predictions (tokens, pixels); those with a weight in the loss count alike.",
    ),
    "nll": Explained(
        "negative log-likelihood",
        "Of the given target of a prediction, the mean in nats: how much the targets surprise the "
        "model.",
        _math(_o("−") + _LOG_Q),
    ),
    "entropy": Explained(
        "entropy",
        "Of a predicted distribution, the mean in nats: how much targets drawn from the model "
        "itself would surprise it. The two are equal where the model is calibrated.",
        _math(f"{_o('−')}<munder><mo>∑</mo>{_i('t')}</munder>{_Q}{_SPACE}{_LOG_Q}"),
    ),
}

ANGLES = Explained(
    "principal angles",
    "Between the space of A's largest eigenvectors and that of B's: all near 0° where the two see "
    "the same sharp directions, near 90° where they see none in common.",
)
