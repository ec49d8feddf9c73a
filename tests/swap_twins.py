"""Small twins of the ConvLSTMs that people use, written from descriptions of their layouts and quirks.

Each computes what its namesake computes, in its own order of gates and under its own names; how short the code is has
nothing to do with the originals.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence


def step(
    z: dict[str, Tensor], c: Tensor, candidate=torch.tanh, peephole=None, output=torch.tanh
) -> tuple[Tensor, Tensor]:
    """The cell's equations from its pre-activations by gate: returns h and c."""
    w_i, w_f, w_o = peephole if peephole is not None else (0.0, 0.0, 0.0)
    i, f = torch.sigmoid(z["i"] + w_i * c), torch.sigmoid(z["f"] + w_f * c)
    c = f * c + i * candidate(z["g"])
    return torch.sigmoid(z["o"] + w_o * c) * output(c), c


def split(z: Tensor, order: str) -> dict[str, Tensor]:
    return dict(zip(order, z.chunk(4, dim=1), strict=True))


class NdrplzCell(nn.Module):
    """Gates i, f, o, g from one convolution over cat[x, h]."""

    order = "ifog"

    def __init__(self, input_dim: int, hidden_dim: int, kernel_size: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=padding, bias=bias)

    def forward(self, input_tensor, cur_state):
        h, c = cur_state
        return step(split(self.conv(torch.cat([input_tensor, h], dim=1)), self.order), c)

    def init_hidden(self, batch_size, image_size):
        shape = (batch_size, self.hidden_dim, *image_size)
        device = self.conv.weight.device
        return torch.zeros(shape, device=device), torch.zeros(shape, device=device)


class Ndrplz(nn.Module):
    """A stack that returns lists; no initial state; last states as lists."""

    state_type: type = list
    cell = NdrplzCell

    def __init__(self, input_dim, hidden_dim, kernel_size, num_layers, batch_first=False, bias=True,
                 return_all_layers=False) -> None:  # fmt: skip
        super().__init__()
        kernels = kernel_size if isinstance(kernel_size, list) else [kernel_size] * num_layers
        self.hidden_dim = hidden_dim if isinstance(hidden_dim, list) else [hidden_dim] * num_layers
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.return_all_layers = return_all_layers
        sizes = [input_dim, *self.hidden_dim]
        self.cell_list = nn.ModuleList([self.cell(sizes[k], sizes[k + 1], kernels[k], bias) for k in range(num_layers)])

    def initial(self, hidden_state, batch, size):
        if hidden_state is not None:
            raise NotImplementedError("stateful")
        return [cell.init_hidden(batch, size) for cell in self.cell_list]

    def forward(self, input_tensor, hidden_state=None):
        x = input_tensor if self.batch_first else input_tensor.transpose(0, 1)
        states = self.initial(hidden_state, x.size(0), x.shape[3:])
        outputs, finals = [], []
        for cell, (h, c) in zip(self.cell_list, states, strict=True):
            steps = []
            for t in range(x.size(1)):
                h, c = cell(input_tensor=x[:, t], cur_state=(h, c))
                steps.append(h)
            x = torch.stack(steps, dim=1)
            outputs.append(x)
            finals.append(self.state_type((h, c)))
        return (outputs, finals) if self.return_all_layers else (outputs[-1:], finals[-1:])


class Torchgeo(Ndrplz):
    """The same, with an initial state, and last states as tuples."""

    state_type = tuple

    def initial(self, hidden_state, batch, size):
        return super().initial(None, batch, size) if hidden_state is None else hidden_state


class Overlooking(Ndrplz):
    """Takes an initial state and starts from zeros all the same."""

    def initial(self, hidden_state, batch, size):
        return super().initial(None, batch, size)


class AserdegaCell(nn.Module):
    """Gates i, f, o, g; peepholes on request; made for one size of frames."""

    def __init__(self, input_size, input_dim, hidden_dim, kernel_size, peephole=False, activation=torch.tanh) -> None:
        super().__init__()
        self.height, self.width = input_size
        self.hidden_dim = hidden_dim
        self.peephole = peephole
        self.activation = activation
        if peephole:
            for gate in "ifo":
                setattr(self, f"Wc{gate}", nn.Parameter(torch.rand(hidden_dim, *input_size)))
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=padding)

    def forward(self, input, prev_state):
        h, c = prev_state
        peephole = (self.Wci, self.Wcf, self.Wco) if self.peephole else None
        z = split(self.conv(torch.cat((input, h), dim=1)), "ifog")
        return step(z, c, self.activation, peephole, self.activation)


class Aserdega(nn.Module):
    """A stack that returns the last layer's outputs, and the states of all; the state is a required argument."""

    def __init__(self, input_size, input_dim, hidden_dim, kernel_size, batch_first=False, **cell) -> None:
        super().__init__()
        self.height, self.width = input_size
        self.batch_first = batch_first
        sizes = [input_dim, *hidden_dim]
        self.cell_list = nn.ModuleList(
            [AserdegaCell(input_size, a, b, kernel_size, **cell) for a, b in pairwise(sizes)]
        )

    def forward(self, input, hidden_state):
        x = torch.unbind(input, dim=int(self.batch_first))
        if not hidden_state:
            zeros = [x[0].new_zeros(x[0].size(0), c.hidden_dim, self.height, self.width) for c in self.cell_list]
            hidden_state = [(z, z) for z in zeros]
        finals = []
        for cell, (h, c) in zip(self.cell_list, hidden_state, strict=True):
            outputs = []
            for frame in x:
                h, c = cell(input=frame, prev_state=[h, c])
                outputs.append(h)
            x = outputs
            finals.append((h, c))
        return torch.stack(x, dim=int(self.batch_first)), finals


class Automan000Cell(nn.Module):
    """One convolution a gate, bias on those of x only; peepholes that are always zero and no parameters."""

    def __init__(self, input_channels, hidden_channels, kernel_size) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        for gate in "ifco":
            setattr(self, f"Wx{gate}", nn.Conv2d(input_channels, hidden_channels, kernel_size, 1, kernel_size // 2))
            setattr(
                self, f"Wh{gate}",
                nn.Conv2d(hidden_channels, hidden_channels, kernel_size, 1, kernel_size // 2, bias=False),
            )  # fmt: skip
        self.Wci = self.Wcf = self.Wco = None

    def forward(self, x, h, c):
        z = {g: getattr(self, f"Wx{k}")(x) + getattr(self, f"Wh{k}")(h) for g, k in zip("ifgo", "ifco", strict=True)}
        return step(z, c, peephole=(self.Wci, self.Wcf, self.Wco))

    def init_hidden(self, x):
        shape = (self.hidden_channels, *x.shape[2:])
        self.Wci, self.Wcf, self.Wco = (x.new_zeros(1, *shape) for _ in range(3))
        return x.new_zeros(x.size(0), *shape), x.new_zeros(x.size(0), *shape)


class Automan000(nn.Module):
    """Runs ``step`` times over the same frame and returns the effective steps."""

    def __init__(self, input_channels, hidden_channels, kernel_size, step=1, effective_step=(1,)) -> None:
        super().__init__()
        self.step = step
        self.effective_step = list(effective_step)
        self.num_layers = len(hidden_channels)
        sizes = [input_channels, *hidden_channels]
        for k in range(self.num_layers):
            setattr(self, f"cell{k}", Automan000Cell(sizes[k], sizes[k + 1], kernel_size))

    def forward(self, input):
        states, outputs = [], []
        for t in range(self.step):
            x = input
            for k in range(self.num_layers):
                cell = getattr(self, f"cell{k}")
                if t == 0:
                    states.append(cell.init_hidden(x))
                x, c = cell(x, *states[k])
                states[k] = (x, c)
            if t in self.effective_step:
                outputs.append(x)
        return outputs, (x, c)


class Hzzone(nn.Module):
    """Gates i, f, g, o; peepholes a pixel that are plain tensors, not parameters; takes and returns (T, B, ...)."""

    def __init__(self, input_channel, num_filter, b_h_w, kernel_size, stride=1, padding=1) -> None:
        super().__init__()
        self._conv = nn.Conv2d(input_channel + num_filter, 4 * num_filter, kernel_size, stride, padding)
        _, self._state_height, self._state_width = b_h_w
        self._num_filter = num_filter
        self._input_channel = input_channel
        for gate in "ifo":
            setattr(self, f"Wc{gate}", torch.zeros(1, num_filter, *b_h_w[1:]).requires_grad_())

    def forward(self, inputs=None, states=None, seq_len=5):
        if states is None:
            h = inputs.new_zeros(inputs.size(1), self._num_filter, self._state_height, self._state_width)
            c = h
        else:
            h, c = states
        outputs = []
        for t in range(seq_len):
            shape = (h.size(0), self._input_channel, self._state_height, self._state_width)
            x = h.new_zeros(shape) if inputs is None else inputs[t]
            z = split(self._conv(torch.cat([x, h], dim=1)), "ifgo")
            h, c = step(z, c, peephole=(self.Wci, self.Wcf, self.Wco))
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class SACell(nn.Module):
    """Gates i, f, c, o; peepholes a pixel."""

    def __init__(self, in_channels, out_channels, kernel_size, frame_size, activation=torch.tanh) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(in_channels + out_channels, 4 * out_channels, kernel_size, padding="same")
        for gate in "ifo":
            setattr(self, f"W_c{gate}", nn.Parameter(torch.randn(out_channels, *frame_size)))

    def forward(self, X, prev_h, prev_cell):
        z = split(self.conv(torch.cat([X, prev_h], dim=1)), "ifgo")
        return step(z, prev_cell, self.activation, (self.W_ci, self.W_cf, self.W_co), self.activation)


class SAConvLSTM(nn.Module):
    """Takes (B, C, T, H, W), and a state that it does not use."""

    def __init__(self, in_channels, out_channels, kernel_size, frame_size, activation=torch.tanh) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.ConvLSTMCell = SACell(in_channels, out_channels, kernel_size, frame_size, activation)

    def forward(self, X, h=None, cell=None):
        b, _, steps, height, width = X.shape
        output = X.new_zeros(b, self.out_channels, steps, height, width)
        h = cell = X.new_zeros(b, self.out_channels, height, width)
        for t in range(steps):
            h, cell = self.ConvLSTMCell(X[:, :, t], h, cell)
            output[:, :, t] = h
        return output


class OpenSTLCell(nn.Module):
    """Gates i, f, g, o from a convolution of x and one of h without bias; two convolutions that nothing uses."""

    def __init__(self, in_channel, num_hidden, height, width, filter_size, stride=1, layer_norm=False) -> None:
        super().__init__()
        self.num_hidden = num_hidden

        def conv(a, b):
            layers = [nn.Conv2d(a, b, filter_size, stride, filter_size // 2, bias=False)]
            return nn.Sequential(*layers, *([nn.LayerNorm([b, height, width])] if layer_norm else []))

        self.conv_x = conv(in_channel, 4 * num_hidden)
        self.conv_h = conv(num_hidden, 4 * num_hidden)
        self.conv_o = conv(2 * num_hidden, num_hidden)
        self.conv_last = nn.Conv2d(2 * num_hidden, num_hidden, 1, bias=False)

    def forward(self, x_t, h_t, c_t):
        return step(split(self.conv_x(x_t) + self.conv_h(h_t), "ifgo"), c_t)


class OpenSTLModel(nn.Module):
    """A predictor over (B, T, H, W, C) that calls its cells itself."""

    def __init__(self, channels, hidden, layers, layer_norm=False) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell_list = nn.ModuleList(
            [OpenSTLCell(channels if k == 0 else hidden, hidden, 8, 8, 5, 1, layer_norm) for k in range(layers)]
        )
        self.conv_last = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, frames_tensor):
        frames = frames_tensor.permute(0, 1, 4, 2, 3)
        zeros = frames.new_zeros(frames.size(0), self.hidden, *frames.shape[3:])
        h, c = [zeros] * len(self.cell_list), [zeros] * len(self.cell_list)
        outputs = []
        for t in range(frames.size(1)):
            x = frames[:, t]
            for k, cell in enumerate(self.cell_list):
                h[k], c[k] = cell(x, h[k], c[k])
                x = h[k]
            outputs.append(self.conv_last(x))
        return torch.stack(outputs, dim=1).permute(0, 1, 3, 4, 2)


class Kamo(nn.Module):
    """Conv2dLSTM with the names, the options and the results of nn.LSTM; two biases; gates i, f, g, o."""

    def __init__(self, in_channels, out_channels, kernel_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                 bidirectional=False, stride=1, dilation=1, groups=1, peephole=False) -> None:  # fmt: skip
        super().__init__()
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        self.dropout, self.bidirectional, self.out_channels = dropout, bidirectional, out_channels
        self.stride, self.dilation, self.groups = (stride,) * 2, (dilation,) * 2, groups
        for layer in range(num_layers):
            inputs = in_channels if layer == 0 else out_channels * (2 if bidirectional else 1)
            for end in self.ends(layer):
                shapes = {
                    "weight_ih": (4 * out_channels, inputs // groups),
                    "weight_hh": (4 * out_channels, out_channels // groups),
                }
                for name, shape in shapes.items():
                    weight = torch.randn(*shape, kernel_size, kernel_size) / (shape[1] * kernel_size**2) ** 0.5
                    setattr(self, name + end, nn.Parameter(weight))
                for name in ("bias_ih", "bias_hh") if bias else ():
                    setattr(self, name + end, nn.Parameter(torch.randn(4 * out_channels)))
                for gate in "ifo" if peephole else "":
                    weight = torch.randn(out_channels, out_channels, kernel_size, kernel_size)
                    setattr(self, f"weight_p{gate}{end}", nn.Parameter(weight))

    def ends(self, layer):
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def convolve(self, x, weight, bias):
        total = self.dilation[0] * (weight.size(2) - 1)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, weight, bias, dilation=self.dilation, groups=self.groups)

    def one(self, x, end, h, c):
        bias_ih, bias_hh = getattr(self, f"bias_ih{end}", None), getattr(self, f"bias_hh{end}", None)
        z = self.convolve(x, getattr(self, f"weight_ih{end}"), bias_ih)
        return step(split(z + self.convolve(h, getattr(self, f"weight_hh{end}"), bias_hh), "ifgo"), c)

    def run(self, frames, end, h, c):
        """frames: a list of (B_t, C, H, W), B_t not growing."""
        reverse = end.endswith("_reverse")
        outputs = [None] * len(frames)
        for t in reversed(range(len(frames))) if reverse else range(len(frames)):
            n = frames[t].size(0)
            h_t, c_t = self.one(frames[t], end, h[:n], c[:n])
            h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
            outputs[t] = h_t
        return outputs, h, c

    def forward(self, input, hx=None):
        packed = isinstance(input, PackedSequence)
        if packed:
            frames = list(input.data.split(input.batch_sizes.tolist()))
        else:
            frames = list(input.transpose(0, 1) if self.batch_first else input)
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            zeros = frames[0].new_zeros(count, frames[0].size(0), self.out_channels, *frames[0].shape[2:])
            hx = (zeros, zeros)
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            results = []
            for end in self.ends(layer):
                outputs, h, c = self.run(frames, end, hx[0][len(h_n)], hx[1][len(c_n)])
                results.append(outputs)
                h_n.append(h)
                c_n.append(c)
            frames = [torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]
            if self.dropout and layer < self.num_layers - 1:
                frames = [F.dropout(frame, self.dropout, self.training) for frame in frames]
        states = (torch.stack(h_n), torch.stack(c_n))
        if packed:
            return PackedSequence(torch.cat(frames), input.batch_sizes), states
        output = torch.stack(frames)
        return output.transpose(0, 1) if self.batch_first else output, states


class Spiking(nn.Module):
    """A spiking neuron around a ConvLSTM cell: states in buffers, spikes with a surrogate gradient, resets, pooling."""

    instances: ClassVar[list[nn.Module]] = []

    def __init__(self, in_channels, out_channels, kernel_size, threshold=1.0, init_hidden=False, reset="none",
                 max_pool=0) -> None:  # fmt: skip
        super().__init__()
        Spiking.instances.append(self)
        self.out_channels, self.init_hidden, self.max_pool = out_channels, init_hidden, max_pool
        self.register_buffer("threshold", torch.tensor(threshold))
        self.register_buffer("syn", torch.zeros(0), persistent=False)
        self.register_buffer("mem", torch.zeros(0), persistent=False)
        self.state_function = {"none": self._plain, "subtract": self._subtract, "zero": self._zero}[reset]
        self.conv = nn.Conv2d(in_channels + out_channels, 4 * out_channels, kernel_size, padding=kernel_size // 2)

    def fire(self, mem):
        soft = torch.sigmoid(5 * (mem - self.threshold))  # the gradient comes from here
        return (mem > self.threshold).to(mem.dtype).detach() + soft - soft.detach()

    def reset_mem(self):
        self.syn, self.mem = torch.zeros_like(self.syn), torch.zeros_like(self.mem)
        return self.syn, self.mem

    @classmethod
    def reset_hidden(cls):
        for neuron in cls.instances:
            neuron.reset_mem()

    def _base_state_function(self, input_):
        z = split(self.conv(torch.cat([input_, self.mem], dim=1)), "ifog")
        mem, syn = step(z, self.syn)
        return syn, mem

    def _base_state_reset_zero(self, input_):
        return 0, self._base_state_function(input_)[1]

    def _plain(self, input_):
        return self._base_state_function(input_)

    def _subtract(self, input_):
        syn, mem = self._base_state_function(input_)
        return syn, mem - self.reset * self.threshold

    def _zero(self, input_):
        syn, mem = self._base_state_function(input_)
        syn_reset, mem_reset = self._base_state_reset_zero(input_)
        return syn - self.reset * syn_reset, mem - self.reset * mem_reset

    def forward(self, input_, syn=None, mem=None):
        if syn is not None:
            self.syn = syn
        if mem is not None:
            self.mem = mem
        shape = (input_.size(0), self.out_channels, *input_.shape[2:])
        if self.mem.shape != shape:
            self.syn, self.mem = input_.new_zeros(shape), input_.new_zeros(shape)
        self.reset = (self.mem > self.threshold).to(input_.dtype)
        self.syn, self.mem = self.state_function(input_)
        spikes = self.fire(F.max_pool2d(self.mem, self.max_pool) if self.max_pool else self.mem)
        return spikes if self.init_hidden else (spikes, self.syn, self.mem)


# --- cells that are no ConvLSTM of this package ----------------------------------------------------------------------


class Jhhuang96Lstm(nn.Module):
    """GroupNorm on the summed pre-activations."""

    def __init__(self, shape, input_channels, filter_size, num_features, norm=True) -> None:
        super().__init__()
        self.shape, self.num_features = shape, num_features
        conv = nn.Conv2d(input_channels + num_features, 4 * num_features, filter_size, padding=filter_size // 2)
        self.conv = nn.Sequential(conv, nn.GroupNorm(4, 4 * num_features))

    def forward(self, inputs=None, hidden_state=None, seq_len=10):
        if hidden_state is None:
            h = c = inputs.new_zeros(inputs.size(1), self.num_features, *self.shape)
        else:
            h, c = hidden_state
        outputs = []
        for t in range(seq_len):
            h, c = step(split(self.conv(torch.cat((inputs[t], h), dim=1)), "ifgo"), c)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class CzifanLstm(nn.Module):
    """BatchNorm on the summed pre-activations, and no tanh on the candidate; takes (B, T, C, H, W)."""

    def __init__(self, in_channels, num_features, kernel_size=3, norm=True, tanh=False) -> None:
        super().__init__()
        self.num_features, self.tanh = num_features, tanh
        conv = nn.Conv2d(
            in_channels + num_features, 4 * num_features, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.conv = nn.Sequential(conv, *([nn.BatchNorm2d(4 * num_features)] if norm else []))

    def forward(self, inputs):
        h = c = inputs.new_zeros(inputs.size(0), self.num_features, *inputs.shape[3:])
        outputs = []
        for t in range(inputs.size(1)):
            z = split(self.conv(torch.cat([inputs[:, t], h], dim=1)), "ifgo")
            h, c = step(z, c, torch.tanh if self.tanh else lambda x: x)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class GeorgeyiasemisLstmCell(nn.Module):
    """tanh twice on the candidate; peepholes in one tensor that is made at the first call."""

    def __init__(self, input_size, hidden_size, kernel_size, twice=True) -> None:
        super().__init__()
        self.hidden_size, self.twice = hidden_size, twice
        self.x2h = nn.Conv2d(input_size, 4 * hidden_size, kernel_size, padding=kernel_size // 2)
        self.h2h = nn.Conv2d(hidden_size, 4 * hidden_size, kernel_size, padding=kernel_size // 2)
        self.Wc = None

    def forward(self, input, hx=None):
        if self.Wc is None:
            self.Wc = nn.Parameter(input.new_zeros(1, 3 * self.hidden_size, *input.shape[2:]))
        if hx is None:
            zeros = input.new_zeros(input.size(0), self.hidden_size, *input.shape[2:])
            hx = (zeros, zeros)
        h, c = hx
        candidate = (lambda x: torch.tanh(torch.tanh(x))) if self.twice else torch.tanh
        return step(split(self.x2h(input) + self.h2h(h), "ifgo"), c, candidate, self.Wc.chunk(3, dim=1))
