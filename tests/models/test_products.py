from __future__ import annotations

import torch

from kdcache.models import products
from kdcache.models.products import hidden_gradient, logits_of
from tests.loops import loop

SHAPES = [(1, 1, 1), (1, 50, 7), (7, 290, 16), (128, 3000, 64), (0, 50, 8), (33, 1, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def make(num_positions: int, vocab_size: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_positions, width), (vocab_size, width), (vocab_size,), (num_positions, vocab_size)]
    hidden, weight, bias, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype).requires_grad_(), bias.to(dtype), grad.to(dtype)


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Hold the error of ``found`` to the plain product's, both against float64 and relative to the whole product."""
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    size = exact.norm()
    usual, mine = ((product.double() - exact).norm() for product in (plain, found))
    # oneDNN adds up in another order, without blocks: two to three units of the last place instead of one.
    assert mine <= 3 * usual + torch.finfo(plain.dtype).eps * size


@loop("dtype", DTYPES, ids=str)
@loop("shape", SHAPES, ids=str)
@loop("with_bias", [False, True])
def test_products_are_as_good_as_plain_ones(shape, dtype, with_bias):
    hidden, weight, bias, grad = make(*shape, dtype)
    bias = bias if with_bias else None
    exact_bias = 0.0 if bias is None else bias.double()
    with torch.no_grad():
        plain = torch.nn.functional.linear(hidden, weight, bias)
        exact = hidden.double() @ weight.double().T + exact_bias
    assert_as_good(logits_of(hidden, weight, bias), plain, exact)
    with torch.no_grad():
        assert_as_good(hidden_gradient(grad, weight), grad @ weight, grad.double() @ weight.double())


def test_results_need_no_gradient_and_repeat_to_the_bit():
    hidden, weight, _, grad = make(64, 500, 32, torch.float32)
    first, second = logits_of(hidden, weight), logits_of(hidden, weight)
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert torch.equal(hidden_gradient(grad, weight), hidden_gradient(grad, weight))


def test_odd_strides_are_fine():
    hidden, weight, bias, grad = make(12, 60, 8, torch.float32)
    apart = torch.stack([weight.detach()] * 2, dim=2)[:, :, 0]
    columns = hidden.T.contiguous().T
    assert not apart.is_contiguous()
    assert not columns.is_contiguous()
    torch.testing.assert_close(logits_of(columns, apart, bias), logits_of(hidden, weight, bias))
    torch.testing.assert_close(hidden_gradient(grad, apart), hidden_gradient(grad, weight))
    narrowed = weight.detach()[:20]  # a padded vocabulary without its padding
    torch.testing.assert_close(logits_of(hidden, narrowed), logits_of(hidden, weight)[:, :20])


def test_without_onednn_the_plain_products_are_used(monkeypatch):
    hidden, weight, bias, grad = make(12, 60, 8, torch.float32)
    fast = logits_of(hidden, weight, bias), hidden_gradient(grad, weight)
    monkeypatch.setattr(products, "_onednn_linear", lambda: None)
    with torch.no_grad():
        assert torch.equal(logits_of(hidden, weight, bias), torch.nn.functional.linear(hidden, weight, bias))
        assert torch.equal(hidden_gradient(grad, weight), grad @ weight)
    torch.testing.assert_close(fast, (logits_of(hidden, weight, bias), hidden_gradient(grad, weight)))


def test_the_fast_way_is_there_where_torch_has_onednn():
    # Fails when torch renames the operator: the products would then be right but slow, which nothing else would show.
    if torch.backends.mkldnn.is_available():
        assert products._onednn_linear() is not None
