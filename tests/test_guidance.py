"Guidance: closed forms on mixtures, who is asked how often, and what a network may keep from one step to the next."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch.guidance import bind, by_classifier, cfg, cfgpp_scale, combine, from_w, together
from stable_diffusion_scratch.samplers import ddim, karras_sigmas, last
from stable_diffusion_scratch.score import GaussianMixture

double = {"dtype": torch.float64}
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]], **double)
CLASSES = [GaussianMixture(1.0, MEANS[k : k + 1], 0.3) for k in range(3)]
ALL = GaussianMixture([1.0, 1.0, 1.0], MEANS, 0.3)
X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), **double)


class Network:
    "A stand-in: context [b 1] is a class (-1: none), the answer is exact; it writes down every call."

    def __init__(self):
        self.calls, self.contexts = [], []

    def __call__(self, x, sigma, context=None):
        self.calls.append((len(x), tuple(torch.as_tensor(sigma).shape)))
        self.contexts.append(context)
        if context is None:
            return ALL.denoise(x, sigma)
        assert len(context) == len(x)
        rows, levels = [], torch.as_tensor(sigma).expand(len(x))
        for point, level, label in zip(x, levels, context[:, 0].tolist(), strict=True):
            rows.append((CLASSES[label] if label >= 0 else ALL).denoise(point[None], level))
        return torch.cat(rows)

    method = __call__


def label(k, b=1):
    return torch.full((b, 1), k)


def pair(net, b=1):
    return bind(net, label(0, b)), bind(net, label(-1, b))


@pytest.mark.parametrize("s", [-1.0, 0.5, 2.0, 7.5])
@pytest.mark.parametrize("sigma", [torch.tensor(0.7, **double), torch.linspace(0.1, 3.0, 5, **double)])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_guided_score_is_that_of_bayes(s, sigma, rows):
    "Its score is grad log p(x) + s grad log p(c|x), by autograd on the noised densities."
    x = X.clone().requires_grad_()
    joint, plain = CLASSES[0].log_prob(x, sigma), ALL.log_prob(x, sigma)
    (slope,) = torch.autograd.grad((plain + s * (joint - plain)).sum(), x)
    net = Network()
    guided = cfg(*pair(net, rows), s)(X, sigma)
    assert_close(guided, X + sigma.reshape(-1, 1) ** 2 * slope, rtol=0, atol=1e-10)
    assert net.calls == [(10, (10,) if sigma.ndim else ())]  # one call; one level stays one


def test_no_one_is_asked_in_vain():
    net, sigma = Network(), torch.tensor(1.0, **double)
    cond, uncond = pair(net)
    assert_close(cfg(cond, uncond, 1.0)(X, sigma), CLASSES[0].denoise(X, 1.0))
    assert_close(cfg(cond, uncond, 0.0)(X, sigma), ALL.denoise(X, 1.0))
    assert_close(cfg(cond, uncond, 9.0, interval=(2.0, 3.0))(X, sigma), CLASSES[0].denoise(X, 1.0))
    assert [len(c) for c in net.contexts] == [5, 5, 5] and [n for n, _ in net.calls] == [5, 5, 5]
    assert net.contexts[0].unique().tolist() == [0] and net.contexts[1].unique().tolist() == [-1]
    cfg(cond, uncond, 0.0, rescale=0.5)(X, sigma)  # here the spread of the conditional is needed
    assert net.calls[-1][0] == 10


def test_other_networks_are_asked_by_themselves_and_none_is_not_stacked():
    one, two = Network(), Network()
    d = cfg(bind(one, label(0)), bind(two, label(-1)), 3.0)(X, 1.0)
    assert one.calls == [(5, ())] and two.calls == [(5, ())]
    assert_close(d, cfg(CLASSES[0].denoise, ALL.denoise, 3.0)(X, 1.0))
    assert_close(d, cfg(bind(one, label(0)), bind(one, None), 3.0)(X, 1.0))
    assert [n for n, _ in one.calls[1:]] == [5, 5]


def test_a_method_is_one_network():
    "obj.method is a new object each time it is looked up."
    net = Network()
    cfg(bind(net.method, label(0)), bind(net.method, label(-1)), 3.0)(X, 1.0)
    assert [n for n, _ in net.calls] == [10]


def test_interval_is_open_below_closed_above_and_per_sample():
    net = Network()
    levels = torch.tensor([0.5, 0.6, 1.0, 1.5, 1.6], **double)
    guided = cfg(*pair(net), 3.0, interval=(0.5, 1.5))
    inside = torch.tensor([False, True, True, True, False])[:, None]
    free, full = CLASSES[0].denoise(X, levels), cfg(*pair(net), 3.0)(X, levels)
    assert_close(guided(X, levels), torch.where(inside, full, free))
    for level, within in zip(levels, inside, strict=True):
        asked = len(net.calls)
        assert_close(guided(X, level), (cfg(*pair(Network()), 3.0) if within else CLASSES[0].denoise)(X, level))
        assert net.calls[asked][0] == (10 if within else 5)


def test_scale_may_be_a_function_or_one_for_each():
    cond, uncond = pair(Network())
    levels = torch.tensor([0.5, 0.6, 1.0, 1.5, 1.6], **double)
    for scales in (levels * 2, (levels * 2).float().double()):
        each = torch.cat([cfg(cond, uncond, s)(x[None], v) for x, v, s in zip(X, levels, scales, strict=True)])
        assert_close(cfg(cond, uncond, scales)(X, levels), each)
    assert_close(cfg(cond, uncond, lambda sigma: 2 * sigma)(X, levels), each)
    with pytest.raises(ValueError, match=r"scale of shape \[3\].*\[5\]"):
        cfg(cond, uncond, torch.ones(3))(X, levels)


@given(w=st.floats(-2, 10))
def test_both_conventions(w):
    c, u = CLASSES[0].denoise, ALL.denoise
    ours = cfg(c, u, from_w(w))(X, 0.8)
    assert_close(ours, (1 + w) * c(X, 0.8) - w * u(X, 0.8), rtol=0, atol=1e-10)
    assert_close(cfg(c, u, from_w(lambda sigma: w * sigma))(X, 0.8), cfg(c, u, 1 + w * 0.8)(X, 0.8))


def test_negative_prompt_is_another_context():
    net = Network()
    away = cfg(bind(net, label(0)), bind(net, label(1)), 2.5)(X, 1.0)
    a, b = CLASSES[0].denoise(X, 1.0), CLASSES[1].denoise(X, 1.0)
    assert_close(away, b + 2.5 * (a - b))
    assert net.calls == [(10, ())]


@settings(deadline=None)
@given(s=st.floats(1.1, 20.0), sigma=st.floats(0.05, 20.0))
def test_rescale(s, sigma):
    "At 1 each answer has the conditional one's spread; between 0 and 1 it lies between."
    shape = (4, 3, 5, 5)
    g = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, *shape, generator=g, **double)
    c, u = (lambda x, sigma: x + one), (lambda x, sigma: x / 2 + two)
    x = sigma * torch.randn(shape, generator=g, **double)
    d0, d1, half = (cfg(c, u, s, rescale=r)(x, sigma) for r in (0.0, 1.0, 0.5))
    spread = lambda d: d.flatten(1).std(1)  # noqa: E731
    assert_close(spread(d1), spread(c(x, sigma)))
    assert_close(half, (d0 + d1) / 2)
    ratio = (d1 / d0).flatten(1)
    assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-6, atol=0)  # one factor for each picture
    assert_close(cfg(c, u, 1.0, rescale=1.0)(x, sigma), c(x, sigma))


@pytest.mark.daily
def test_rescale_is_that_of_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    g = torch.Generator().manual_seed(2)
    c, u, x = torch.randn(3, 4, 4, 8, 8, generator=g, **double)
    plain = cfg(lambda *_: c, lambda *_: u, 7.5)(x, 1.0)
    ours = cfg(lambda *_: c, lambda *_: u, 7.5, rescale=0.7)(x, 1.0)
    assert_close(ours, rescale_noise_cfg(plain, c, guidance_rescale=0.7))


@pytest.mark.parametrize("sigma", [torch.tensor(0.7, **double), torch.linspace(0.1, 3.0, 5, **double)])
def test_a_combination_is_the_denoiser_of_a_product_of_powers(sigma):
    net = Network()
    branches = [bind(net, label(k)) for k in (-1, 0, 1)]
    x = X.clone().requires_grad_()
    powers = sum(w * m.log_prob(x, sigma) for w, m in zip((-0.5, 3.0, -1.5), (ALL, *CLASSES[:2]), strict=True))
    (slope,) = torch.autograd.grad(powers.sum(), x)
    found = combine(branches, [-0.5, 3.0, -1.5])(X, sigma)
    assert_close(found, X + sigma.reshape(-1, 1) ** 2 * slope, rtol=0, atol=1e-10)
    assert [n for n, _ in net.calls] == [15]  # three branches, one call
    assert_close(combine(branches[:2], [-1.0, 2.0])(X, sigma), cfg(branches[1], branches[0], 2.0)(X, sigma))


def test_a_combination_asks_only_who_counts_and_keeps_contexts():
    net = Network()
    branches = [bind(net, label(k)) for k in (-1, 0, 1)]
    late = combine(branches, [lambda v: 0.0 if v > 1 else -1.0, 1.0, lambda v: float(v <= 1)])
    for level in (4.0, 2.0, 1.0, 0.5):
        late(X, torch.tensor(level, **double))
    assert [n for n, _ in net.calls] == [5, 5, 15, 15]
    assert net.contexts[0] is net.contexts[1] and net.contexts[2] is net.contexts[3]
    half = combine([lambda x, sigma: x / 2, lambda x, sigma: x / 3], [3.0, -2.0])
    assert half(X.float(), torch.tensor(1.0, **double)).dtype == torch.float32


def test_a_combination_refuses_weights_that_are_none():
    with pytest.raises(ValueError, match=r"sum to 1.5"):
        combine([ALL.denoise, CLASSES[0].denoise], [1.0, 0.5])(X, 1.0)
    with pytest.raises(ValueError, match="3 weights for 2 denoisers"):
        combine([ALL.denoise, CLASSES[0].denoise], [1.0, 0.5, -0.5])


@pytest.mark.parametrize("sigma", [0.4, torch.tensor(0.7, **double), torch.linspace(0.1, 3.0, 5, **double)])
def test_a_classifier_guides_as_two_branches_do(sigma):
    "The classifier of the mixture by Bayes, and also under inference mode."
    log_a = lambda x, sigma: CLASSES[0].log_prob(x, sigma) - ALL.log_prob(x, sigma)  # noqa: E731
    level = torch.as_tensor(sigma, **double)
    guided = by_classifier(ALL.denoise, lambda x, v: log_a(x, torch.as_tensor(v, **double)), 2.5)
    expected = cfg(CLASSES[0].denoise, ALL.denoise, 2.5)(X, level)
    assert_close(guided(X, sigma), expected, rtol=0, atol=1e-10)
    with torch.inference_mode():
        assert_close(guided(X.clone(), sigma), expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert not guided(X, sigma).requires_grad


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_cfgpp_takes_the_steps_of_the_paper(weight):
    """Chung 2024, reverse diffusion with CFG++, written with its alpha-bars and its predicted
    noises in the VP frame; ours is `ddim` under `cfg`."""
    bars = torch.linspace(0.01, 0.999, 12, **double)
    alpha, spread = bars.sqrt(), (1 - bars).sqrt()
    levels = torch.cat([spread / alpha, torch.zeros(1, **double)])
    noise = lambda m, x_t, a, s: (x_t - a * m.denoise(x_t / a, s / a)) / s  # noqa: E731
    x_t = X.clone()
    for i in range(len(bars)):
        c, u = (noise(m, x_t, alpha[i], spread[i]) for m in (CLASSES[0], ALL))
        guess = (x_t - spread[i] * (u + weight * (c - u))) / alpha[i]
        x_t = alpha[i + 1] * guess + spread[i + 1] * u if i + 1 < len(bars) else guess
    guided = cfg(CLASSES[0].denoise, ALL.denoise, cfgpp_scale(weight, levels))
    assert_close(last(ddim(guided, X / alpha[0], levels)).x, x_t, rtol=0, atol=1e-9)


def test_cfgpp_is_for_its_own_levels():
    sigmas = karras_sigmas(6, 0.05, 5.0)
    scale = cfgpp_scale(0.6, sigmas)
    assert scale(sigmas[-2]) == pytest.approx(0.6)  # the last step goes to 0
    assert_close(scale(sigmas[:3]), torch.stack([scale(v) for v in sigmas[:3]]))
    assert scale(sigmas[1].float()) == pytest.approx(scale(sigmas[1]))
    with pytest.raises(ValueError, match=r"sigma = 2.345 is none of CFG\+\+'s levels"):
        scale(2.345)
    with pytest.raises(ValueError, match="levels that fall"):
        cfgpp_scale(0.6, sigmas.flip(0))
    with pytest.raises(ValueError, match="levels that fall"):
        cfgpp_scale(0.6, sigmas[:1])


def test_the_batch_of_each_call_follows_the_interval():
    "Twelve steps under an interval: both branches inside, one outside, one call a step throughout."
    net, sigmas = Network(), karras_sigmas(12, 0.05, 8.0)
    last(ddim(cfg(*pair(net), 4.0, interval=(0.3, 2.0), rescale=0.5), 8 * X, sigmas))
    inside = [10 if 0.3 < v <= 2.0 else 5 for v in sigmas[:-1].tolist()]
    assert [n for n, _ in net.calls] == inside and {5, 10} == set(inside)


def test_a_guided_denoiser_is_a_denoiser():
    "Guidance of guidance, and a sampler that knows nothing of it."
    net = Network()
    inner = cfg(*pair(net), 2.0)
    outer = cfg(inner, bind(net, label(2)), 1.5)
    a, u, n = (m.denoise(X, 1.0) for m in (CLASSES[0], ALL, CLASSES[2]))
    assert_close(outer(X, 1.0), n + 1.5 * (u + 2.0 * (a - u) - n))
    end = last(ddim(outer, 5 * X, karras_sigmas(8, 0.05, 5.0))).x
    assert end.shape == X.shape and end.isfinite().all()


def test_together_keeps_the_order_and_joins_what_can_be_joined():
    one, two = Network(), Network()
    parts = [bind(one, label(0)), bind(two, label(1)), ALL.denoise, bind(one, label(2, 5)), bind(one, None)]
    answers = together(*parts)(X, 0.9)
    for answer, truth in zip(answers, [CLASSES[0], CLASSES[1], ALL, CLASSES[2], ALL], strict=True):
        assert_close(answer, truth.denoise(X, 0.9))
    assert one.calls == [(10, ()), (5, ())] and two.calls == [(5, ())]


def test_the_network_sees_the_same_context_object_at_every_step():
    "So that it may keep keys and values by identity. Also for one branch alone, and for tuples."
    net = Network()
    cond, uncond = pair(net)
    sigmas = karras_sigmas(6, 0.05, 5.0)
    last(ddim(cfg(cond, uncond, 3.0), 5 * X, sigmas))
    assert len(net.contexts) == 6 and all(c is net.contexts[0] for c in net.contexts)
    assert net.contexts[0][:, 0].tolist() == [0] * 5 + [-1] * 5

    net.contexts.clear()
    last(ddim(cfg(cond, uncond, 3.0, interval=(0.5, 2.0)), 5 * X, sigmas))
    joint = {id(c) for c in net.contexts if len(c) == 10}
    alone = {id(c) for c in net.contexts if len(c) == 5}
    assert len(joint) == len(alone) == 1 and len(net.contexts) == 6

    seen = []

    def base(x, sigma, context):
        seen.append(context)
        return x * context[0][:, :1] + context[1]["more"]

    one = bind(base, (torch.ones(1, 2, **double), {"more": torch.zeros(5, 2, **double)}))
    two = bind(base, (torch.zeros(5, 2, **double), {"more": torch.ones(1, 2, **double)}))
    ask = together(one, two)
    assert_close(torch.stack(ask(X, 1.0)), torch.stack([X, torch.ones_like(X)]))
    ask(X, 0.5)
    assert seen[0] is seen[1] and seen[0][0].shape == (10, 2)
    same = torch.zeros(5, 1, dtype=torch.long)
    bind(net, same)(X, 1.0)
    assert net.contexts[-1] is same  # nothing to do, nothing copied


def test_a_context_that_is_trained_gets_its_gradient_at_every_call():
    word = torch.zeros(1, 2, requires_grad=True, **double)
    fixed = torch.ones(1, 2, **double)
    base = lambda x, sigma, context: x + context  # noqa: E731
    guided = cfg(bind(base, word), bind(base, fixed), 3.0)
    with torch.no_grad():
        guided(X, 1.0)
    for _ in range(2):
        (slope,) = torch.autograd.grad(guided(X, 1.0).sum(), word)
        assert_close(slope, torch.full((1, 2), 15.0, **double))


def test_what_inference_mode_made_is_not_used_in_training():
    weight = torch.ones(2, requires_grad=True, **double)
    base = lambda x, sigma, context: x * weight * context  # noqa: E731
    guided = cfg(bind(base, torch.ones(1, 2, **double)), bind(base, torch.zeros(1, 2, **double)), 3.0)
    with torch.inference_mode():
        guided(X, 1.0)
    guided(X, 1.0).sum().backward()
    assert_close(weight.grad, 3 * X.sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1.3, torch.tensor(1.3, **double), torch.full((5,), 1.3, **double)])
def test_dtype_and_shape_are_those_of_x(dtype, sigma):
    c, u = (lambda x, sigma: x / 2), (lambda x, sigma: x / 3)
    x = torch.randn(5, 3, 4, 4).to(dtype)
    for d in (cfg(c, u, 3.0), cfg(c, u, lambda s: 2 * s, interval=(1, 2), rescale=0.7)):
        assert d(x, sigma).shape == x.shape and d(x, sigma).dtype == dtype


def test_errors_name_what_is_wrong():
    net, base = Network(), (lambda x, sigma, context: x)
    with pytest.raises(ValueError, match=r"shape \[3, 1\] for 5 pictures.*1 or 5"):
        bind(net, label(0, 3))(X, 1.0)
    with pytest.raises(ValueError, match=r"\[1, 4, 2\] and \[1, 7, 2\] cannot be asked together"):
        cfg(bind(base, torch.zeros(1, 4, 2)), bind(base, torch.zeros(1, 7, 2)), 3.0)(X, 1.0)
    with pytest.raises(ValueError, match=r"denoiser 1 answered with shape \[5, 1\] to x of shape \[5, 2\]"):
        cfg(ALL.denoise, lambda x, sigma: x[:, :1], 3.0)(X, 1.0)
    with pytest.raises(ValueError, match=r"interval = \(2, 1\)"):
        cfg(ALL.denoise, ALL.denoise, 3.0, interval=(2, 1))
    with pytest.raises(ValueError, match=r"rescale = 1.5"):
        cfg(ALL.denoise, ALL.denoise, 3.0, rescale=1.5)
    with pytest.raises(TypeError, match=r"context of type int"):
        bind(net, 3)
