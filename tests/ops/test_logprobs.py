"""Chunked log-probabilities under a frozen head, against the plain formula and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from trl_ext.ops.logprobs import token_logprobs

N, H, V = 7, 5, 11
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 1.5},
    "scale": {"logit_scale": 0.4},
    "all": {"temperature": 1.3, "softcap": 2.0, "logit_scale": 1.7},
}


@pytest.fixture
def tensors():
    """hidden (N, H), weight (V, H), targets (N,), bias (V,) in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return randn(N, H), randn(V, H), torch.randint(V, (N,), generator=generator), randn(V)


def plain(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """The definition, with the (N, V) logits."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def test_by_hand():
    # Logits h W = (ln 2, ln 6), so p = (2, 6) / 8; at temperature 1/2 the odds are squared, p = (1, 9) / 10.
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.tensor([[2.0], [6.0]]).log()
    logps, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(logps.exp(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(entropy, torch.tensor([0.5623351, 0.5623351]))  # -(1/4 ln 1/4 + 3/4 ln 3/4)
    logps, _ = token_logprobs(hidden, weight, torch.tensor([0, 1]), temperature=0.5)
    torch.testing.assert_close(logps.exp(), torch.tensor([0.1, 0.9]))


def test_a_softcap_bounds_the_logits_before_the_temperature():
    # Logits +-1000 capped to +-3, then divided by 2: p of the larger is sigmoid(3).
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    logps, _ = token_logprobs(hidden, weight, torch.tensor([0]), temperature=2.0, softcap=3.0)
    torch.testing.assert_close(logps, torch.sigmoid(torch.tensor([3.0])).log())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_plain_formula(tensors, head, chunk_size, with_bias):
    hidden, weight, targets, bias = tensors
    bias = bias if with_bias else None
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    gradients = []
    for function, options in ((plain, {}), (token_logprobs, {"chunk_size": chunk_size, "entropy_grad": True})):
        x = hidden.clone().requires_grad_()
        logps, entropy = function(x, weight, targets, bias, **head, **options)
        (logps * weights + entropy * weights.flip(0)).sum().backward()
        gradients.append((logps.detach(), entropy.detach(), x.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradcheck(tensors, head):
    hidden, weight, targets, bias = tensors
    hidden.requires_grad_()

    def both(x):
        return token_logprobs(x, weight, targets, bias, **head, chunk_size=3, entropy_grad=True)

    def logps_only(x):
        return token_logprobs(x, weight, targets, bias, **head, chunk_size=3, with_entropy=False)[0]

    assert torch.autograd.gradcheck(both, hidden)
    assert torch.autograd.gradcheck(logps_only, hidden)


def test_entropy_has_no_gradient_unless_asked(tensors):
    hidden, weight, targets, _ = tensors
    logps, entropy = token_logprobs(hidden.requires_grad_(), weight, targets)
    assert logps.requires_grad
    assert not entropy.requires_grad
    assert token_logprobs(hidden, weight, targets, with_entropy=False)[1] is None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradients_no_row_is_computed(tensors, requires_grad, monkeypatch):
    hidden, weight, targets, _ = tensors
    expected = plain(hidden, weight, targets)
    monkeypatch.setattr("trl_ext.ops.logprobs._rows", lambda *_: pytest.fail("computed a row"))
    with torch.set_grad_enabled(not requires_grad):
        outputs = token_logprobs(hidden.requires_grad_(requires_grad), weight, targets)
    assert not any(out.requires_grad for out in outputs)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_tokens(tensors, requires_grad):
    _, weight, _, _ = tensors
    hidden = weight.new_empty(0, H).requires_grad_(requires_grad)
    logps, entropy = token_logprobs(hidden, weight, torch.empty(0, dtype=torch.int64), entropy_grad=True)
    assert logps.shape == entropy.shape == (0,)
    if requires_grad:
        (logps.sum() + entropy.sum()).backward()
        assert hidden.grad.shape == (0, H)


def test_huge_logits_neither_overflow_nor_lose_the_gradient(tensors):
    hidden, weight, targets, _ = tensors
    hidden = (hidden.float() * 1e4).requires_grad_()
    logps, entropy = token_logprobs(hidden, weight.float(), targets, entropy_grad=True)
    (logps + entropy).sum().backward()
    assert logps.isfinite().all()
    assert entropy.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert (logps <= 0).all()


def test_bfloat16_statistics_are_float32(tensors):
    hidden, weight, targets, bias = tensors
    hidden, weight, bias = hidden.bfloat16().requires_grad_(), weight.bfloat16(), bias.bfloat16()
    logps, entropy = token_logprobs(hidden, weight, targets, bias)
    logps.sum().backward()
    assert logps.dtype == entropy.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    # The one rounding is that of the logits to bfloat16; what follows is exact.
    logits = F.linear(hidden, weight, bias).detach().float()
    torch.testing.assert_close(logps.detach(), logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1))


def test_mixed_dtypes_follow_the_weight_and_autocast_as_a_linear_layer_does(tensors):
    hidden, weight, targets, _ = tensors
    low = weight.bfloat16()
    mixed = token_logprobs(hidden.float(), low, targets)[0]
    torch.testing.assert_close(mixed, token_logprobs(hidden.bfloat16(), low, targets)[0], atol=0, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = hidden.float().requires_grad_()
        autocast = token_logprobs(hidden, weight.float(), targets)[0]
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast.detach(), mixed, atol=0, rtol=0)
    autocast.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_never_holds_the_logits_of_all_tokens():
    # 64 tokens in chunks of 4: no tensor that is allocated has more than 4 rows of the vocabulary.
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4)
    with Watch():
        logps, entropy = token_logprobs(hidden, weight, torch.arange(64), softcap=5.0, chunk_size=4, entropy_grad=True)
        (logps + entropy).sum().backward()
    assert largest == 4 * 1000


def test_errors(tensors):
    hidden, weight, targets, bias = tensors
    with pytest.raises(ValueError, match=r"hidden \(7, 5\), weight \(11, 4\)"):
        token_logprobs(hidden, weight[:, :4], targets)
    with pytest.raises(ValueError, match=r"targets must be int64 of shape \(7,\)"):
        token_logprobs(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="int32"):
        token_logprobs(hidden, weight, targets.int())
    with pytest.raises(ValueError, match=r"bias must be \(11,\)"):
        token_logprobs(hidden, weight, targets, bias[:5])
    with pytest.raises(ValueError, match="frozen head"):
        token_logprobs(hidden, weight.clone().requires_grad_(), targets)
    with pytest.raises(ValueError, match="frozen head"):
        token_logprobs(hidden, weight, targets, bias.clone().requires_grad_())
    for option in ({"temperature": 0.0}, {"softcap": 0.0}, {"softcap": -1.0}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            token_logprobs(hidden, weight, targets, **option)
    with pytest.raises(ValueError, match="with_entropy"):
        token_logprobs(hidden, weight, targets, with_entropy=False, entropy_grad=True)
