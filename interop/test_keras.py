"""ConvLSTM2D of Keras 3 on JAX, over its options: forward, states, gradients, files."""

from __future__ import annotations

from pathlib import Path

import jax
import keras
import numpy as np
import pytest
import torch
from keras.src.backend.common import dtypes

from fused_convlstm.convert import from_keras, to_keras

LIBRARY = f"Keras {keras.__version__} on {keras.backend.backend()}"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than everything else
# Keras takes tanh of float64 in float32 wherever it does not run on TensorFlow: then nothing finer can be compared.
dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
B, T, SIZE, CIN, F = 2, 4, (7, 8), 3, 5

OPTIONS = [
    {},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "valid", "kernel_size": (4, 2)},
    {"padding": "same", "strides": 2},
    {"padding": "same", "strides": (3, 2), "kernel_size": (2, 5)},
    {"padding": "same", "strides": (3, 3), "kernel_size": (1, 2)},
    {"padding": "valid", "strides": (1, 2)},
    {"padding": "same", "dilation_rate": 2},
    {"padding": "valid", "dilation_rate": (1, 2)},
    {"padding": "same", "use_bias": False},
    {"padding": "same", "recurrent_activation": "hard_sigmoid"},
    {"padding": "same", "go_backwards": True},
    {"padding": "same", "return_sequences": False},
    {"padding": "same", "return_sequences": False, "go_backwards": True},
    {"padding": "same", "data_format": "channels_first"},
    {"padding": "same", "data_format": "channels_first", "strides": 2, "return_sequences": False},
]


def make(options: dict, dtype: str, wrap: str | None = None) -> tuple[keras.layers.Layer, np.ndarray]:
    """A built layer with random weights, and an input of several times the usual magnitude."""
    keras.utils.set_random_seed(1)
    options = {"kernel_size": 3, "return_sequences": True} | options
    layer = keras.layers.ConvLSTM2D(F, dtype=dtype, **options)
    if wrap is not None:
        layer = keras.layers.Bidirectional(layer, merge_mode=wrap, dtype=dtype)
    shape = (B, T, CIN, *SIZE) if options.get("data_format") == "channels_first" else (B, T, *SIZE, CIN)
    layer.build(shape)
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(size=w.shape).astype(dtype) * 0.3 for w in layer.get_weights()])
    return layer, (2 * random.normal(size=shape)).astype(dtype)


def identify(case: object) -> str:
    return ",".join(f"{k}={v}" for k, v in case.items()).replace(" ", "") if isinstance(case, dict) else str(case)


def compare_layer(compare, layer: keras.layers.Layer, x: np.ndarray) -> None:
    """Output and the gradients of everything."""
    fused = from_keras(layer)
    weights = [variable.value for variable in layer.trainable_variables]
    states = [variable.value for variable in layer.non_trainable_variables]
    x_torch = torch.tensor(x, requires_grad=True)
    actual = fused(x_torch)
    coefficients = np.random.default_rng(2).normal(size=actual.shape).astype(x.dtype)
    actual.backward(torch.tensor(coefficients))

    def loss(weights, x):
        output = layer.stateless_call(weights, states, x)[0]
        return (output * coefficients).sum(), output

    (_, output), (weight_grads, x_grad) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
    compare("output", actual.detach(), output)
    compare("gradient of the input", x_torch.grad, x_grad)
    with torch.no_grad():  # the gradients in Keras' layout
        for parameter in fused.parameters():
            parameter.copy_(parameter.grad)
    for a, e in zip(to_keras(fused), weight_grads, strict=True):
        compare("gradients of the weights", a, e)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((one, "float64") for one in OPTIONS), *((one, "float32") for one in OPTIONS[1:5:3])],
    ids=identify,
)
def test_options(compare, options: dict, dtype: str) -> None:
    compare_layer(compare, *make(options, dtype))


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("mode", ["concat", "sum", "ave", "mul"])
def test_bidirectional(compare, mode: str, sequences: bool) -> None:
    compare_layer(compare, *make({"padding": "same", "return_sequences": sequences}, "float64", mode))


def test_state_in_and_out(compare) -> None:
    layer, x = make({"padding": "same", "return_state": True}, "float64")
    random = np.random.default_rng(3)
    state = [random.normal(size=(B, *SIZE, F)) for _ in range(2)]
    expected = layer(x, initial_state=state)
    actual = from_keras(layer)(torch.tensor(x), [torch.tensor(s) for s in state])
    for what, a, e in zip(("output", "last h", "last c"), actual, expected, strict=True):
        compare(what, a.detach(), e)


def test_bidirectional_states(compare) -> None:
    layer, x = make({"padding": "same", "return_state": True}, "float64", "concat")
    for a, e in zip(from_keras(layer)(torch.tensor(x)), layer(x), strict=True):
        compare("output and states", a.detach(), e)


def test_stateful(compare) -> None:
    layer, x = make({"padding": "same", "stateful": True}, "float64")
    fused = from_keras(layer)
    for _ in range(2):
        compare("output, stateful", fused(torch.tensor(x)).detach(), layer(x))


def test_dropout_is_refused_and_left_out_at_inference(compare) -> None:
    layer, x = make({"padding": "same", "dropout": 0.5, "recurrent_dropout": 0.5}, "float64")
    with pytest.raises(ValueError, match="one mask a gate"):
        from_keras(layer)
    fused = from_keras(layer, dropout=0.0, recurrent_dropout=0.0)
    compare("output", fused(torch.tensor(x)).detach(), layer(x, training=False))


def test_backward_layer_with_options_of_its_own_is_refused() -> None:
    forward = keras.layers.ConvLSTM2D(F, 3, return_sequences=True)
    backward = keras.layers.ConvLSTM2D(
        F, 3, return_sequences=True, go_backwards=True, recurrent_activation="hard_sigmoid"
    )
    layer = keras.layers.Bidirectional(forward, backward_layer=backward)
    layer.build((B, T, *SIZE, CIN))
    with pytest.raises(ValueError, match="backward_layer: expected the options of the forward layer"):
        from_keras(layer)


def test_weights_go_back(compare) -> None:
    layer, x = make({"padding": "same"}, "float64")
    fused = from_keras(layer)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.1)
    layer.set_weights(to_keras(fused))
    compare("output after to_keras", fused(torch.tensor(x)).detach(), layer(x))


@pytest.mark.parametrize("ending", [".keras", ".weights.h5", ".h5"])
def test_files(compare, ending: str, tmp_path: Path) -> None:
    one = {"padding": "same", "strides": 2, "return_sequences": True}
    two = {"padding": "valid", "return_sequences": False, "recurrent_activation": "hard_sigmoid"}
    inputs = keras.Input((T, *SIZE, CIN))
    hidden = keras.layers.ConvLSTM2D(F, 3, name="one", **one)(inputs)
    wrapped = keras.layers.Bidirectional(keras.layers.ConvLSTM2D(4, (2, 3), **two), merge_mode="sum", name="two")
    model = keras.Model(inputs, wrapped(hidden))
    path = tmp_path / f"model{ending}"
    (model.save_weights if ending == ".weights.h5" else model.save)(path)
    if ending == ".weights.h5":  # no configuration in there
        first = from_keras(path, "one", input_size=SIZE, **one)
        second = from_keras(path, "two", merge_mode="sum", **two)
    else:
        size = {} if ending == ".keras" else {"input_size": SIZE}  # .h5 has no input shapes
        first, second = from_keras(path, "one", **size), from_keras(path, "two")
    x = np.random.default_rng(0).normal(size=(B, T, *SIZE, CIN)).astype("float32")
    compare(f"output of a model from {ending}", second(first(torch.tensor(x))).detach(), model(x))
