"""The transformer: its formula in float64, who may see whom, and what its switches bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletrain.errors import ConfigurationError
from stabletrain.model import Transformer
from stabletrain.model.transformer import Attention
from stabletrain.precision import Precision
from stabletrain.randomness import key, keyed

SWITCHES = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["pre", "post", "sandwich"]),
        "norm_gain": st.booleans(),
        "embedding_norm": st.booleans(),
        "head_norm": st.booleans(),
        "qk_norm": st.booleans(),
        "score_clamp": st.sampled_from([None, 10.0, 0.5]),
        "logit_soft_cap": st.sampled_from([None, 30.0, 2.0]),
    }
)
ALL_NORMS = {"norm": "sandwich", "norm_gain": False, "embedding_norm": True, "head_norm": True, "qk_norm": True}


def transformer(number: int = 0, **options: Any) -> Transformer:
    """Return a model whose gains aren't 1, in evaluation mode."""
    with keyed(key("transformer", number)):
        model = Transformer(vocabulary=7, width=16, layers=2, heads=2, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model.eval()


def tokens(*shape: int, number: int = 0) -> torch.Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(number))


def by_the_formula(model: Transformer, sequence: list[int], **switch: Any) -> torch.Tensor:
    """Compute the logits of one sequence in float64 from the papers' formulas, position by position."""
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def norm(name: str, vector: torch.Tensor, wanted: bool = True) -> torch.Tensor:
        if not wanted:
            return vector
        scaled = vector / (vector.square().mean() + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] if switch["norm_gain"] else scaled

    def turned(vector: torch.Tensor, place: int) -> torch.Tensor:
        half = len(vector) // 2
        angles = place * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        product = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([product.real, product.imag])

    def attended(block: str, stream: list[torch.Tensor], at: int) -> torch.Tensor:
        results = []
        for head in range(2):
            own = slice(8 * head, 8 * head + 8)
            parts = {
                part: [(weights[f"{block}.attention.{part}.weight"] @ one)[own] for one in stream]
                for part in ("query", "key", "value")
            }
            for part in ("query", "key"):
                parts[part] = [
                    turned(norm(f"{block}.attention.{part}_norm", vector, switch["qk_norm"]), place)
                    for place, vector in enumerate(parts[part])
                ]
            scores = torch.stack([parts["query"][at] @ parts["key"][past] / math.sqrt(8) for past in range(at + 1)])
            if switch["score_clamp"] is not None:
                scores = scores.clamp(-switch["score_clamp"], switch["score_clamp"])
            shares = scores.exp() / scores.exp().sum()
            results.append(sum(share * value for share, value in zip(shares, parts["value"], strict=False)))
        return weights[f"{block}.attention.output.weight"] @ torch.cat(results)  # type: ignore[arg-type]

    def fed(block: str, vector: torch.Tensor) -> torch.Tensor:
        hidden = weights[f"{block}.feedforward.hidden.weight"] @ vector
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return weights[f"{block}.feedforward.output.weight"] @ gelu

    stream = [norm("embedding_norm", weights["embedding.weight"][one], switch["embedding_norm"]) for one in sequence]
    for block in ("blocks.0", "blocks.1"):
        if switch["norm"] == "post":
            added = [attended(block, stream, at) for at in range(len(stream))]
            stream = [norm(f"{block}.attention_norm", one + more) for one, more in zip(stream, added, strict=True)]
            stream = [norm(f"{block}.feedforward_norm", one + fed(block, one)) for one in stream]
            continue
        inner = switch["norm"] == "sandwich"
        read = [norm(f"{block}.attention_norm", one) for one in stream]
        added = [norm(f"{block}.attention_out_norm", attended(block, read, at), inner) for at in range(len(stream))]
        stream = [one + more for one, more in zip(stream, added, strict=True)]
        added = [
            norm(f"{block}.feedforward_out_norm", fed(block, norm(f"{block}.feedforward_norm", one)), inner)
            for one in stream
        ]
        stream = [one + more for one, more in zip(stream, added, strict=True)]
    rows = weights["head.weight"]
    rows = rows / rows.norm(dim=1, keepdim=True) if switch["head_norm"] else rows
    logits = torch.stack([rows @ norm("final_norm", one, switch["norm"] != "post") for one in stream])
    cap = switch["logit_soft_cap"]
    return logits if cap is None else cap * (logits / cap).tanh()


@settings(max_examples=25, deadline=None)
@given(SWITCHES, st.integers(0, 3))
def test_it_computes_the_formula_whatever_the_switches(switch: dict[str, Any], number: int) -> None:
    model = transformer(number, **switch)
    sequence = tokens(1, 6, number=number)
    with torch.no_grad():
        logits = model(sequence)[0].double()
    torch.testing.assert_close(logits, by_the_formula(model, sequence[0].tolist(), **switch), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(SWITCHES, st.integers(1, 5), st.integers(0, 4))
def test_padding_on_either_side_changes_nothing_and_gets_no_gradient(
    switch: dict[str, Any], length: int, padding: int
) -> None:
    model, sequence = transformer(**switch), tokens(length)
    alone = model(sequence[None])[0]
    none = torch.full((padding,), -1)
    filled = tokens(length + padding, number=1)
    batch = torch.stack([torch.cat([sequence, none]), torch.cat([none, sequence]), filled, torch.full_like(filled, -1)])
    logits = model(batch)
    torch.testing.assert_close(logits[0, :length], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1, padding:], alone, rtol=1e-4, atol=1e-5)  # only distances count
    assert bool(torch.isfinite(logits).all())
    torch.testing.assert_close(model([sequence, filled])[0, :length], alone, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    logits.square().sum().backward()  # also through what stands in rows that see nothing
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


def test_a_position_sees_itself_and_what_came_before() -> None:
    model, sequence = transformer(), tokens(1, 8)
    before = model(sequence)
    for place in range(8):
        changed = sequence.clone()
        changed[0, place] = (changed[0, place] + 1) % 7
        differs = (model(changed) != before).any(2)[0]
        assert differs.tolist() == [at >= place for at in range(8)]


def test_a_row_that_may_see_nothing_gives_nothing() -> None:
    attention, hidden = Attention(8, 2, qk_norm=True, score_clamp=10.0), torch.randn(2, 3, 8, requires_grad=True)
    visible = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    visible[1] = False
    added = attention(hidden, visible)
    assert int(added[1].count_nonzero()) == 0
    added.sum().backward()
    assert hidden.grad is not None
    assert int(hidden.grad[1].count_nonzero()) == 0
    assert bool(torch.isfinite(hidden.grad).all())


def multiplied(model: Transformer, factor: float, *left_out: str) -> Transformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(word in name for word in left_out):
                parameter.mul_(factor)
    return model


def test_with_all_norms_the_size_of_the_weights_means_nothing() -> None:
    # The reason why a high rate, under which weights grow, does little harm.
    sequence = tokens(2, 9)
    with torch.no_grad():
        before = transformer(**ALL_NORMS)(sequence)
        for factor in (30.0, 1e4):
            # GELU bends near 0, so that what goes into it has a size; far from there it hasn't.
            after = multiplied(transformer(**ALL_NORMS), factor, "feedforward.hidden")(sequence)
            torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
        large = multiplied(transformer(**ALL_NORMS), 1e4)(sequence)
        torch.testing.assert_close(multiplied(transformer(**ALL_NORMS), 1e7)(sequence), large, rtol=1e-2, atol=1e-2)
        bare = multiplied(transformer(), 30.0, "feedforward.hidden", "norm")(sequence)
        assert not torch.allclose(bare, transformer()(sequence), rtol=0.5, atol=0.5)


def test_each_switch_bounds_what_it_says() -> None:
    sequence = tokens(2, 9)

    def largest_logit(**options: Any) -> float:
        return multiplied(transformer(**options), 1e3, "norm")(sequence).abs().max().item()

    assert largest_logit() > 100
    assert largest_logit(logit_soft_cap=5.0) <= 5.0
    assert largest_logit(head_norm=True, norm_gain=False) <= math.sqrt(16) + 1e-5
    largest: list[float] = []
    real = torch.Tensor.softmax

    def seen(scores: torch.Tensor, *arguments: Any) -> torch.Tensor:
        largest.append(scores[scores > torch.finfo(scores.dtype).min].abs().max().item())
        return real(scores, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", seen)
        for options in ({}, {"qk_norm": True, "norm_gain": False}, {"score_clamp": 2.0}):
            multiplied(transformer(**options), 1e3, "norm")(sequence)  # type: ignore[arg-type]
    free, normed, clamped = largest[:2], largest[2:4], largest[4:]
    assert min(free) > 1e3
    assert math.sqrt(8) / 2 < max(normed) <= math.sqrt(8) + 1e-4
    assert max(clamped) == 2.0


@settings(max_examples=8, deadline=None)
@given(SWITCHES)
def test_bfloat16_is_near_float32(switch: dict[str, Any]) -> None:
    model, sequence = transformer(**switch), tokens(2, 9)
    exact = model(sequence)
    with Precision("bfloat16").autocast():
        low = model(sequence)
    low.float().square().sum().backward()
    torch.testing.assert_close(low.float(), exact, rtol=0.1, atol=0.15)
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


def test_without_gains_no_normalisation_has_a_parameter() -> None:
    model = Transformer(5, width=8, layers=1, norm_gain=False, embedding_norm=True, qk_norm=True, norm="sandwich")
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    gains = [name for name, _ in copy.deepcopy(transformer(qk_norm=True)).named_parameters() if "norm" in name]
    assert len(gains) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Transformer(5, width=10, heads=2), ["model.width=10", "model.heads=2", "divisible by 4"]),
        (lambda: Transformer(0), ["model.vocabulary", "0"]),
        (lambda: Transformer(5, layers=True), ["model.layers", "True"]),
        (lambda: Transformer(5, norm="none"), ["model.norm", "none", "pre, post, sandwich"]),
        (lambda: Transformer(5, score_clamp=0.0), ["model.score_clamp", "0.0", "null"]),
        (lambda: Transformer(5, logit_soft_cap=math.inf), ["model.logit_soft_cap", "inf"]),
    ],
)
def test_bad_arguments_get_one_message(build: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
