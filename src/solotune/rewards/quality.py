"""How good a reward model is on texts that it has not seen. Pure functions on (N,) tensors."""

import torch
from torch import Tensor


def pairwise_accuracy(scores_N: Tensor, ratings_N: Tensor) -> float:
    """Share of the pairs with different ratings that the scores put in the same order; equal scores count half.

    NaN where all ratings are equal.
    """
    higher_NN = ratings_N[:, None] > ratings_N[None, :]
    difference_NN = scores_N[:, None] - scores_N[None, :]
    right_NN = (difference_NN > 0).double() + 0.5 * (difference_NN == 0).double()
    return right_NN[higher_NN].mean().item()


def sign_accuracy(scores_N: Tensor, ratings_N: Tensor) -> float:
    """Share of the ratings other than 0 whose sign the score has; a score of exactly 0 is wrong."""
    rated = ratings_N != 0
    return (scores_N[rated].sign() == ratings_N[rated].sign()).double().mean().item()


def brier_score(probabilities_N: Tensor, outcomes_N: Tensor) -> float:
    """Mean squared distance of probabilities from what happened (0 or 1): 0 is perfect, 0.25 is a coin (Brier 1950)."""
    return (probabilities_N.double() - outcomes_N.double()).square().mean().item()


def fit_logistic(scores_N: Tensor, positive_N: Tensor, steps: int = 50) -> tuple[float, float]:
    """`(scale, offset)` that make sigmoid(scale * score + offset) the likeliest probability of `positive` (Platt 1999).

    Newton's method, with Platt's smoothed targets, so that separable data give finite numbers.
    """
    x_N = scores_N.double()
    positives, negatives = positive_N.sum().item(), (~positive_N).sum().item()
    target_N = torch.where(positive_N, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
    design_N2 = torch.stack([x_N, torch.ones_like(x_N)], dim=1)
    weights_2 = torch.zeros(2, dtype=torch.float64)
    ridge_22 = 1e-6 * torch.eye(2, dtype=torch.float64)
    for _ in range(steps):
        p_N = torch.sigmoid(design_N2 @ weights_2)
        gradient_2 = design_N2.T @ (p_N - target_N)
        hessian_22 = design_N2.T @ (design_N2 * (p_N * (1 - p_N))[:, None]) + ridge_22
        step_2 = torch.linalg.solve(hessian_22, gradient_2)
        weights_2 = weights_2 - step_2
        if step_2.abs().max() < 1e-10:
            break
    return weights_2[0].item(), weights_2[1].item()
