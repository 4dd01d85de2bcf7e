"""Output losses: compute the loss and tag it.

Each function marks its arguments in the trace, so that `curvature.register` knows where the network
ends and which metric its output space carries. Functions with a namesake in `optax.losses` have its
name, arguments, result shape and value (per-example or elementwise values, no reduction). The
reduction stays in the user's hands: the weight of every value is read off as w = dL/dl.

| function                                    | family, in z                    | F_z = H_z        |
|---------------------------------------------|---------------------------------|------------------|
| `softmax_cross_entropy_with_integer_labels` | categorical, logits             | yes              |
| `softmax_cross_entropy`                     | categorical, logits             | yes              |
| `sigmoid_binary_cross_entropy`              | Bernoulli, logit                | yes              |
| `l2_loss`, `squared_error`                  | Gaussian, mean                  | yes              |
| `gaussian_nll`                              | Gaussian of known variance      | yes              |
| `heteroscedastic_gaussian_nll`              | Gaussian, mean and log variance | in expectation   |
| `poisson_nll`                               | Poisson, log rate               | yes              |
| `exponential_nll`, `gamma_nll`              | gamma of known shape, log rate  | in expectation   |
| `huber_loss`                                | Huber's density, location       | in expectation   |
| `absolute_error`                            | Laplace, location               | no: H_z = 0      |
| `log_amplitude`                             | wave function, log-amplitude    | F_z alone        |
| `custom`                                    | the user's                      | not presumed     |

An output loss is the negative log-likelihood l(z, t) = -log p(t | z) of a family. In the family's
natural parameters its Hessian does not depend on the target and is the Fisher information, F_z =
H_z: the exact Fisher *is* the Gauss-Newton matrix (Martens 2020, section 9.2). In other parameters
F_z is the mean of H_z over targets drawn from the model, where l is smooth.

*Label smoothing and soft targets*: `softmax_cross_entropy` with `optax.smooth_labels(...)`.
*Ignored labels* (padding): multiply the values by a mask of zeros and ones, or choose by
`jnp.where(mask, loss, 0)`, before they are summed; a unit of weight zero has no curvature, whatever
its label, provided its output is finite. *Classes that do not count*: `where`. *Several heads*: one
loss for each, added with any coefficients.
"""

from curvature.losses.amplitude import LogAmplitude, log_amplitude
from curvature.losses.bernoulli import Bernoulli, sigmoid_binary_cross_entropy
from curvature.losses.categorical import (
    Categorical,
    SoftCategorical,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from curvature.losses.gaussian import (
    Gaussian,
    HeteroscedasticGaussian,
    SquaredError,
    gaussian_nll,
    heteroscedastic_gaussian_nll,
    l2_loss,
    squared_error,
)
from curvature.losses.output import TAG, OutputLoss, Targets, tag
from curvature.losses.rates import (
    Exponential,
    Gamma,
    Poisson,
    exponential_nll,
    gamma_nll,
    poisson_nll,
)
from curvature.losses.robust import Huber, Laplace, absolute_error, huber_loss
from curvature.losses.user_defined import Custom, custom

__all__ = [
    "TAG",
    "Bernoulli",
    "Categorical",
    "Custom",
    "Exponential",
    "Gamma",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Huber",
    "Laplace",
    "LogAmplitude",
    "OutputLoss",
    "Poisson",
    "SoftCategorical",
    "SquaredError",
    "Targets",
    "absolute_error",
    "custom",
    "exponential_nll",
    "gamma_nll",
    "gaussian_nll",
    "heteroscedastic_gaussian_nll",
    "huber_loss",
    "l2_loss",
    "log_amplitude",
    "poisson_nll",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "squared_error",
    "tag",
]
