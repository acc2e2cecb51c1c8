"""Products by oneDNN: they are those of fp32, whatever the layout, and errors are torch's own."""

import pytest
import torch
from torch.backends import mkldnn

from solotune.models import products

PRECISION_IS_A_SETTING = products._precision() == "none"


@pytest.fixture
def everything_is_large(monkeypatch):
    """The small products of a test take the path of large ones."""
    if not (mkldnn.is_available() and PRECISION_IS_A_SETTING and products._is_exact()):
        pytest.skip("oneDNN is not there, or rounds to bf16 on this processor")
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 1)


def layouts(rows: int, columns: int) -> list[torch.Tensor]:
    """The same matrix, as it lies in memory otherwise."""
    plain = torch.randn(rows, columns)
    in_wider = torch.zeros(rows, columns + 3)
    in_wider[:, 1:-2] = plain
    spread = torch.zeros(2 * rows, columns)
    spread[::2] = plain
    return [plain, plain.T.contiguous().T, in_wider[:, 1:-2], spread[::2]]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 32, 48), (64, 96, 128), (37, 101, 53), (0, 64, 64)])
def test_a_product_is_that_of_fp32_in_every_layout(rows, inner, columns, everything_is_large):
    for a in layouts(rows, inner):
        for b in layouts(inner, columns):
            wanted = a.double() @ b.double()
            torch.testing.assert_close(products._mm(a, b).double(), wanted, atol=1e-4, rtol=0)
            c = torch.randn(rows, columns)
            wanted = 0.5 * c.double() - 2 * wanted
            found = products._addmm(c, a, b, beta=0.5, alpha=-2)
            torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=0)
            assert products._addmm_(c, a, b, beta=0.5, alpha=-2) is c
            assert torch.equal(c, found)
            bias = torch.randn(columns)
            wanted = torch.addmm(bias.double(), a.double(), b.double())
            torch.testing.assert_close(products._addmm(bias, a, b).double(), wanted, atol=1e-4, rtol=0)


def test_no_bit_of_a_factor_is_lost(everything_is_large):
    factors = 1 + torch.arange(2**16).view(256, 256) * 2.0**-23
    assert torch.equal(products._mm(factors, torch.eye(256)), factors)
    assert torch.equal(products._mm(torch.eye(256), factors), factors)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2, 3), torch.ones(4, 5)),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(3), torch.ones(3, 2)),
        (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64)),
        (torch.ones(()), torch.ones(3, 2)),
    ],
)
def test_errors_are_those_of_torch(a, b, everything_is_large):
    with pytest.raises(RuntimeError) as wanted:
        torch.ops.aten.mm.out(a, b, out=torch.empty(0))
    with pytest.raises(RuntimeError) as found:
        products._mm(a, b)
    assert str(found.value) == str(wanted.value)
    assert mkldnn.matmul.fp32_precision == "none"


def test_a_process_multiplies_by_what_is_faster():
    """Whatever that is here, gradients included; attention and other settings of torch stay as they were."""
    is_replaced = products.use_fastest_products("cpu")
    assert products.use_fastest_products(torch.device("cpu")) == is_replaced
    x_NI = torch.randn(256, 128, requires_grad=True)
    layer = torch.nn.Linear(128, 128)
    layer(x_NI).square().sum().backward()
    wide = torch.nn.Linear(128, 128).double()
    wide.load_state_dict(layer.state_dict())
    x_wide_NI = x_NI.detach().double().requires_grad_()
    wide(x_wide_NI).square().sum().backward()
    for found, wanted in ((x_NI.grad, x_wide_NI.grad), (layer.weight.grad, wide.weight.grad)):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=0)
    if PRECISION_IS_A_SETTING:
        assert mkldnn.matmul.fp32_precision == "none"
        out = torch.empty(0)
        products._allow("bf16" if is_replaced else "none")
        torch.ops.aten.mm.out(x_NI.detach(), layer.weight.detach(), out=out)
        products._allow("none")
        assert torch.equal(x_NI.detach() @ layer.weight.detach(), out)


def test_nothing_is_done_where_it_does_not_belong(monkeypatch):
    assert not products.use_fastest_products("meta")
    monkeypatch.setattr(products, "_precision", lambda: "ieee")  # somebody else's choice
    assert not products._replace_kernels.__wrapped__()
    monkeypatch.setattr(products, "_precision", lambda: "none")
    monkeypatch.setattr(products, "_is_exact", lambda: False)
    assert not products._replace_kernels.__wrapped__()
    monkeypatch.setattr(products, "_is_exact", lambda: True)
    monkeypatch.setattr(products, "_gain", lambda: 1.2)
    assert not products._replace_kernels.__wrapped__()
