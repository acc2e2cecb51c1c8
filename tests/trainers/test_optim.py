"""Optimizers by trlX's names."""

import pytest
import torch

from solotune.config import OptimizerConfig
from solotune.errors import ConfigError
from solotune.trainers.optim import build_optimizer


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_in_one_pass_is_the_step_of_its_operations(name):
    """Which of torch's implementations is the user's choice."""
    found = []
    for others in ({"fused": True}, {"foreach": True}, {"fused": False}, {}):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(50))
        kwargs = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, **others}
        optimizer = build_optimizer(OptimizerConfig(name=name, kwargs=kwargs), [parameter])
        assert {name: optimizer.defaults[name] for name in others} == others
        for _ in range(30):
            parameter.grad = torch.randn(50)
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert torch.equal(found[3], found[0])


def test_a_tensor_with_gaps_is_stepped_as_one_without():
    """On a CPU the step in one pass would walk over the gaps, without an error."""
    found = []
    for tensor in (torch.randn(40, 60)[:, ::2], torch.randn(40, 60)[:, ::2].contiguous()):
        parameter = torch.nn.Parameter(tensor)
        with torch.no_grad():
            parameter.copy_(torch.linspace(-1, 1, 1200).view(40, 30))
        optimizer = build_optimizer(OptimizerConfig(name="adamw", kwargs={"lr": 1e-2}), [parameter])
        for _ in range(10):
            optimizer.zero_grad()
            (parameter * torch.linspace(0, 1, 30)).square().sum().backward()
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1])


def test_arguments_that_do_not_fit_are_named():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"optimizer.kwargs .*momentum.* do not fit optimizer.name 'adamw'"):
        build_optimizer(OptimizerConfig(name="adamw", kwargs={"momentum": 0.9}), [parameter])
