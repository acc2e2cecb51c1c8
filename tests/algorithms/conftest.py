from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def on_processes() -> Callable[..., list[Any]]:
    """Runs each function in a thread of its own, as process i of n, with an all_reduce that sums over the threads."""

    def run(*functions: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        barrier = Barrier(len(functions), timeout=20)
        handed_in: list[Tensor] = [torch.empty(0)] * len(functions)

        def process(rank: int) -> Any:
            def all_reduce(tensor: Tensor) -> Tensor:
                handed_in[rank] = tensor
                barrier.wait()
                total = torch.stack(handed_in).sum(dim=0)
                barrier.wait()
                return total

            return functions[rank](all_reduce)

        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(process, range(len(functions))))

    return run


@pytest.fixture(autouse=True)
def same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="mask_BT")
def make_mask() -> Tensor:
    """Responses of 5, 1, 0, 7 and 3 tokens, padded to 7."""
    return torch.arange(7) < torch.tensor([5, 1, 0, 7, 3])[:, None]
