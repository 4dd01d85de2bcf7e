"""The sentences of a report say what the numbers say, and no more."""

import dataclasses
import math

import pytest
from comparisons import EF, KINDS, NAN, block, comparison, pair, realistic, same, spectrum

from curvature.comparison.result import WHOLE, Figure, ModelState, Structured
from curvature.report.verdicts import Side, away, factor, side, times
from curvature.report.words import others, paragraphs, summary
from curvature.report.writing import plural, rounded, text

GN = ("Fisher", "Gauss-Newton")


def told(made):
    return " ".join(summary(made))


def whole(**changes):
    """The summary where only the whole network has been compared, and nothing else is known."""
    made = pair(**changes)
    blocks = [block(WHOLE, 100, {EF: made}, structured=False)]
    return told(comparison(blocks))


def layered(*pairs, key=EF):
    blocks = [block(f"layer_{i}", 10, {key: p}, structured=False) for i, p in enumerate(pairs)]
    return told(comparison(blocks))


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (Figure(0.0713, 0.0042), "0.071 ± 0.004"),
        (Figure(0.0713), "0.07130"),
        (Figure(0.0713, 0.0142), "0.071 ± 0.014"),
        (Figure(12345.6, 240), "12,300 ± 200"),
        (Figure(1e-7, 3e-9), "(1.00 ± 0.03)e-07"),
        (Figure(2.4e-16), "2.400e-16"),
        (Figure(123456.0, 1000), "(1.235 ± 0.010)e+05"),
        (Figure(9.99996), "10.00"),
        (Figure(0.0), "0"),
        (Figure(-0.001, 0.2), "0.0 ± 0.2"),
        (Figure(-3.21, 0.4), "-3.2 ± 0.4"),
        (Figure(0.5, 3.0), "0 ± 3"),
        (Figure(0.0, 0.3), "0.0 ± 0.3"),
        (Figure(1.0, 0.0), "1.000 ± 0"),
        (Figure(0.7, 1e-9), "0.70000 ± 1e-09"),
        (Figure(3.0, math.nan), "3.00 ± ?"),
        (Figure(3.0, math.inf), "3.00 ± ?"),
        (NAN, "-"),
        (Figure(math.inf), "-"),
    ],
)
def test_a_figure_has_the_digits_that_its_error_leaves(figure, expected):
    assert text(figure) == expected


def test_numbers_and_nouns_in_a_sentence():
    assert [rounded(v) for v in (14.2, 1.84, 9.96, 3421, 0.071, 0, 1e-5)] == [
        *("14", "1.8", "10", "3,400", "0.071", "0", "1.0e-05")
    ]
    assert (plural(1, "layer"), plural(0, "layer")) == ("1 layer", "0 layers")
    assert plural(2048, "example") == "2,048 examples"


@pytest.mark.parametrize(
    ("ratio", "where"),
    [
        (Figure(0.5), Side.SMALL),
        (Figure(0.5, 0.6), Side.UNCLEAR),
        (Figure(0.5, math.nan), Side.UNCLEAR),
        (Figure(0.5, math.inf), Side.UNCLEAR),
        (Figure(1.01), Side.SAME),
        (Figure(1.01, 0.05), Side.SAME),
        (Figure(1.01, 0.5), Side.UNCLEAR),
        (Figure(1.5, 0.2), Side.LARGE),
        (NAN, Side.UNKNOWN),
        (Figure(math.inf), Side.UNKNOWN),
    ],
)
def test_a_ratio_lies_where_all_of_its_interval_does(ratio, where):
    assert side(ratio) is where


def test_a_factor_is_as_sure_as_its_error():
    assert factor(Figure(1 / 14, 0.004)) == "14 times too small"
    assert factor(Figure(0.93)) == "7.0 % too small"
    assert factor(Figure(3.0, 0.1)) == "3.0 times too large"
    assert factor(Figure(0.1, 0.1)) == "at least 5.0 times too small"
    assert factor(Figure(5.0, 3.0)) == "at least 2.0 times too large"
    assert factor(Figure(0.0)) == "infinitely many times too small"
    assert times(1.2) == "20 %"


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (Figure(math.cos(math.radians(38))), "points 38° away"),
        (Figure(0.788, 0.03), "points 38° away (35° to 41°)"),
        (Figure(0.999), "points the same way (within 3°)"),
        (Figure(1.0), "points the same way (within 0°)"),
        (Figure(0.7, 0.3), "points at most 66° away"),
        (Figure(0.5, 0.3), "points at least 37° away"),
        (Figure(0.5, 0.6), ""),
        (Figure(-0.5), "points 120° away"),
        (Figure(0.5, math.nan), ""),
        (NAN, ""),
    ],
)
def test_an_angle_is_as_sure_as_its_error(cosine, words):
    assert away(cosine) == words


def test_the_whole_network():
    said = whole(ratio=1 / 14, cosine=0.7, turn=0.788, error=0.03)
    assert "the empirical Fisher is 14 times too small (trace ratio 0.071 ± 0.002)" in said
    assert "Its shape differs from that of the true Fisher (Frobenius cosine 0.700 ± 0.010)" in said
    assert "At damping 0.001 its step is 13 times longer and points 38° away (37° to 39°)." in said
    assert (
        "Taken in full it would raise the quadratic model of the true Fisher; at its best" in said
    )
    assert "agree (cosine 0.99 or more) only from damping 0.080 on" in said
    assert "nan" not in said and "None" not in said


def test_the_scale():
    assert "has the scale of the true Fisher (trace ratio 1.00)" in whole(ratio=1.0, error=None)
    assert "cannot be told from the true Fisher in scale" in whole(ratio=0.9, error=0.4)
    assert "is at least 1.3 times too small" in whole(ratio=0.5, error=0.5)
    assert "is at least 18 % too small" in whole(ratio=0.5, error=0.64)
    assert "no trace to set against that of the true Fisher" in whole(trace_ratio=NAN)


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (Figure(0.995, 0.001), "But for scale the two matrices are nearly the same"),
        (Figure(0.95, 0.02), "Its shape is much like that"),
        (Figure(0.9, 0.02), "In shape the two are related"),
        (Figure(0.7, 0.1), "Its shape differs"),
        (Figure(0.3, 0.1), "Its shape has little in common"),
        (Figure(0.6, 0.3), "How alike the two are in shape cannot be told"),
    ],
)
def test_the_shape(cosine, words):
    assert words in whole(cosine=cosine)


def decrease(**changes):
    made = pair()
    made = dataclasses.replace(made, directions=dataclasses.replace(made.directions, **changes))
    return told(comparison([block(WHOLE, 9, {EF: made}, structured=False)]))


def test_what_it_does_to_training():
    good, best = Figure(0.62, 0.03), Figure(0.81, 0.02)
    own = "of what the step of the true Fisher takes off its own quadratic model"
    said = decrease(decrease=good, best_decrease=best)
    assert f"Taken in full it takes off 62 ± 3 % {own}, at its best length 81 ± 2 %." in said
    assert f"takes off 62 ± 3 % {own}." in decrease(decrease=good, best_decrease=NAN)
    said = decrease(decrease=Figure(-2.0, 0.1), best_decrease=best)
    assert (
        "would raise the quadratic model of the true Fisher; at its best length it takes off"
        in said
    )
    assert "model of the true Fisher." in decrease(decrease=Figure(-2.0), best_decrease=NAN)
    said = decrease(decrease=Figure(0.2, 0.9), best_decrease=best)
    assert "cannot be told (share 0.2 ± 0.9); at its best length" in said
    said = decrease(decrease=Figure(-5.0, 10.0), best_decrease=Figure(-0.1, 0.4))
    assert "(share -5 ± 10); how much it takes off at its best length cannot be told (share" in said
    said = decrease(decrease=NAN, best_decrease=best)
    assert f"At its best length it takes off 81 ± 2 % {own}." in said
    assert "quadratic" not in decrease(decrease=NAN, best_decrease=NAN)
    assert "only from damping" not in decrease(agreement=Figure(0.0))
    assert "only from damping" not in decrease(agreement=NAN)
    one = Figure(1.0)
    assert "its step is as long and points 38° away" in decrease(
        length_ratio=one, cosine=Figure(0.788)
    )
    assert "At damping" not in decrease(length_ratio=NAN, cosine=NAN)
    assert "its step" not in whole(directions=False)


def test_the_layers():
    said = layered(pair(0.07, turn=0.9), pair(0.5, turn=0.4), pair(1.0, error=0.01))
    assert "The empirical Fisher is too small in 2 of 3 layers (about 2.0 to 14 times);" in said
    assert "; in 1 the two have the same scale." in said
    assert (
        "Farthest off in scale is layer `layer_0`, where the empirical Fisher is 14 times" in said
    )
    assert "Farthest in direction is layer `layer_1`, where the step of the empirical" in said
    said = layered(pair(0.07, turn=0.3), pair(0.5, turn=0.4))
    assert "Farthest off in both is layer `layer_0`" in said
    said = layered(pair(0.5), pair(2.0), pair(1.0, error=0.5), pair(trace_ratio=NAN))
    assert (
        "too small in 1 of 4 layers (about 2.0 times) and too large in 1 (about 2.0 times)" in said
    )
    assert "; in 1 their scales cannot be told apart; in 1 there is no trace ratio." in said
    said = layered(pair(1.0, error=0.5), pair(1.0, error=0.5))
    assert "In both layers their scales cannot be told apart." in said
    assert "Farthest" not in said
    assert "is too small in all 3 layers (about 2.0 times)." in layered(*[pair(0.5)] * 3)
    assert "(up to 2.0 times)" in layered(pair(0.9, error=None), pair(0.5, error=None))


def test_one_layer_is_no_statistic():
    said = layered(pair(0.07, turn=0.788))
    assert (
        "In layer `layer_0` the empirical Fisher is 14 times too small and its step points" in said
    )
    assert "1 layer" not in said and "Farthest" not in said
    assert "In layer `layer_0` the step of the" in layered(pair(1.0, turn=0.7, error=0.01))
    said = layered(pair(0.5, directions=False))
    assert "In layer `layer_0` the empirical Fisher is 2.0 times too small." in said


def test_a_scattered_layer_is_not_the_farthest():
    """The farthest layer is the one that is far for certain, not the one with the widest error."""
    said = layered(pair(0.01, error=60.0), pair(0.2, error=0.05))
    assert (
        "Farthest off in scale is layer `layer_1`" in said or "in both is layer `layer_1`" in said
    )


def test_equal_matrices():
    said = layered(same(), same(), key=GN)
    assert (
        "In both blocks the Gauss-Newton matrix and the true Fisher are the same matrix up to "
        "rounding (relative distance at most 2.4e-16)."
    ) in said
    assert "In the one block compared" in layered(same(), key=GN)
    blocks = [block(WHOLE, 9, {GN: same()}), block("a", 9, {GN: pair(1.5)})]
    said = told(comparison(blocks))
    assert "Over the whole network the Gauss-Newton matrix and the true Fisher are the same" in said
    assert "In layer `a` the Gauss-Newton matrix is 1.5 times larger than the true Fisher" in said


def test_a_kind_that_is_compared_twice_says_with_what():
    kinds = {"Fisher": "", "Gauss-Newton": "", "Fisher (2 samples)": ""}
    sampled = "Fisher (2 samples)"
    pairs = {GN: pair(2.0), ("Fisher", sampled): pair(), ("Gauss-Newton", sampled): pair()}
    made = comparison([block(WHOLE, 9, pairs, structured=False)], kinds=kinds)
    assert [topic for topic, _ in paragraphs(made)][1:3] == [
        "Gauss-Newton matrix",
        "True Fisher from 2 samples against true Fisher",
    ]
    ((topic, said),) = others(made)
    assert topic == "True Fisher from 2 samples against Gauss-Newton matrix"
    assert summary(made)[-1] == said


def test_without_a_pair_of_the_reference_nothing_is_put_last():
    made = comparison([block(WHOLE, 9, {("empirical Fisher", "Gauss-Newton"): pair(2.0)})])
    assert others(made) == []
    assert "Gauss-Newton matrix is 2.0 times larger than the empirical Fisher" in told(made)


def test_sampled_kinds_have_names():
    probes = "Gauss-Newton (2 probes)"
    kinds = {"Fisher (1 sample)": "", probes: ""}
    key = ("Fisher (1 sample)", probes)
    said = told(
        comparison([block("a", 9, {key: pair(2.0)}), block("b", 9, {key: pair(3.0)})], kinds=kinds)
    )
    assert (
        "The Gauss-Newton matrix from 2 probes is larger than the true Fisher from 1 sample in "
        "both layers (about 2.0 to 3.0 times)."
    ) in said


def test_only_the_empirical_fisher_is_too_small():
    said = layered(pair(0.5), key=GN)
    assert "2.0 times smaller than the true Fisher" in said and "too small" not in said


def test_kinds_keep_the_names_they_were_given():
    kinds = {"fisher": "Fisher", "Fisher": "another", "mine": "own"}
    key = ("fisher", "mine")
    made = comparison([block(WHOLE, 9, {key: pair(0.5)}, structured=False)], kinds=kinds)
    assert "Over the whole network `mine` is 2.0 times smaller than `fisher`" in told(made)
    assert [topic for topic, _ in paragraphs(made)][1] == "mine"


def state(nll, entropy, ratio=0.3, wrong=None, loss=None, **changes):
    """The summary of a model whose loss is its negative log-likelihood, or another one."""
    loss = nll if loss is None else loss
    model = ModelState(examples=1, loss=loss, wrong=wrong, nll=nll, entropy=entropy)
    made = comparison(
        [block(WHOLE, 9, {EF: pair(ratio, **changes)}, structured=False)], state=model
    )
    return told(made)


def test_the_model():
    assert "Over 1 example the mean loss is 0.100." in state(0.1, None)
    said = state(0.1, 0.2, wrong=0.0)
    assert (
        "Over 1 example the mean loss is 0.100, in 0 % of predictions the likeliest target is not "
        "the given one, and the predicted distribution has a mean entropy of 0.200 nats."
    ) in said
    assert not state(math.nan, None).startswith("Over 1 example")
    said = state(0.1, 0.2, wrong=0.0, loss=78.4)
    assert "mean loss is 78.4, in 0 % of" in said
    assert "the given one has a mean negative log-likelihood of 0.100 nats, and" in said


def test_why_the_empirical_fisher_differs():
    start = "The empirical Fisher approaches the true one as the model becomes calibrated"
    given = "(mean negative log-likelihood 0.100 against mean entropy 0.200 nats)"
    said = state(0.1, 0.2)
    assert start in said and given in state(0.1, 0.2, loss=78.4)
    assert f"surprise it less {given}: it fits them better than it claims, which goes with" in said
    assert "does not explain why the empirical Fisher is too large" in state(0.1, 0.2, ratio=3.0)
    assert "than it claims." in state(0.1, 0.2, ratio=1.0, error=0.5)
    assert "surer than it should be, which goes with" in state(0.2, 0.1, ratio=3.0)
    assert "which does not explain why the empirical Fisher is too small" in state(0.2, 0.1)
    assert "do not explain the difference in scale" in state(0.2, 0.2)
    assert "and so are the traces" in state(0.2, 0.2, ratio=1.0, error=0.01)
    assert "entropy 0.200 nats)." in state(0.2, 0.2, ratio=1.0, error=0.5)
    assert "holds no entropy" in state(0.2, None)
    assert "holds no entropy" in state(math.nan, 0.2)
    assert "holds no entropy" in state(None, None, loss=0.1)
    assert start not in layered(pair(0.5), key=GN)
    said = layered(pair(0.5))  # without the whole network nothing is said of its scale
    assert start in said and "which goes with" not in said


def test_the_empirical_fisher_may_be_the_reference():
    key = EF[::-1]
    made = comparison(
        [block(WHOLE, 9, {key: pair(3.0)}, structured=False)],
        kinds={name: KINDS[name] for name in key},
    )
    assert "the true Fisher is 3.0 times larger than the empirical Fisher" in told(made)
    assert "which goes with an empirical Fisher that is too small" in told(made)


def test_approximations():
    one = Structured(Figure(0.9), Figure(0.9), Figure(0.25))
    two = dataclasses.replace(one, frobenius_distance=Figure(0.5, 0.1))
    three = dataclasses.replace(one, frobenius_distance=NAN)
    blocks = [
        dataclasses.replace(block("a", 9, {}), structured={"Fisher": {"kron": one, "diag": three}}),
        dataclasses.replace(block("b", 9, {}), structured={"Fisher": {"kron": two, "diag": one}}),
    ]
    said = told(comparison(blocks))
    assert (
        "As approximations of the true Fisher, by relative Frobenius distance: `kron` is 0.38 away "
        "(median of 2 layers), at most 0.50 (`b`); `diag` is 0.25 away in `b`."
    ) in said
    twice = dataclasses.replace(blocks[0], structured={"Fisher": {"kron": one, "reduced": one}})
    assert "`kron` and `reduced` are 0.25 away in `a`." in told(comparison([twice]))


def test_sampling():
    said = told(realistic(2))
    assert (
        "Sampled as in a training step, the true Fisher is off by 0.42 ± 0.02 times its own norm "
        "over the whole network."
    ) in said
    spectra = {"Fisher": spectrum(9, sampling=0.3)}
    made = dataclasses.replace(block("a", 9, {}), spectra=spectra, structured={})
    twice = dataclasses.replace(made, name="b")
    said = told(comparison([made, twice]))
    assert "is off by 0.30 times its own norm (median of 2 layers)." in said
    assert "is off by 0.30 ± 0.02 times its own norm in layer `a`." in told(comparison([made]))


def test_wide_errors_are_counted():
    said = layered(pair(0.3, error=0.6), pair(0.3, error=0.1))
    assert "1 of 2 trace ratios has an error of more than half the value" in said
    said = layered(pair(0.3, error=0.6), pair(0.3, error=math.nan), pair(0.3, error=None))
    assert "2 of 3 trace ratios have errors of more than half the value" in said
    assert "half the value" not in layered(pair(0.3), pair(0.3))


def test_partial_results():
    nothing = comparison([], kinds={}, notes=(), settings={})
    assert "No two kinds of curvature could be compared." in summary(nothing)
    unpaired = comparison([block("a", 9, {}, structured=False)])
    assert "No two kinds of curvature could be compared." in summary(unpaired)
    empty = pair(
        trace_ratio=NAN, cosine=NAN, frobenius_distance=NAN, spectral_distance=NAN, angles=()
    )
    said = layered(empty, empty)
    assert "nan" not in said and "inf" not in said
    assert set(KINDS) == set(unpaired.kinds)


def test_every_sentence_ends():
    for made in (realistic(), realistic(1), comparison([])):
        for paragraph in summary(made):
            assert paragraph[0].isupper() or paragraph[0] == "`"
            assert (
                paragraph.rstrip(")")[-1] == "." and "  " not in paragraph and ".." not in paragraph
            )
