"""Losses that learn a policy from preferences directly, without a reward model or samples."""

import jax
import jax.numpy as jnp

Array = jax.Array
LEAST_SURPRISE = 1e-6  # nats a token; the odds of a certain answer would be infinite


def dpo_loss(
    chosen_logratio: Array, rejected_logratio: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> Array:
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7).

    -log sigmoid(beta (chosen - rejected)); ln 2 where policy and reference agree. Smoothed, it is conservative DPO
    (E. Mitchell, "A note on DPO with noisy preferences", 2023): the mean of the loss and that of the pair turned
    around, weighted 1 - label_smoothing and label_smoothing.

    Args:
      chosen_logratio, rejected_logratio: (B,) log pi - log pi_ref of an answer, summed over its tokens.
      beta: strength of the KL constraint that the loss stands for.
      label_smoothing: share of pairs taken to be labelled the wrong way round, below 0.5.

    Returns:
      (B,) nats.
    """
    margin = beta * (chosen_logratio - rejected_logratio)
    loss = jax.nn.softplus(-margin)
    if not label_smoothing:
        return loss
    return (1.0 - label_smoothing) * loss + label_smoothing * jax.nn.softplus(margin)


def hinge_loss(chosen_logratio: Array, rejected_logratio: Array, beta: float = 0.1) -> Array:
    """max(0, 1 - beta (chosen - rejected)) for log-ratios (B,) summed over tokens; returns (B,).

    SLiC's calibration loss (Zhao et al., arXiv 2305.10425) on DPO's log-ratios, as RSO has it (Liu et al., arXiv
    2309.06657).
    """
    return jax.nn.relu(1.0 - beta * (chosen_logratio - rejected_logratio))


def ipo_loss(chosen_logratio: Array, rejected_logratio: Array, beta: float = 0.1) -> Array:
    """Identity preference optimization (Azar et al., arXiv 2310.12036, equation 17).

    (chosen - rejected - 1 / (2 beta))^2; the paper's tau is beta.

    Args:
      chosen_logratio, rejected_logratio: (B,) log pi - log pi_ref, summed over tokens as in the paper, or the mean
        over tokens for the length-normalized form.
      beta: above 0.

    Returns:
      (B,).
    """
    return jnp.square(chosen_logratio - rejected_logratio - 1.0 / (2.0 * beta))


def kto_loss(
    logratio: Array,
    desirable: Array,
    kl: Array | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """Kahneman-Tversky optimization from single answers (Ethayarajh et al., arXiv 2402.01306).

    A desirable answer costs desirable_weight (1 - sigmoid(beta (logratio - kl))), an undesirable one
    undesirable_weight (1 - sigmoid(beta (kl - logratio))).

    Args:
      logratio: (B,) log pi - log pi_ref of an answer, summed over its tokens.
      desirable: (B,) bool.
      kl: () the batch's estimate of KL(pi || pi_ref), nats an answer; the caller clamps it at 0. It is the reference
        point of gains and losses: no gradient passes through it.
      beta: how soon gains and losses saturate.
      desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.

    Returns:
      (B,) between 0 and the answer's weight.
    """
    gain = beta * (logratio - jax.lax.stop_gradient(kl))
    desirable = desirable.astype(bool)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(jnp.where(desirable, -gain, gain))


def _log_odds(logprob: Array) -> Array:
    """log(p / (1 - p)) of log p."""
    logprob = jnp.minimum(logprob, -LEAST_SURPRISE)
    return logprob - jnp.log(-jnp.expm1(logprob))


def orpo_loss(chosen_logprob: Array, rejected_logprob: Array, chosen_nll: Array, beta: float = 0.1) -> Array:
    """Odds ratio preference optimization, without a reference (Hong et al., arXiv 2403.07691, equations 6 and 7).

    chosen_nll - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p).

    Args:
      chosen_logprob, rejected_logprob: (B,) log pi of an answer, the mean over its tokens. Above -1e-6 one counts as
        -1e-6, without a gradient: the odds of a certain answer are infinite.
      chosen_nll: (B,) the language-model loss of the chosen answer, the mean over its tokens.
      beta: weight of the odds ratio; the paper's lambda.

    Returns:
      (B,) nats.
    """
    return chosen_nll + beta * jax.nn.softplus(_log_odds(rejected_logprob) - _log_odds(chosen_logprob))


def simpo_loss(chosen_logprob: Array, rejected_logprob: Array, beta: float, margin: float) -> Array:
    """Simple preference optimization, without a reference (Meng et al., arXiv 2405.14734).

    -log sigmoid(beta (chosen - rejected - margin)); the paper's gamma is beta times margin.

    Args:
      chosen_logprob, rejected_logprob: (B,) log pi of an answer, the mean over its tokens.
      beta: scale of the implicit reward; 2 to 2.5 in the paper.
      margin: nats a token by which the chosen answer shall lead.

    Returns:
      (B,) nats.
    """
    return jax.nn.softplus(-beta * (chosen_logprob - rejected_logprob - margin))
