"""Products by oneDNN: they are those of fp32, whatever the layout, and errors are torch's own."""

import pytest
import torch
from torch.backends import mkldnn

from solotune.models import products


@pytest.fixture
def everything_is_large(monkeypatch):
    """The small products of a test take the path of large ones."""
    if not (mkldnn.is_available() and products._is_exact()):
        pytest.skip("oneDNN is not there, or not exact here")
    for least in ("LEAST_WEIGHT", "LEAST_COLUMNS"):
        monkeypatch.setattr(products, least, 1)


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
        (torch.ones(1, 3), torch.ones(4, 5)),
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
    assert products._setting.fp32_precision == "none"


def test_a_sum_in_place_does_not_change_its_size(everything_is_large):
    base = torch.zeros(4, 160)
    for c in (base[1], base[:1]):
        with pytest.raises(RuntimeError, match=r"shape"):
            products._addmm_(c, torch.ones(160, 160), torch.ones(160, 160))
    assert base.shape == (4, 160)
    assert not base.any()


@pytest.mark.parametrize(("inner", "columns"), [(768, 768), (512, 3072), (1024, 64), (384, 1705), (2048, 256)])
def test_a_row_does_not_depend_on_the_rows_beside_it(inner, columns):
    """To the last bit: log-probs of a sample are those of a smaller batch, so that the first ratio is 1."""
    if not products.use_fastest_products("cpu"):
        pytest.skip("MKL is as fast here")
    x_NI, w_IO = torch.randn(768, inner), torch.randn(columns, inner).T
    whole = x_NI @ w_IO
    for rows in (1, 2, 3, 4, 31, 86, 171, 342, 700):
        assert torch.equal(x_NI[:rows] @ w_IO, whole[:rows])
        assert torch.equal(x_NI[-rows:] @ w_IO, whole[-rows:])


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
    assert products._setting.fp32_precision == "none"
    if is_replaced:
        out = torch.empty(0)
        with products._by_onednn():
            torch.ops.aten.mm.out(wanted_by := x_NI.detach(), wide_by := torch.ones(128, 512), out=out)
        assert torch.equal(wanted_by @ wide_by, out)


def test_nothing_is_done_where_it_does_not_belong(monkeypatch):
    assert not products.use_fastest_products("meta")
    for name, answer in (("_is_exact", False), ("_is_slow_by_mkl", False)):
        with monkeypatch.context() as patch:
            patch.setattr(products, name, lambda *_, answer=answer: answer)
            assert not products._replace_kernels.__wrapped__()
    products._setting.fp32_precision = "ieee"  # somebody else's choice
    try:
        assert not products._replace_kernels.__wrapped__()
    finally:
        products._setting.fp32_precision = "none"


CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: 25\nflags\t\t: fpu avx512f\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("text", "capability", "is_slow"),
    [
        (CPUINFO.format("AuthenticAMD"), "AVX512", True),
        (CPUINFO.format("AuthenticAMD"), "AVX2", False),
        (CPUINFO.format("GenuineIntel"), "AVX512", False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n", "DEFAULT", False),
        ("", "AVX512", False),
    ],
)
def test_it_goes_by_the_processor(monkeypatch, text, capability, is_slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._is_slow_by_mkl(text) == is_slow


def test_what_surrounds_the_trial_has_no_say():
    exact = products._is_exact()
    torch.set_default_dtype(torch.float64)
    try:
        assert products._is_exact() == exact
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gpu_may_round_to_tf32_beside_16_bit_weights(monkeypatch):
    setting, fp32, bf16 = torch.backends.cuda.matmul, torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    assert not products.allow_tf32_beside([bf16]), "they are on a CPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    try:
        assert not products.allow_tf32_beside([fp32, fp32])
        assert setting.fp32_precision == "none"
        setting.fp32_precision = "ieee"  # somebody else's choice
        assert not products.allow_tf32_beside([fp32, bf16])
        assert setting.fp32_precision == "ieee"
        setting.fp32_precision = "none"
        for _ in range(2):
            assert products.allow_tf32_beside([fp32, bf16])
            assert setting.fp32_precision == "tf32"
            assert setting.allow_tf32, "and reading the older name is no error"
            assert torch.get_float32_matmul_precision() == "high"
        assert not products.allow_tf32_beside([fp32]), "a later model that is fp32 has all its bits"
        assert setting.fp32_precision == "none"
        assert not setting.allow_tf32
        setting.allow_tf32 = True  # somebody else's choice again
        assert products.allow_tf32_beside([fp32])
    finally:
        setting.allow_tf32 = False
        setting.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_attention_on_a_gpu_is_not_cudnns():
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert products.use_fastest_products("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
