"""Precision: what autocast makes of a computation, and what is put back afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stabletrain import ConfigurationError
from stabletrain.precision import Precision


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_matrix_products_have_the_format_that_was_asked_for(dtype: str, expected: torch.dtype) -> None:
    with Precision(dtype).autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == expected


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("softmax", lambda x: F.softmax(x, dim=-1)),
        ("log_softmax", lambda x: x.log_softmax(-1)),
        ("layer_norm", lambda x: F.layer_norm(x, x.shape[-1:])),
        ("sum", lambda x: x.sum()),
        ("mean", lambda x: torch.mean(x)),
        ("exp", torch.exp),
        ("power", lambda x: x**2),
        ("norm", lambda x: x.norm()),
        ("logsumexp", lambda x: torch.logsumexp(x, -1)),
    ],
)
def test_on_the_cpu_float16_keeps_islands_of_float32(name: str, function: Any) -> None:
    half = torch.full((2, 400), 11.5, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        assert function(half).dtype == torch.float16, "torch does it by itself now; the islands can go"
    with Precision("float16").autocast():
        found = function(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), function(half.double()), rtol=1e-5, atol=1e-6)


def test_a_sum_that_overflows_float16_survives() -> None:
    with Precision("float16").autocast():
        product = torch.full((1, 300), 300.0) @ torch.ones(300, 1)  # 90,000 is beyond float16's 65,504
        assert torch.isinf(product).all()
        small = torch.full((300, 1), 1.0) @ torch.full((1, 300), 10.0)
        assert torch.isfinite(small.sum())
        assert float(small.sum()) == 900_000.0


def test_a_layer_normalisation_module_computes_in_float32_under_float16() -> None:
    norm = nn.LayerNorm(8)
    with Precision("float16").autocast():
        hidden = nn.Linear(8, 8)(torch.randn(2, 8))
        assert hidden.dtype == torch.float16
        assert norm(hidden).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_in_reduced_precision_on_any_cpu(kind: Any, dtype: str) -> None:
    layer, before = kind(3, 4, batch_first=True), nn.Linear(2, 3)
    state = torch.get_rng_state()
    with Precision(dtype).autocast():
        hidden = layer(before(torch.zeros(2, 5, 2)))[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert dtype == "bfloat16" or hidden.dtype == torch.float32
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_only_float16_scales_the_loss() -> None:
    assert Precision("float32").scaler is None
    assert Precision("bfloat16").scaler is None
    loss = torch.tensor(1.5)
    assert Precision("bfloat16").scale(loss) is loss
    assert float(Precision("float16", initial_scale=1024.0).scale(loss)) == 1536.0


def test_the_scaler_round_trips() -> None:
    one, other = Precision("float16", initial_scale=1024.0), Precision("float16")
    one.scale(torch.ones(()))
    other.load_state_dict(one.state_dict())
    assert float(other.scale(torch.ones(()))) == 1024.0
    plain = Precision("float32")
    plain.load_state_dict(one.state_dict())
    assert plain.state_dict() == {}


def test_the_format_of_products_is_put_back() -> None:
    backends: Any = torch.backends
    leaves = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
    before = [leaf.fp32_precision for leaf in leaves]
    with Precision("float32", matmul="tf32").active():
        assert [leaf.fp32_precision for leaf in leaves] == ["tf32", "tf32", "tf32", "ieee"]
        with Precision("float32").active():
            assert [leaf.fp32_precision for leaf in leaves] == ["ieee"] * 4
        assert leaves[0].fp32_precision == "tf32"
    assert [leaf.fp32_precision for leaf in leaves] == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp16"}, "precision.dtype is 'fp16'; allowed: float32, bfloat16, float16"),
        ({"matmul": "fast"}, "precision.matmul is 'fast'; allowed: ieee, tf32"),
        ({"dtype": "float16", "initial_scale": 0.5}, "the first loss scale is 0.5"),
        ({"dtype": "float16", "initial_scale": float("nan")}, "the first loss scale is nan"),
        ({"dtype": "float16", "growth_interval": 0}, "grows every 0 updates"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Precision(**options)
