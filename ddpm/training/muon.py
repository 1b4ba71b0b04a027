"""Muon: momentum whose matrices are made orthogonal before each step. torch.optim.Muon takes matrices only, in bf16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration (Jordan et al. 2024)
ITERATIONS = 5
ENDS = ("conv_in.weight", "conv_out.weight", "class_embedding.weight")  # Adam's, as in Jordan et al. 2024

# torch imports its compiler, which takes 2 s, to keep some functions of optimizers out of it. Nothing compiles them
# here, so they are called as they are: torch looks in this attribute for what to call.
for function in vars(Optimizer).values():
    if hasattr(function, "__wrapped__"):
        function.__wrapped__.__dynamo_disable = function.__wrapped__


class Muon(Optimizer):
    """Muon for hidden matrices, Adam for the other parameters (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

    A convolution's kernel counts as a matrix: its output channels by all its other dimensions. An orthogonal update is
    scaled to a root mean square of 0.2, as Adam's updates usually have (Liu et al. 2025, eq. 4), so that both use the
    same learning rate. The iteration runs in float32, not bf16, for the same bytes on every CPU in reproducible mode.

    Args:
        params: the names and the parameters of the network; its matrices and kernels, apart from `ENDS`, are Muon's.
        lr: learning rate of both.
        momentum: of Muon, as an average of the gradients, with Nesterov's look-ahead.
        betas, eps: of Adam.
        weight_decay: each step shrinks the weights by lr times this.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: float = 4e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        named = list(params)
        hidden = [(name, weight) for name, weight in named if weight.ndim > 1 and name not in ENDS]
        rest = [(name, weight) for name, weight in named if weight.ndim <= 1 or name in ENDS]
        groups = [{"params": hidden, "orthogonal": True}, {"params": rest, "orthogonal": False}]
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients. `closure` is not used."""
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            (self._orthogonal_step if group["orthogonal"] else self._adam_step)(weights, group)

    def _orthogonal_step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        for weight, update in zip(weights, orthogonalised([gradient.flatten(1) for gradient in ahead]), strict=True):
            scale = 0.2 * max(update.shape) ** 0.5
            weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)

    def _adam_step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = {name: torch.zeros_like(weight) for name in ("mean", "square")}
                self.state[weight] |= zeros | {"step": torch.zeros((), device=weight.device)}
        means, squares, steps = ([self.state[w][name] for w in weights] for name in ("mean", "square", "step"))
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        adam(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=0.0,
        )


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """The nearest orthogonal matrices, roughly: singular values of about 0.7 to 1.2 (Jordan et al. 2024).

    Five steps of a Newton-Schulz iteration, which needs only products of matrices: X <- (a + b G + c G^2) X, where
    G = X X^T. Each factor is a polynomial of the first G, a small square matrix, so that the product of all factors is
    computed from it, and X is multiplied once. Matrices G of one size are computed together.

    Args:
        matrices: float32 (rows, columns) each; one of zeros stays zero.

    Returns:
        Matrices of the same shapes, float32.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    sizes: dict[int, list[int]] = {}
    for i, x in enumerate(wide):
        sizes.setdefault(len(x), []).append(i)
    found = list(wide)
    for places in sizes.values():
        products = _product_of_factors(torch.stack([wide[i] @ wide[i].mT for i in places]))
        for i, product in zip(places, products, strict=True):
            found[i] = product @ wide[i]
    return [x.mT if x.shape != like.shape else x for x, like in zip(found, matrices, strict=True)]


def _product_of_factors(grams: Tensor) -> Tensor:
    """The product of the factors a + b G + c G^2 of all steps, from each matrix's first G: (N, m, m) to (N, m, m)."""
    a, b, c = NEWTON_SCHULZ
    scaled = a * torch.eye(grams.shape[1], device=grams.device)
    product = factor = torch.baddbmm(grams, grams, grams, beta=b, alpha=c) + scaled
    for _ in range(ITERATIONS - 1):
        grams = factor @ grams @ factor
        factor = torch.baddbmm(grams, grams, grams, beta=b, alpha=c) + scaled
        product = factor @ product
    return product
