"What the parity tests share: weights drawn at random, loaded into both by name, and outputs and gradients compared."

import torch
from torch import Tensor, nn

from stable_diffusion_scratch.layers import load_weights, named_weights, rename


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    "Random weights that let every layer be heard; none stays at a symmetric initial value such as 0 or 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    "Norm of the difference over the norm of the reference."
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).norm() / theirs.norm()).item()


def same_weights(ours: nn.Module, theirs: nn.Module, table: dict[str, str]) -> None:
    "Random weights in theirs, the same in ours: every name of one is a name of the other."
    redraw(theirs)
    load_weights(ours, theirs.state_dict(), table)
    assert named_weights(ours, table).keys() == theirs.state_dict().keys()


def assert_same(
    ours: nn.Module, theirs: nn.Module, y: Tensor, reference: Tensor, table: dict[str, str], tolerance: float = 1e-5
) -> None:
    "Outputs agree, and so do the gradients of a random projection of them, weight by weight."
    assert relative(y, reference) < tolerance
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for model, out in ((ours, y), (theirs, reference)):
        model.zero_grad()
        (out * direction).sum().backward(retain_graph=True)
    gradients = {rename(name, table): p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    total = sum((g**2).sum() for g in expected.values()) ** 0.5
    for name, gradient in expected.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:  # a gradient that is zero by symmetry is rounding in both, so measure against the whole as well
            error = (gradients[name] - gradient).norm()
            assert error < 10 * tolerance * gradient.norm() + tolerance * 1e-2 * total, (name, error, gradient.norm())
