"""ConvLSTMCell of Flax in its RNN: forward, both directions, lengths, gradients."""

from __future__ import annotations

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fused_convlstm import functional
from fused_convlstm.convert import from_weights, to_weights

LIBRARY = f"Flax {flax.__version__} on JAX {jax.__version__}"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than everything else
B, T, SIZE, CIN, F = 2, 4, (6, 7), 3, 5


def random_like(tree, dtype: str, scale: float = 0.3):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), dtype), tree)


def to_torch(x) -> torch.Tensor:
    """(B, T, H, W, C) of JAX as (T, B, C, H, W)."""
    return torch.tensor(np.asarray(x)).permute(1, 0, 4, 2, 3)


def flatten(tree) -> dict[str, np.ndarray]:
    return {
        ".".join(key.key for key in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("kernel", "bias", "dtype"),
    [
        ((3, 3), True, "float64"),
        ((3, 3), True, "float32"),
        ((5, 3), False, "float64"),
        ((2, 4), True, "float64"),
        ((1, 1), True, "float64"),
    ],
)
def test_forward_and_gradients(compare, kernel: tuple[int, int], bias: bool, dtype: str) -> None:
    cell = nn.ConvLSTMCell(F, kernel, use_bias=bias, dtype=dtype, param_dtype=dtype)
    rnn = nn.RNN(cell, return_carry=True)
    x = jnp.asarray(2 * np.random.default_rng(1).normal(size=(B, T, *SIZE, CIN)), dtype)
    parameters = random_like(rnn.init(jax.random.key(0), x), dtype)
    carry = random_like(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), dtype, 0.8)

    coefficients = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, *SIZE, F)), dtype)

    def loss(parameters, x, carry):
        (c, h), output = rnn.apply(parameters, x, initial_carry=carry)
        return (output * coefficients).sum() + (c * h).sum(), (c, h, output)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (c_n, h_n, output)), grads = run(parameters, x, carry)

    arrays = parameters["params"]["cell"]
    fused = from_weights(arrays, "Flax")
    x_torch = to_torch(x).requires_grad_()
    c_0, h_0 = (to_torch(state[:, None]).requires_grad_() for state in carry)
    actual, (h, c) = fused(x_torch, (h_0, c_0))
    ((actual * to_torch(coefficients)).sum() + (c * h).sum()).backward()
    compare("output", actual.detach(), to_torch(output))
    compare("last state", h.detach(), to_torch(h_n[:, None]))
    compare("last state", c.detach(), to_torch(c_n[:, None]))
    compare("gradient of the input", x_torch.grad, to_torch(grads[1]))
    compare("gradients of the initial state", h_0.grad, to_torch(grads[2][1][:, None]))
    compare("gradients of the initial state", c_0.grad, to_torch(grads[2][0][:, None]))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    # The 1 that Flax adds to f stands in the bias here, so the bias is always there; gradients have no such offset.
    back = {name: value.numpy() for name, value in to_weights(fused, "Flax").items()}
    expected = flatten(grads[0]["params"]["cell"])
    for name, value in expected.items():
        if "bias" not in name:
            compare("gradients of the weights", back[name], value)
    if bias:
        for value in (expected["ih.bias"], expected["hh.bias"]):  # one bias here, the sum of the two there
            compare("gradients of the weights", reorder(fused.bias_l0.detach()), value)


def reorder(bias: torch.Tensor) -> torch.Tensor:
    """i, f, g, o to i, g, f, o."""
    i, f, g, o = bias.chunk(4)
    return torch.cat([i, g, f, o])


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_direction(compare, reverse: bool) -> None:
    """The backward layer of a bidirectional one is Flax's reverse with keep_order."""
    cell = nn.ConvLSTMCell(F, (3, 3), dtype="float64", param_dtype="float64")
    rnn = nn.RNN(cell, return_carry=True, reverse=reverse, keep_order=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, *SIZE, CIN)))
    lengths = [2, 4]
    parameters = random_like(rnn.init(jax.random.key(0), x), "float64")
    (c_n, h_n), output = rnn.apply(parameters, x, seq_lengths=jnp.asarray(lengths))
    fused = from_weights(parameters["params"]["cell"], "Flax")
    actual, (h, c) = functional.conv_lstm2d(
        to_torch(x), fused.weight_ih_l0, fused.weight_hh_l0, fused.bias_l0, lengths=lengths, reverse=reverse
    )
    for b, length in enumerate(lengths):
        compare("output, lengths", actual[:length, b].detach(), to_torch(output)[:length, b])
    compare("last state, lengths", h.detach(), to_torch(h_n[:, None])[0])
    compare("last state, lengths", c.detach(), to_torch(c_n[:, None])[0])


def test_bfloat16_weights_are_read() -> None:
    cell = nn.ConvLSTMCell(F, (3, 3), param_dtype="bfloat16")
    carry = cell.initialize_carry(jax.random.key(0), (B, *SIZE, CIN))
    arrays = cell.init(jax.random.key(0), carry, jnp.zeros((B, *SIZE, CIN)))["params"]
    fused = from_weights(arrays, "Flax")
    assert fused.weight_ih_l0.dtype == torch.bfloat16
    kernel = torch.tensor(np.asarray(arrays["ih"]["kernel"], dtype="float32")).permute(3, 2, 0, 1)
    i, g, f, o = kernel.bfloat16().chunk(4)
    assert torch.equal(fused.weight_ih_l0, torch.cat([i, f, g, o]))


def test_weights_go_back(compare) -> None:
    cell = nn.ConvLSTMCell(F, (3, 3), dtype="float64", param_dtype="float64")
    rnn = nn.RNN(cell)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, *SIZE, CIN)))
    fused = from_weights(random_like(rnn.init(jax.random.key(0), x), "float64")["params"]["cell"], "Flax")
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.1)
    arrays = {name: jnp.asarray(value.numpy()) for name, value in to_weights(fused, "Flax").items()}
    nested = {part: {k.split(".")[1]: v for k, v in arrays.items() if k.startswith(part)} for part in ("ih", "hh")}
    output = rnn.apply({"params": {"cell": nested}}, x)
    compare("output after to_weights", fused(to_torch(x))[0].detach(), to_torch(output))
