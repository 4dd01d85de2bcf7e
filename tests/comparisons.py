"""Comparisons made by hand: what a real one could hold, and parts of one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from curvature.comparison.result import (
    WHOLE,
    Block,
    Comparison,
    Directions,
    Figure,
    ModelState,
    Pair,
    Spectrum,
    Structured,
)

NAN = Figure(math.nan)
EF = ("Fisher", "empirical Fisher")
NASTY = "<script>alert('x')</script>/\"a\" & `b` $x_1$ \\frac %d {0}"
KINDS = {
    "Fisher": "Fisher(samples=None)",
    "empirical Fisher": "EmpiricalFisher()",
    "Gauss-Newton": "GaussNewton(probes=None, metric=None)",
}
LAYERS = (
    ("stem/conv/kernel", 432),
    ("stem/norm/scale", 16),
    ("block_0/conv_0/kernel", 2304),
    ("block_0/conv_1/kernel", 2304),
    ("block_1/conv_0/kernel", 4608),
    ("block_1/conv_1/kernel", 9216),
    ("block_1/shortcut", 512),
    ("block_2/conv_0/kernel", 18432),
    ("block_2/conv_1/kernel", 36864),
    ("dense_1/kernel", 4096),
    ("dense_2/kernel", 650),
    ("dense_2/bias", 10),
)


def pair(ratio=0.3, cosine=0.8, turn=0.8, error=0.03, directions=True, **changes):
    """A pair of these figures; `error` is relative, None for exact ones."""

    def figure(value, scale=1.0):
        if isinstance(value, Figure):
            return value
        return Figure(value, None if error is None else abs(value) * error * scale)

    scale, shape, turned = (
        default if isinstance(given, Figure) else given
        for given, default in ((ratio, 0.3), (cosine, 0.8), (turn, 0.8))
    )
    step = Directions(
        cosine=figure(turn, 0.6),
        length_ratio=figure(0.9 / scale),
        decrease=figure(1 - 0.12 / scale),
        best_decrease=figure(turned**1.5),
        agreement=figure(0.08),
    )
    made = Pair(
        trace_ratio=figure(ratio),
        cosine=figure(cosine, 0.5),
        angles=tuple(figure(v) for v in np.linspace(4, 110 * (1 - shape) + 8, 6).clip(0, 88)),
        frobenius_distance=figure(math.hypot(1 - scale, 0.4)),
        spectral_distance=figure(abs(1 - scale) + 0.02),
        directions=step if directions else None,
    )
    return dataclasses.replace(made, **changes)


def same(error=None):
    """A pair of equal matrices."""
    one, none = Figure(1.0, error), Figure(2.4e-16, error)
    step = Directions(one, one, one, one, Figure(0.0, error))
    return Pair(one, one, tuple([Figure(0.0, error)] * 6), none, none, step)


def spectrum(size, scale=1.0, error=0.05, sampling=None):
    """Eigenvalues that fall off by a power."""
    values = 9.0 * scale * np.arange(1, 9) ** -1.3
    bins = np.arange(-9, 2) + 0.5
    counts = np.round(min(size, 512) / 5.0 * np.exp(-((bins - math.log10(scale) + 5) ** 2) / 8))
    return Spectrum(
        trace=Figure(30 * scale, 30 * scale * error),
        largest=tuple(Figure(v, v * error) for v in values),
        effective_dimension=Figure(min(size, 90) * scale**0.2 * 0.7, 1.3),
        density=tuple(zip(bins.tolist(), counts.tolist(), strict=True)),
        sampling_error=None if sampling is None else Figure(sampling, 0.02),
    )


def block(name, size, pairs, *, structured=True, kinds=KINDS, seed=0):
    """A block with these pairs."""
    random = np.random.default_rng([seed, size])
    ratio = next((p.trace_ratio.value for p in pairs.values()), 1.0)
    ratio = ratio if 1e-9 < ratio < 1e9 else 1.0
    scales = dict(zip(KINDS, (1.0, ratio, 1.0), strict=True))
    loss = random.uniform(0.1, 0.5)

    def approximate(extra):
        return Structured(
            Figure(1 - 0.2 * extra, 0.03),
            Figure(1 - 0.3 * extra * loss, 0.012),
            Figure(extra * loss + 0.05, 0.02),
        )

    return Block(
        name=name,
        parameters=(f"params/{name}",),
        size=size,
        projected=512 if size > 4096 else None,
        spectra={
            k: spectrum(size, scales.get(k, 1.0), sampling=0.42 if k == "Fisher" else None)
            for k in kinds
        },
        pairs=pairs,
        structured={
            k: {
                "kronecker": approximate(1.0),
                "eigen_kronecker": approximate(0.6),
                "diagonal": approximate(2.2),
            }
            for k in list(kinds)[:2]
        }
        if structured and name != WHOLE
        else {},
    )


def realistic(count=12, seed=0):
    """A classifier that has learnt most of its targets; `count` layers."""
    random = np.random.default_rng(seed)
    blocks = []
    named = [LAYERS[i % len(LAYERS)] for i in range(count)]
    names = [
        (n if i < len(LAYERS) else f"stage_{i // len(LAYERS)}/{n}", s)
        for i, (n, s) in enumerate(named)
    ]
    for i, (name, size) in enumerate([(WHOLE, sum(s for _, s in names)), *names]):
        ratio = 0.19 if i == 0 else float(np.exp(random.uniform(math.log(0.08), math.log(0.6))))
        cosine = 0.74 if i == 0 else float(random.uniform(0.45, 0.98))
        turn = 0.79 if i == 0 else float(random.uniform(0.3, 0.97))
        found = pair(ratio, cosine, turn, error=float(random.uniform(0.02, 0.12)))
        if name == "stem/norm/scale":
            found = pair(1.1, 0.91, 0.93, error=0.35)
        if name == "dense_2/kernel":
            found = pair(0.07, 0.52, 0.62, error=0.05)
        if name == "dense_2/bias":
            found = pair(0.12, 0.6, 0.5, error=0.05, directions=False)
        blocks.append(
            block(
                name,
                size,
                {("Fisher", "empirical Fisher"): found, ("Fisher", "Gauss-Newton"): same()},
            )
        )
    return comparison(blocks)


def comparison(blocks, state=None, **changes):
    """A comparison of these blocks."""
    made = Comparison(
        kinds=KINDS,
        state=state or ModelState(2048, loss=0.113, wrong=0.0244, nll=0.113, entropy=0.258),
        blocks=tuple(blocks),
        damping=1e-3,
        settings={
            "batches": 16,
            "batch_size": 128,
            "structured": ["kronecker", "eigen_kronecker", "diagonal"],
            "angles": 6,
            "max_size": 4096,
            "seed": 0,
            "dtype": "float32",
            "versions": {
                "python": "3.11.9",
                "jax": "0.10.2",
                "jaxlib": "0.10.2",
                "curvature": "0.1.0",
            },
        },
        notes=(
            "The blocks of more than 4,096 parameters were projected to 512 random directions; "
            "their figures are estimates.",
            "`head/temperature` is no part of any layer and was left out of every block but the "
            "whole network.",
        ),
    )
    return dataclasses.replace(made, **changes)


def nasty():
    """Names that mean something to HTML, to plots, to terminals."""
    kinds = {"Fisher": "a <b>", "empirical Fisher": NASTY, NASTY: "mine"}
    pairs = {EF: pair(0.2), ("Fisher", NASTY): pair(2.0)}
    blocks = [
        block(WHOLE, 40, pairs, kinds=kinds),
        block(NASTY, 20, pairs, kinds=kinds),
        block("x" * 300, 20, pairs, kinds=kinds),
        block("tab\tnew\nline", 20, pairs, kinds=kinds),
        block("_hidden", 20, pairs, kinds=kinds),
    ]
    return comparison(blocks, kinds=kinds, notes=(NASTY,), settings={NASTY: {NASTY: [NASTY]}})


def missing():
    """Every figure is not a number."""
    gone = pair(*[NAN] * 3, directions=True)
    steps = dataclasses.replace(
        gone.directions, **{f.name: NAN for f in dataclasses.fields(gone.directions)}
    )
    gone = dataclasses.replace(
        gone,
        **dict.fromkeys(("trace_ratio", "cosine", "frobenius_distance", "spectral_distance"), NAN),
        angles=(NAN, NAN),
        directions=steps,
    )
    spectra = dict.fromkeys(
        KINDS,
        dataclasses.replace(
            spectrum(9), trace=NAN, largest=(NAN,), effective_dimension=NAN, density=()
        ),
    )
    blocks = [
        dataclasses.replace(
            block(name, 9, {EF: gone}),
            spectra=spectra,
            structured={"Fisher": {"kronecker": Structured(NAN, NAN, NAN)}},
        )
        for name in (WHOLE, "a")
    ]
    return comparison(blocks, state=ModelState(8, *[math.nan] * 4))


def odd():
    """Zeros, infinities, unknown errors, tiny and huge numbers."""
    values = [0.0, 1e-300, 1e300, -1e-17, math.inf, 5e-324, 1.0]
    errors = [None, 0.0, math.nan, math.inf, 1e-12, 1e6]
    blocks = []
    for i, value in enumerate(values):
        for j, error in enumerate(errors):
            figure = Figure(value, error)
            made = pair(figure, figure, figure)
            steps = dataclasses.replace(
                made.directions,
                length_ratio=figure,
                decrease=figure,
                best_decrease=figure,
                agreement=figure,
            )
            made = dataclasses.replace(
                made, frobenius_distance=figure, angles=(figure,) * 3, directions=steps
            )
            one = dataclasses.replace(
                spectrum(9), largest=(figure, figure), density=((value, value), (0.0, 1.0))
            )
            blocks.append(
                dataclasses.replace(
                    block(f"layer_{i}_{j}", 9, {EF: made}), spectra=dict.fromkeys(KINDS, one)
                )
            )
    return comparison(blocks)


PARTIAL = {
    "realistic": realistic,
    "sixty": lambda: realistic(60),
    "one layer": lambda: realistic(1),
    "nasty": nasty,
    "missing": missing,
    "odd": odd,
    "nothing": lambda: Comparison({}, ModelState(0, math.nan, None, None, None), (), 0.0),
    "notes only": lambda: comparison([], notes=("The first batch failed.",)),
    "no pairs": lambda: comparison([block("a", 9, {})]),
    "no whole network": lambda: comparison([block("a", 9, {EF: pair()}), block("b", 9, {})]),
    "no directions": lambda: comparison([block(WHOLE, 9, {EF: pair(directions=False)})]),
    "no spectra": lambda: comparison(
        [dataclasses.replace(block(WHOLE, 9, {EF: pair()}), spectra={}, structured={})]
    ),
    "exact": lambda: comparison([block(WHOLE, 9, {EF: pair(error=None)})]),
    "equal": lambda: comparison([block(WHOLE, 9, {EF: same()}), block("a", 9, {EF: same()})]),
}
