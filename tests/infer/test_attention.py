"""joint_attention against the float64 oracle of eq. 4: every weight, dtype, head width, kernel, and its gradients."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from infer.model import attention
from infer.model.attention import attend, attend_with_lse, attention_share, joint_attention
from shards.core.errors import UserError
from tests.support import oracle

WEIGHTS = [0.0, 1e-7, 0.03, 0.5, 1.0, 2.5]


def streams(
    width: int = 16, dtype: torch.dtype = torch.float32, tokens: int = 9, seed: int = 0, count: int = 2
) -> tuple[Tensor, ...]:
    """q, k, v of 3 pairs of `count` streams, with 2 heads."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(3, count, 2, tokens, width, generator=generator)).to(dtype) for _ in range(3))


@pytest.mark.parametrize("backend", ["merge", "bias"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("width", [13, 40, 64, 72, 80])
def test_every_weight_and_head_width_equals_the_float64_formula(backend, weight, width):
    q, k, v = streams(width)
    out, share = joint_attention(q, k, v, weight, backend=backend, share=True)
    expected, expected_share = oracle.attention(q, k, v, weight)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(share.double(), expected_share, rtol=0, atol=1e-5)
    assert out.dtype == torch.float32 and share.dtype == torch.float32
    assert share.min() >= 0 and share.max() <= 1


@pytest.mark.parametrize("laid_out", ["streams first", "heads first"])
@pytest.mark.parametrize("backend", ["merge", "bias"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_several_intrinsic_streams_all_have_the_weight_and_see_all_with_weight_one(weight, backend, laid_out):
    q, k, v = streams(count=5)
    expected, expected_share = oracle.attention(q, k, v, weight)
    if laid_out == "streams first":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    out, share = joint_attention(q, k, v, weight, backend=backend, share=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(share.double(), expected_share, rtol=0, atol=1e-5)
    weights = torch.tensor([weight, 0.4, 1.0])
    torch.testing.assert_close(
        joint_attention(q, k, v, weights, backend=backend)[0].double(),
        oracle.attention(q, k, v, weights)[0],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_with_several_intrinsic_streams_equal_the_float64_formula(weight):
    inputs = [x.requires_grad_() for x in streams(count=5)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    target = torch.randn(3, 5, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    (joint_attention(*inputs, weight, backend="bias")[0] * target).sum().backward()
    (oracle.attention(*exact, weight)[0] * target).sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", ["merge", "bias"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3), (torch.float64, 1e-12)]
)
def test_half_precision_and_double_stay_within_their_rounding(backend, dtype, tolerance):
    q, k, v = streams(dtype=dtype, tokens=5)
    for weight in (0.0, 0.3, 1.0):
        out, share = joint_attention(q, k, v, weight, backend=backend, share=True)
        expected, expected_share = oracle.attention(q, k, v, weight)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(share.double(), expected_share, rtol=0, atol=tolerance / 4)


def test_log_sum_exp_is_float32_even_for_half_precision():
    q, k, v = (x[:, 0] for x in streams(dtype=torch.bfloat16))
    _, lse = attend_with_lse(q, k, v)
    expected = torch.logsumexp(q.double() @ k.double().mT / q.shape[-1] ** 0.5, -1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", ["merge", "bias"])
def test_a_weight_for_each_pair_and_a_tensor_weight_agree_with_numbers(backend):
    q, k, v = streams()
    weights = torch.tensor([0.0, 0.4, 1.0])
    out, share = joint_attention(q, k, v, weights, backend=backend, share=True)
    expected, expected_share = oracle.attention(q, k, v, weights)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(share.double(), expected_share, rtol=0, atol=1e-5)
    one = joint_attention(q, k, v, torch.tensor(0.4), backend=backend)[0]
    torch.testing.assert_close(one, joint_attention(q, k, v, 0.4, backend=backend)[0], rtol=0, atol=1e-6)


def test_weight_zero_is_the_image_attending_to_itself_to_the_bit():
    q, k, v = streams()
    out, share = joint_attention(q, k, v, 0.0, share=True)
    assert torch.equal(out[:, 0], attend(q[:, 0], k[:, 0], v[:, 0]))
    assert not share.any()


def test_weight_one_is_plain_attention_over_the_joined_tokens():
    q, k, v = streams()
    joined = attend(*(torch.cat(x.unbind(1), -2) for x in (q, k, v)))
    torch.testing.assert_close(joint_attention(q, k, v, 1.0)[0], torch.stack(joined.chunk(2, -2), 1))


def test_the_intrinsic_stream_does_not_depend_on_the_weight():
    q, k, v = streams()
    outs = [joint_attention(q, k, v, weight, backend=b)[0][:, 1] for weight in WEIGHTS for b in ("merge", "bias")]
    for out in outs:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-6)


def test_extreme_logits_neither_overflow_nor_lose_the_share():
    q, k, v = streams()
    q = q * 200  # logits in the thousands
    out, share = joint_attention(q, k, v, 0.5, share=True)
    expected, expected_share = oracle.attention(q, k, v, 0.5)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(share.double(), expected_share, rtol=0, atol=2e-2)


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_the_plain_form_for_devices_without_a_kernel_equals_the_kernel(monkeypatch, chunk):
    monkeypatch.setattr(attention, "CHUNK_LOGITS", chunk)
    q, k, v = (x[:, 0] for x in streams(72))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        plain, kernel = attend_with_lse(q, k, v, "chunked"), attend_with_lse(q, k, v, "cpu")
        assert plain[0].dtype == dtype and plain[1].dtype == torch.float32
        for a, b in zip(plain, kernel, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("width", [40, 72, 13])
def test_the_cuda_kernels_are_called_with_arguments_they_take_and_give_the_shapes_we_say(kernel, width):
    q, k = (torch.empty(2, 3, n, width, dtype=torch.bfloat16, device="meta") for n in (10, 21))  # shapes only: no GPU
    out, lse = attend_with_lse(q, k, k, kernel)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (2, 3, 10) and lse.dtype == torch.float32


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_of_the_differentiable_form_equal_the_float64_formula(weight):
    inputs = [x.requires_grad_() for x in streams()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    target = torch.randn(3, 2, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    (joint_attention(*inputs, weight, backend="bias")[0] * target).sum().backward()
    (oracle.attention(*exact, weight)[0] * target).sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-4)


@pytest.mark.parametrize("limit", [0, 2**18])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_in_bfloat16_stay_within_its_rounding_by_plain_products_and_by_the_kernel(monkeypatch, weight, limit):
    monkeypatch.setattr(attention, "PLAIN_LOGITS", limit)
    inputs = [(x / 2).requires_grad_() for x in streams(dtype=torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    target = torch.randn(3, 2, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    (joint_attention(*inputs, weight, backend="bias")[0] * target).sum().backward()
    (oracle.attention(*exact, weight)[0] * target).sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        error = (mine.grad.double() - theirs.grad).square().mean().sqrt() / theirs.grad.square().mean().sqrt()
        assert error < 0.01, error


def test_the_weight_itself_has_a_gradient_in_the_differentiable_form():
    q, k, v = streams()
    weight, exact = torch.tensor(0.3, requires_grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    joint_attention(q, k, v, weight, backend="bias")[0].square().sum().backward()
    oracle.attention(q, k, v, exact)[0].square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_the_merged_form_is_refused_where_a_gradient_is_asked_for():
    q, k, v = streams()
    q.requires_grad_()
    with pytest.raises(UserError, match="no gradient"):
        joint_attention(q, k, v, 0.5)
    with pytest.raises(UserError, match="no gradient"):
        joint_attention(q.detach(), k, v, torch.tensor(0.5, requires_grad=True))
    with torch.no_grad():
        joint_attention(q, k, v, 0.5)
    joint_attention(q, k, v, 1.0)[0].sum().backward()  # plain calls have one
    assert q.grad is not None


def test_the_share_can_be_had_in_training_without_touching_the_graph():
    q, k, v = (x.requires_grad_() for x in streams())
    out, share = joint_attention(q, k, v, 1.0, share=True)
    assert out.requires_grad and not share.requires_grad
    torch.testing.assert_close(share.double(), oracle.attention(q, k, v, 1.0)[1].detach(), rtol=0, atol=1e-5)
    assert torch.equal(share, attention_share(q, k, 1.0))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(UserError, match="weight"):
        joint_attention(*streams(), weight)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="backend"):
        joint_attention(*streams(), 0.5, backend="magic")


def test_compiled_equals_eager_and_a_tensor_weight_compiles_once():
    q, k, v = streams()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(joint_attention, fullgraph=True, backend=counter)
    with torch.no_grad():
        for weight in (torch.tensor(0.2), torch.tensor(0.9)):
            for mine, eager in zip(
                compiled(q, k, v, weight, share=True), joint_attention(q, k, v, weight, share=True), strict=True
            ):
                torch.testing.assert_close(mine, eager, rtol=0, atol=1e-6)
        assert counter.frame_count == 1
        for weight in (0, 1):
            torch.testing.assert_close(
                compiled(q, k, v, weight)[0], joint_attention(q, k, v, weight)[0], rtol=0, atol=1e-6
            )
