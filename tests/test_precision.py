"""Precision: what autocast makes of a computation, and what is put back afterwards."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from processes import run
from stabletrain import ConfigurationError
from stabletrain.precision import Precision


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_matrix_products_have_the_format_that_was_asked_for(dtype: str, expected: torch.dtype) -> None:
    with Precision(dtype).autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == expected


ISLANDS: dict[str, Any] = {
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(x, 4),
    "sum": lambda x: x.sum(),
    "mean": lambda x: torch.mean(x),
    "exp": torch.exp,
    "power": lambda x: x**2,
    "norm": lambda x: x.norm(),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "logsigmoid": F.logsigmoid,
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, torch.zeros_like(x), torch.ones_like(x)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ISLANDS)
def test_on_the_cpu_reduced_formats_keep_islands_of_float32(name: str, dtype: torch.dtype) -> None:
    function = ISLANDS[name]
    reduced = (torch.arange(1600).reshape(4, 400) % 37 / 4 + 2).to(dtype)
    with torch.autocast("cpu", dtype):
        assert function(reduced).dtype == dtype, "torch does it by itself now; the island can go"
    with Precision(str(dtype).removeprefix("torch.")).autocast():
        found = function(reduced)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), function(reduced.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "focal by hand"])
def test_losses_are_as_exact_as_float32_under_autocast(loss: str, dtype: str) -> None:
    logits = (torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) * 8).to(getattr(torch, dtype))
    targets = torch.arange(64) % 10

    def computed(x: torch.Tensor) -> torch.Tensor:
        if loss == "cross_entropy":
            return F.cross_entropy(x, targets)
        if loss == "mse":
            return F.mse_loss(x, torch.zeros_like(x))
        log_p = F.log_softmax(x, -1).gather(1, targets[:, None])
        return (-((1 - log_p.exp()) ** 2) * log_p).mean()

    with Precision(dtype).autocast():
        found = computed(logits)
    torch.testing.assert_close(found.double(), computed(logits.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_softmax_within_an_attention_is_float32(dtype: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    inputs = torch.randn(2, 5, 8) * 4
    with Precision(dtype).autocast():
        weights = attention(inputs, inputs, inputs)[1]
    exact = attention.double()(*[inputs.double()] * 3)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_running_statistics_take_in_what_a_batch_normalisation_sees(parameters: torch.dtype) -> None:
    norm = nn.BatchNorm1d(4).to(parameters)
    with Precision("bfloat16").autocast():
        norm(torch.full((8, 4), 3.0, dtype=torch.bfloat16))
    torch.testing.assert_close(norm.running_mean.float(), torch.full((4,), 0.3), rtol=1e-2, atol=0)  # type: ignore[union-attr]


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


BACKENDS: Any = torch.backends
LEAVES = [
    *(BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn),
    *(BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn),
]


def read() -> list[str]:
    return [place.fp32_precision for place in (BACKENDS, BACKENDS.cudnn, *LEAVES)]


def test_the_format_of_products_is_put_back() -> None:
    before = read()
    with Precision("float32", matmul="tf32").active():
        assert [leaf.fp32_precision for leaf in LEAVES] == ["tf32"] * 3 + ["ieee"] * 3
        with Precision("float32").active():
            assert [leaf.fp32_precision for leaf in LEAVES] == ["ieee"] * 6
        with Precision("float32", matmul="bf16").active():
            assert [leaf.fp32_precision for leaf in LEAVES] == ["ieee"] * 3 + ["bf16"] * 3
        assert [leaf.fp32_precision for leaf in LEAVES] == ["tf32"] * 3 + ["ieee"] * 3
    assert read() == before


INHERITANCE = """
import itertools, json
import torch
from stabletrain.precision import float32_products
backends = torch.backends
leaves = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv]

def behaviour():
    "What every place reads, and how that follows the settings above it."
    own = [backends.fp32_precision, backends.cudnn.fp32_precision]
    found = [[place.fp32_precision for place in (backends, backends.cudnn, *leaves)]]
    for place in (backends, backends.cudnn):
        kept = place.fp32_precision
        for value in ("ieee", "tf32", "none"):
            place.fp32_precision = value
            found.append([leaf.fp32_precision for leaf in leaves])
        place.fp32_precision = kept if place is backends or backends.fp32_precision == "none" else "none"
    return found

def checked(name):
    once = behaviour()
    for products in ("ieee", "tf32", "bf16"):
        with float32_products(products):
            pass
        assert behaviour() == once, (name, products)

checked("nothing was ever set")
backends.cudnn.conv.fp32_precision = "tf32"
checked("a leaf is what it would be anyway, but set")
backends.mkldnn.matmul.fp32_precision = "tf32"
backends.cuda.matmul.fp32_precision = "ieee"
checked("some leaves")
backends.cudnn.fp32_precision = "tf32"
checked("a parent")
backends.cudnn.fp32_precision = "none"
backends.fp32_precision = "tf32"
checked("the root")
"""


def test_what_was_inherited_is_inherited_again() -> None:
    """In a process of its own: what was never set can't be unset again."""
    done = run([sys.executable, "-c", INHERITANCE])
    assert done.returncode == 0, done.stderr


def test_bf16_products_of_float32_are_coarser_where_the_cpu_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(256, 256, generator=generator), torch.randn(256, 256, generator=generator)
    exact, precision = one.double() @ other.double(), Precision("float32", matmul="bf16")
    with precision.active():
        found = one @ other
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    if precision.notes:
        assert "computed exactly" in precision.notes[0] and error < 1e-6
    else:
        assert error < 0.01
    torch.testing.assert_close(one @ other, exact.float(), rtol=1e-4, atol=1e-4)


def test_what_the_device_lacks_is_said() -> None:
    assert Precision("float32").notes == Precision("bfloat16").notes == []
    lacking = (
        "tf32 products exist on GPUs from NVIDIA Ampere on; on this device products of float32 are computed exactly"
    )
    assert Precision("float32", matmul="tf32").notes == [lacking]
    assert "exist in oneDNN" in Precision("float32", matmul="bf16", device="meta").notes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp16"}, "precision.dtype is 'fp16'; allowed: float32, bfloat16, float16"),
        ({"matmul": "fast"}, "precision.matmul is 'fast'; allowed: ieee, tf32, bf16"),
        ({"parameters": "float16"}, "precision.parameters is 'float16'; allowed: float32, bfloat16"),
        ({"parameters": "bfloat16"}, "precision.parameters is 'bfloat16', but precision.dtype is float32"),
        ({"dtype": "float16", "initial_scale": 0.5}, "the first loss scale is 0.5"),
        ({"dtype": "float16", "initial_scale": float("nan")}, "the first loss scale is nan"),
        ({"dtype": "float16", "growth_interval": 0}, "grows every 0 updates"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Precision(**options)
