"""ConvLSTM2D of Keras: from a layer, a list of weights or a file, and back. Keras itself is not needed."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import State
from ..modules import ConvLSTM2d
from .layouts import LAYOUTS, LayerWeights, as_tensor, read_layer, write_layer
from .weights import build, check_options, copy_layer, same_padding_strided

_ARRAYS = ("kernel", "recurrent_kernel", "bias")
_MERGE_MODES = {"concat": "concat", "sum": "sum", "ave": "mean", "mul": "product"}
_DEFAULTS: dict[str, Any] = {
    "strides": 1,
    "padding": "valid",
    "data_format": "channels_last",
    "dilation_rate": 1,
    "activation": "tanh",
    "recurrent_activation": None,  # depends on the version
    "return_sequences": False,
    "return_state": False,
    "go_backwards": False,
    "stateful": False,
    "dropout": 0.0,
    "recurrent_dropout": 0.0,
    "merge_mode": "concat",
    "input_size": None,
}


class KerasConvLSTM2D(nn.Module):
    """Behaves as Keras' ConvLSTM2D, or as Bidirectional around one, and computes with a :class:`ConvLSTM2d`.

    Made by :func:`from_keras`. ``lstm`` is the fused layer, batch first.
    """

    def __init__(
        self,
        lstm: ConvLSTM2d,
        *,
        data_format: str = "channels_last",
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.lstm = lstm
        self.data_format = data_format
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.stateful = stateful
        self.input_size = input_size  # the only size that the padding is right for; None: any
        self._state: State | None = None

    def reset_states(self) -> None:
        """Forgets what a stateful layer kept."""
        self._state = None

    def forward(self, inputs: Tensor, initial_state: Sequence[Tensor] | None = None) -> Any:
        """``inputs`` is (B, T, H, W, Cin), or (B, T, Cin, H, W) with ``data_format="channels_first"``.

        ``initial_state`` is h, c, or h, c of the forward and then of the backward layer. Returns the output, and with
        ``return_state`` the output and the states in the same order; all in the data format of the layer.
        """
        if inputs.dim() != 5:
            raise ValueError(f"inputs: expected 5 dimensions, got shape {tuple(inputs.shape)}")
        x = self._channels_first(inputs)
        if self.input_size is not None and tuple(x.shape[3:]) != self.input_size:
            raise ValueError(
                f"inputs: expected frames of {self.input_size}, as the padding was made for them, "
                f"got {tuple(x.shape[3:])}"
            )
        hx = self._state
        if initial_state is not None:
            count = 4 if self.lstm.bidirectional else 2
            if len(initial_state) != count:
                raise ValueError(
                    f"initial_state: expected {count} tensors, h and c of each layer, got {len(initial_state)}"
                )
            states = [self._channels_first(state) for state in initial_state]
            hx = (torch.stack(states[0::2]), torch.stack(states[1::2]))
        output, (h_n, c_n) = self.lstm(x.flip(1) if self.go_backwards else x, hx)
        if self.stateful:
            self._state = (h_n.detach(), c_n.detach())
        if not self.return_sequences:
            output = self.lstm._merge(h_n[0][None], h_n[1][None])[0] if self.lstm.bidirectional else h_n[0]
        output = self._from_channels_first(output)
        if not self.return_state:
            return output
        states = [self._from_channels_first(state) for pair in zip(h_n, c_n, strict=True) for state in pair]
        return (output, *states)

    def _channels_first(self, x: Tensor) -> Tensor:
        return x if self.data_format == "channels_first" else x.movedim(-1, -3)

    def _from_channels_first(self, x: Tensor) -> Tensor:
        return x if self.data_format == "channels_first" else x.movedim(-3, -1)

    def extra_repr(self) -> str:
        names = ("data_format", "return_sequences", "return_state", "go_backwards", "stateful", "input_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def from_keras(
    source: Any, name: str | None = None, *, keras_version: str | None = None, **config: Any
) -> KerasConvLSTM2D:
    """A layer that computes what a Keras ConvLSTM2D, or a Bidirectional around one, computes.

    Args:
        source: a Keras layer that has been built; a list of its weights (kernel, recurrent_kernel, bias, and the same
            of the backward layer); or the path of a ``.keras``, ``.weights.h5`` or ``.h5`` file (needs h5py).
        name: which layer of a file; not needed if it has only one ConvLSTM2D.
        keras_version: of Keras that made the weights, "2.15" for instance, in place of what ``source`` tells; if
            neither tells, 3. Up to 2.15 the default ``recurrent_activation`` is hard_sigmoid, and that is
            clip(0.2 x + 0.5), since 3 it is relu6(x + 3) / 6.
        config: options of the Keras layer under Keras' names (padding, strides, ``merge_mode`` ...) that ``source``
            does not tell, or to be taken instead of those it tells; and ``input_size``, the height and width of the
            frames, needed for ``padding="same"`` with strides where ``source`` does not tell. Keras' defaults hold for
            the rest.

    Returns:
        a :class:`KerasConvLSTM2D`; its ``lstm`` is the :class:`ConvLSTM2d`.

    Raises:
        ValueError: no or more than one layer fits, or it does something that ConvLSTM2d does not: an activation other
            than tanh, dropout (one mask a gate in Keras; pass ``dropout=0.0, recurrent_dropout=0.0`` to have the layer
            as it is at inference), a ``backward_layer`` with options of its own.
        ImportError: ``source`` is a file, and h5py is missing.
    """
    if name is not None and not isinstance(source, (str, Path)):
        raise ValueError(f"name: expected None where source is no file, got {name!r}")
    arrays, found, version = _read(source, name)
    unknown = set(config) - set(_DEFAULTS)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: no option of ConvLSTM2D that is known here: {', '.join(_DEFAULTS)}")
    keras2 = _major(keras_version or version or "3") < 3
    if "merge_mode" in config and len(arrays) == 1:
        raise ValueError("merge_mode: expected none, as there are weights of one direction only")
    settings = _DEFAULTS | {key: value for key, value in found.items() if key in _DEFAULTS} | config
    _check(settings, found, len(arrays))
    gate = _activation_name(settings["recurrent_activation"] or ("hard_sigmoid" if keras2 else "sigmoid"))
    if gate not in ("sigmoid", "hard_sigmoid"):
        raise ValueError(f"recurrent_activation: expected 'sigmoid' or 'hard_sigmoid', got {gate!r}")
    layers = [read_layer(layer, LAYOUTS["Keras"]) for layer in arrays]
    weight_ih, weight_hh = layers[0].weight_ih, layers[0].weight_hh
    stride, dilation = _pair(settings["strides"], "strides"), _pair(settings["dilation_rate"], "dilation_rate")
    size = None
    padding = settings["padding"]
    if padding == "same" and stride != (1, 1):
        if settings["input_size"] is None:
            raise ValueError(
                "input_size: expected the height and width of the frames, which decide the padding with "
                f"padding='same' and strides={stride}"
            )
        size = _pair(settings["input_size"], "input_size")
        padding = same_padding_strided(size, (weight_ih.size(2), weight_ih.size(3)), stride, dilation)
    lstm: ConvLSTM2d = build(
        ConvLSTM2d,
        weight_ih.size(1),
        weight_hh.size(1),
        tuple(weight_ih.shape[2:]),
        recurrent_kernel_size=tuple(weight_hh.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        recurrent_dilation=1,
        bias=layers[0].bias is not None,
        gate_activation="hard_sigmoid_keras2" if keras2 and gate == "hard_sigmoid" else gate,
        batch_first=True,
        bidirectional=len(layers) == 2,
        merge_mode=_MERGE_MODES[settings["merge_mode"]],
        device=weight_ih.device,
        dtype=weight_ih.dtype,
    )
    for suffix, weights in zip(lstm._suffixes(), layers, strict=True):
        copy_layer(lstm, suffix, vars(weights))
    kept = ("data_format", "return_sequences", "return_state", "go_backwards", "stateful")
    return KerasConvLSTM2D(lstm, input_size=size, **{key: settings[key] for key in kept})


def to_keras(module: KerasConvLSTM2D | ConvLSTM2d) -> list[np.ndarray[Any, Any]]:
    """The weights for Keras' ``layer.set_weights``, of a layer that has been built with the same options.

    Returns:
        kernel (kh, kw, Cin, 4 * C), recurrent_kernel (rh, rw, C, 4 * C), bias (4 * C,) if there is one; gate order
        i, f, c, o. The same of the backward layer behind them.

    Raises:
        ValueError: Keras' ConvLSTM2D cannot compute what ``module`` computes: it has one layer, and no peepholes,
            groups or recurrent dilation.
    """
    lstm = module.lstm if isinstance(module, KerasConvLSTM2D) else module
    if not isinstance(lstm, ConvLSTM2d):
        raise ValueError(f"module: expected a KerasConvLSTM2D or a ConvLSTM2d, got {type(module).__name__}")
    if lstm.num_layers > 1:
        raise ValueError(f"num_layers: a Keras layer has one, got {lstm.num_layers}")
    check_options(lstm, "Keras")
    weights = []
    for suffix in lstm._suffixes():
        arrays = write_layer(LayerWeights(*lstm._layer_parameters(suffix)), LAYOUTS["Keras"])
        weights += [arrays[name].cpu().numpy() for name in _ARRAYS if name in arrays]
    return weights


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    if found is None:
        raise ValueError(f"keras_version: expected one such as '2.15.0', got {version!r}")
    return int(found[0])


def _check(settings: dict[str, Any], found: dict[str, Any], directions: int) -> None:
    activation = _activation_name(settings["activation"])
    if activation != "tanh":
        raise ValueError(f"activation: expected 'tanh', got {activation!r}: ConvLSTM2d computes tanh only")
    for key in ("dropout", "recurrent_dropout"):
        if settings[key]:
            raise ValueError(
                f"{key}: expected 0, got {settings[key]}: Keras draws one mask a gate, ConvLSTM2d cannot. At "
                f"inference there is none: pass {key}=0.0 to have the layer without"
            )
    for key, choices in (
        ("padding", ("same", "valid")),
        ("data_format", ("channels_last", "channels_first")),
    ):
        if settings[key] not in choices:
            raise ValueError(f"{key}: expected one of {choices}, got {settings[key]!r}")
    if found.get("time_major"):
        raise ValueError("time_major: expected False")
    if directions == 1:
        return
    backward = found.get("backward_layer", found)
    for key in _DEFAULTS.keys() - {"go_backwards", "merge_mode", "input_size"}:
        if backward.get(key) != found.get(key):
            raise ValueError(
                f"backward_layer: expected the options of the forward layer, {key} {found.get(key)!r}, "
                f"got {backward.get(key)!r}"
            )
    if settings["merge_mode"] not in _MERGE_MODES:
        raise ValueError(f"merge_mode: expected one of {tuple(_MERGE_MODES)}, got {settings['merge_mode']!r}")
    for key in ("go_backwards", "stateful"):
        if settings[key]:
            raise ValueError(f"{key}: expected False for a bidirectional layer")
    if settings["data_format"] == "channels_first" and settings["merge_mode"] == "concat":
        raise ValueError(
            "data_format: expected 'channels_last': Keras would concatenate the columns of the two outputs"
        )


def _pair(value: Any, name: str) -> tuple[int, int]:
    values = tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value), int(value))
    if len(values) != 2:
        raise ValueError(f"{name}: expected a number or two, got {value!r}")
    return values[0], values[1]


def _activation_name(activation: Any) -> str:
    """A serialised activation, {"class_name": ..., "config": "tanh"} in some versions, as its name."""
    while isinstance(activation, dict):
        activation = activation.get("config") if activation.get("class_name") == "function" else str(activation)
    if callable(activation):
        activation = getattr(activation, "__name__", repr(activation))
    return str(activation)


# --- where the weights come from -------------------------------------------------------------------------------------

Arrays = list[dict[str, Tensor]]  # one a direction, by the names in _ARRAYS


def _read(source: Any, name: str | None) -> tuple[Arrays, dict[str, Any], str | None]:
    """Weights, configuration (empty if unknown) and Keras version (None if unknown) of a layer."""
    if isinstance(source, (str, Path)):
        return _read_file(Path(source), name)
    if hasattr(source, "get_config") and hasattr(source, "get_weights"):
        kind = type(source).__name__
        entry = {"class_name": kind, "config": source.get_config()}
        if hasattr(source, "get_build_config"):
            entry["build_config"] = source.get_build_config()
        settings = _layer_config(entry)
        if settings is None:
            raise ValueError(f"source: expected a ConvLSTM2D, or Bidirectional around one, got {kind}")
        root = sys.modules.get(type(source).__module__.partition(".")[0])
        weights = source.get_weights()
        if not weights:
            raise ValueError("source: expected a layer with weights; build it first")
        return _from_list(weights, kind == "Bidirectional"), settings, getattr(root, "__version__", None)
    if isinstance(source, (list, tuple)):
        return _from_list(source, len(source) > 3), {}, None
    raise ValueError(f"source: expected a Keras layer, a list of weights or a path, got {type(source).__name__}")


def _from_list(weights: Sequence[Any], bidirectional: bool) -> Arrays:
    count = len(weights) // 2 if bidirectional else len(weights)
    if count not in (2, 3) or (bidirectional and len(weights) % 2):
        raise ValueError(
            f"source: expected kernel, recurrent_kernel and bias for each direction, got {len(weights)} arrays"
        )
    tensors = [as_tensor(weight) for weight in weights]
    return [
        dict(zip(_ARRAYS, tensors[k : k + count], strict=False)) for k in range(0, count * (1 + bidirectional), count)
    ]


def _layer_config(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of a serialised ConvLSTM2D or Bidirectional(ConvLSTM2D); None for any other layer."""
    config = entry.get("config")
    if not isinstance(config, dict):
        return None
    if entry.get("class_name") == "Bidirectional":
        inner = config.get("layer")
        settings = _layer_config(inner) if isinstance(inner, dict) else None
        if settings is None:
            return None
        settings |= {"name": config.get("name"), "merge_mode": config.get("merge_mode")}
        if isinstance(config.get("backward_layer"), dict):  # Keras 3 always tells it, Keras 2 if it was given
            settings["backward_layer"] = _layer_config(config["backward_layer"]) or {}
    elif entry.get("class_name") == "ConvLSTM2D":
        settings = dict(config)
    else:
        return None
    shape = (entry.get("build_config") or {}).get("input_shape")
    if shape is not None and len(shape) == 5:
        size = shape[3:5] if settings.get("data_format") == "channels_first" else shape[2:4]
        if None not in size:
            settings["input_size"] = tuple(size)
    return settings


def _find_configs(node: Any) -> Iterator[dict[str, Any]]:
    """Settings of every ConvLSTM2D in a serialised model."""
    if isinstance(node, dict):
        settings = _layer_config(node)
        if settings is not None:
            yield settings
            return
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _find_configs(value)


def _read_file(path: Path, name: str | None) -> tuple[Arrays, dict[str, Any], str | None]:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("reading Keras files needs h5py: pip install fused-convlstm[keras-files]") from error

    model: Any = {}
    version: str | None = None
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read("config.json"))
            version = json.loads(archive.read("metadata.json")).get("keras_version")
            file = h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")
    else:
        file = h5py.File(path, "r")
    with file:
        if "model_config" in file.attrs:
            model = json.loads(file.attrs["model_config"])
        if "keras_version" in file.attrs:
            version = str(file.attrs["keras_version"])
        layers = _collect(file, h5py.Dataset)
    configs = list(_find_configs(model))
    layers = _with_names(layers, configs)
    if name is None and len(layers) == 1:
        name = next(iter(layers))
    if name not in layers:
        raise ValueError(f"name: expected one of {', '.join(map(repr, layers))} in {path.name}, got {name!r}")
    directions = layers[name]
    settings = next((s for s in configs if s.get("name") == name), {})
    order = ("forward", "backward") if "backward" in directions else ("forward",)
    return [directions[direction] for direction in order], settings, version


def _collect(file: Any, dataset: type) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Weights of every ConvLSTM2D in a file: layer name -> direction -> array name -> tensor."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}

    def visit(path: str, item: Any) -> None:
        if not isinstance(item, dataset):
            return
        *groups, array = path.split("/")
        array = array.removesuffix(":0")
        if groups[-2:] == ["cell", "vars"] and array.isdigit():  # .weights.h5 and .keras
            groups, array = groups[:-2], _ARRAYS[int(array)]
            direction = "backward" if groups[-1] == "backward_layer" else "forward"
            if groups[-1] in ("forward_layer", "backward_layer"):
                groups = groups[:-1]
            owner = "/".join((*groups, "vars"))
            path = "/".join(groups)  # the name stands beside it since Keras 3
            layer = file[owner].attrs.get("name", path) if owner in file else path
        elif array in _ARRAYS:  # a whole model in .h5
            groups = [group for group in groups if not re.fullmatch(r"conv_lst_?m_?(2d_)?cell(_\d+)?", group)]
            direction = "backward" if groups[-1].startswith("backward_") else "forward"
            wrapped = len(groups) > 1 and groups[-1].startswith(("forward_", "backward_"))
            layer = groups[-2] if wrapped else groups[-1]
        else:
            return
        found.setdefault(str(layer), {}).setdefault(direction, {})[array] = torch.from_numpy(np.array(item))

    file.visititems(visit)
    return {layer: directions for layer, directions in found.items() if all(map(_is_conv_lstm, directions.values()))}


def _with_names(
    layers: dict[str, dict[str, dict[str, Tensor]]], configs: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Layers that are known by their place in the file only, layers/conv_lstm2d_1 for the second, by their names.

    Files of Keras 2 count the layers of a class in the order of the model's configuration.
    """
    names: dict[str, str] = {}
    for bidirectional in (False, True):
        places = [key for key, one in layers.items() if "/" in key and ("backward" in one) == bidirectional]
        places.sort(key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)])
        known = [str(one.get("name")) for one in configs if ("merge_mode" in one) == bidirectional]
        if len(places) == len(known):
            names |= dict(zip(places, known, strict=True))
    return {names.get(key, key): one for key, one in layers.items()}


def _is_conv_lstm(arrays: dict[str, Tensor]) -> bool:
    kernel, recurrent = arrays.get("kernel"), arrays.get("recurrent_kernel")
    if kernel is None or recurrent is None or kernel.dim() != 4 or recurrent.dim() != 4:
        return False
    return kernel.size(3) == recurrent.size(3) == 4 * recurrent.size(2)
