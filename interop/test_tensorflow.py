"""Keras 2 (tf_keras) and Sonnet 2, on TensorFlow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fused_convlstm.convert import from_keras, from_weights, to_keras, to_weights

tf = pytest.importorskip("tensorflow")
LIBRARY = f"Keras 2 and Sonnet on TensorFlow {tf.__version__}"
B, T, SIZE, CIN, F = 2, 4, (7, 8), 3, 5


@pytest.mark.parametrize(
    "options",
    [
        {},  # its default is hard_sigmoid, the old one
        {"recurrent_activation": "sigmoid"},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "same", "strides": (2, 3)},
        {"go_backwards": True},
    ],
    ids=str,
)
def test_keras2(compare, options: dict, tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    options = {"kernel_size": 3, "return_sequences": True} | options
    layer = tf_keras.layers.ConvLSTM2D(F, dtype="float64", name="lstm", **options)
    model = tf_keras.Sequential([tf_keras.Input((T, *SIZE, CIN)), layer])
    random = np.random.default_rng(0)
    layer.set_weights([0.4 * random.normal(size=w.shape) for w in layer.get_weights()])
    x = 3 * random.normal(size=(B, T, *SIZE, CIN))
    x_tf = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x_tf)
        output = layer(x_tf)
        coefficients = random.normal(size=output.shape)
        loss = tf.reduce_sum(output * coefficients)
    x_torch = torch.tensor(x, requires_grad=True)
    fused = from_keras(layer)
    actual = fused(x_torch)
    actual.backward(torch.tensor(coefficients))
    compare("Keras 2: output", actual.detach(), output)
    compare("Keras 2: gradient of the input", x_torch.grad, tape.gradient(loss, x_tf))
    with torch.no_grad():  # the gradients in Keras' layout
        for parameter in fused.parameters():
            parameter.copy_(parameter.grad)
    for a, e in zip(to_keras(fused), tape.gradient(loss, layer.trainable_variables), strict=True):
        compare("Keras 2: gradients of the weights", a, e)
    for ending in (".h5", ".keras"):
        model.save(tmp_path / f"model{ending}")
        size = {"input_size": SIZE} if ending == ".h5" else {}  # .h5 has no input shapes
        loaded = from_keras(tmp_path / f"model{ending}", "lstm", **size)
        compare(f"Keras 2: output of a model from {ending}", loaded(torch.tensor(x)).detach(), output)


@pytest.mark.parametrize("kernel", [3, (2, 4)], ids=str)
def test_sonnet(compare, kernel) -> None:
    sonnet = pytest.importorskip("sonnet")
    cell = sonnet.Conv2DLSTM((*SIZE, CIN), F, kernel, dtype=tf.float64)
    random = np.random.default_rng(0)
    x = random.normal(size=(T, B, *SIZE, CIN))
    coefficients = random.normal(size=(T, B, *SIZE, F))
    x_tf = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x_tf)
        output, state = sonnet.dynamic_unroll(cell, x_tf, cell.initial_state(B))
        loss = tf.reduce_sum(output * coefficients)
    arrays = {
        "input_to_hidden.w": cell.input_to_hidden, "hidden_to_hidden.w": cell.hidden_to_hidden, "b": cell.b,
    }  # fmt: skip
    fused = from_weights(arrays, "Sonnet")
    x_torch = torch.tensor(x, requires_grad=True)
    actual, (h, c) = fused(x_torch.movedim(-1, 2))
    actual.backward(torch.tensor(coefficients).movedim(-1, 2))
    compare("Sonnet: gradient of the input", x_torch.grad, tape.gradient(loss, x_tf))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(parameter.grad)
    gradients = tape.gradient(loss, arrays)
    for name, value in to_weights(fused, "Sonnet").items():
        compare("Sonnet: gradients of the weights", value, gradients[name])
    compare("Sonnet: output", actual.detach().movedim(2, -1), output)
    compare("Sonnet: last state", h[0].detach().movedim(1, -1), state.hidden)
    compare("Sonnet: last state", c[0].detach().movedim(1, -1), state.cell)
