"""swap and unswap on twins of the implementations that people use."""

import copy
import importlib
import io
import itertools
import pickle
import threading

import pytest
import swap_twins as twins
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fused_convlstm
from fused_convlstm import swap, unswap
from fused_convlstm.swap import SwappedLayer
from fused_convlstm.swap.recognise import largest_error
from fused_convlstm.swap.values import same_structure, tensors_in

SIZE = (6, 5)
swap_steps = importlib.import_module("fused_convlstm.swap.swap")  # the function has the name of the module


def frames(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def states(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tanh(frames(*shape)), frames(*shape)) for _ in range(count)]


def state(*shape: int) -> tuple[Tensor, Tensor]:
    return states(1, *shape)[0]


def spiking(**options: object) -> nn.Module:
    return twins.Spiking(3, 4, 3, threshold=0.1, **options)


# Name -> (module, arguments of its calls). Every module keeps its own call signature and its own results.
SERVED = {
    "ndrplz": lambda: (twins.Ndrplz(3, [5, 4], (3, 5), 2, True, True, True), [(frames(2, 4, 3, *SIZE),)]),
    "ndrplz time-major, last layer": lambda: (twins.Ndrplz(3, 4, (1, 3), 3), [(frames(4, 2, 3, *SIZE),)]),
    "ndrplz, a kernel a layer, no bias": lambda: (
        twins.Ndrplz(3, [5, 4], [(3, 3), (1, 5)], 2, True, bias=False), [(frames(2, 4, 3, *SIZE),)],
    ),
    "torchgeo": lambda: (
        twins.Torchgeo(3, [4, 4], (3, 3), 2, True, return_all_layers=True),
        [(frames(2, 4, 3, *SIZE),), (frames(2, 4, 3, *SIZE), states(2, 2, 4, *SIZE))],
    ),
    "ndrplz that overlooks the state": lambda: (
        twins.Overlooking(3, 4, (3, 3), 2, True), [(frames(2, 4, 3, *SIZE), states(2, 2, 4, *SIZE))],
    ),
    "aserdega": lambda: (twins.Aserdega(SIZE, 3, [4, 5], (3, 3)), [
        (frames(4, 2, 3, *SIZE), None), (frames(4, 2, 3, *SIZE), [state(2, 4, *SIZE), state(2, 5, *SIZE)]),
    ]),
    "aserdega with peepholes": lambda: (
        twins.Aserdega(SIZE, 3, [4, 5], (3, 3), True, peephole=True), [(frames(2, 4, 3, *SIZE), None)],
    ),
    "automan000": lambda: (twins.Automan000(3, [4, 6], 3, 4, [1, 3]), [(frames(2, 3, *SIZE),)]),
    "Hzzone": lambda: (twins.Hzzone(3, 4, (2, *SIZE), 3), [
        (frames(4, 2, 3, *SIZE), None, 3), (frames(4, 2, 3, *SIZE), state(2, 4, *SIZE), 4),
        (None, state(2, 4, *SIZE), 3),
    ]),
    "SA-ConvLSTM": lambda: (twins.SAConvLSTM(3, 4, 3, SIZE), [
        (frames(2, 3, 4, *SIZE),), (frames(2, 3, 4, *SIZE), *state(2, 4, *SIZE)),
    ]),
    "OpenSTL": lambda: (twins.OpenSTLModel(2, 4, 2), [(frames(2, 3, *SIZE, 2),)]),
    "kamo-naoyuki": lambda: (twins.Kamo(3, 4, 3, 2), [
        (frames(4, 2, 3, *SIZE),), (frames(4, 2, 3, *SIZE), (frames(2, 2, 4, *SIZE), frames(2, 2, 4, *SIZE))),
        (pack_sequence([frames(4, 3, *SIZE), frames(2, 3, *SIZE)]),),
    ]),
    "kamo-naoyuki, both directions": lambda: (
        twins.Kamo(3, 4, 2, 2, batch_first=True, bidirectional=True, dilation=2, bias=False, dropout=0.5),
        [(frames(2, 4, 3, *SIZE),), (pack_sequence([frames(4, 3, *SIZE), frames(2, 3, *SIZE)]),)],
    ),
    "snntorch": lambda: (spiking(), [(frames(2, 3, *SIZE), *state(2, 4, *SIZE)), (frames(2, 3, *SIZE),)]),
    "snntorch, hidden state, pooling": lambda: (
        spiking(init_hidden=True, max_pool=2), [(frames(2, 3, *SIZE),), (frames(2, 3, *SIZE),)],
    ),
    "snntorch, reset by subtraction": lambda: (
        spiking(reset="subtract"), [(frames(2, 3, *SIZE), *state(2, 4, *SIZE)), (frames(2, 3, *SIZE),)],
    ),
    "snntorch, reset to zero": lambda: (
        spiking(reset="zero"), [(frames(2, 3, *SIZE), *state(2, 4, *SIZE)), (frames(2, 3, *SIZE),)],
    ),
    "czifan, if it were right": lambda: (twins.CzifanLstm(3, 4, norm=False, tanh=True), [(frames(2, 4, 3, *SIZE),)]),
    "georgeyiasemis, if it were right": lambda: (
        twins.GeorgeyiasemisLstmCell(3, 4, 3, twice=False),
        [(frames(2, 3, *SIZE), state(2, 4, *SIZE)), (frames(2, 3, *SIZE),)],
    ),
}  # fmt: skip


TWO_BIASES = ("kamo-naoyuki", "georgeyiasemis")


def make(name: str) -> tuple[nn.Module, list[tuple]]:
    torch.manual_seed(3)
    module, calls = SERVED[name]()
    module = module.double().eval()
    if name.startswith("georgeyiasemis"):
        module(*calls[0])  # makes its peepholes
    for value in vars(module).values():  # plain tensors do not follow .double()
        if isinstance(value, Tensor):
            value.data = torch.randn(value.shape, dtype=torch.float64)
    return module, calls


def holder(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"inner": module})


def gradients(module: nn.Module, results: object, inputs: object) -> list[Tensor]:
    outputs = [x for x in tensors_in(results) if x.requires_grad]
    torch.manual_seed(5)
    grads = torch.autograd.grad(
        outputs, inputs, [torch.randn(x.shape, dtype=x.dtype) for x in outputs], allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


@pytest.mark.parametrize("name", SERVED)
def test_same_results_and_gradients(name: str) -> None:
    """The whole call, more than one call in a row: values, types of the containers, gradients of the inputs."""
    module, calls = make(name)
    model = holder(copy.deepcopy(module))
    report = swap(model)
    assert report.model is model
    assert report.replaced, str(report)
    assert not report.kept, str(report)
    assert any(isinstance(m, SwappedLayer) for m in model.modules())
    for call in calls:
        leaves = tensors_in(call)
        for leaf in leaves:
            leaf.requires_grad_()
        expected = module(*call)
        expected_grads = gradients(module, expected, leaves)
        actual = model["inner"](*call)
        assert same_structure(expected, actual)
        for a, b in zip(tensors_in(expected), tensors_in(actual), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        for a, b in zip(expected_grads, gradients(model, actual, leaves), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in SERVED if not name.startswith(TWO_BIASES)])
def test_training_after_swap_and_unswap(name: str) -> None:
    """Steps of SGD do the same to both; unswap gives the trained weights in the original names and shapes.

    Not for two biases that are added: they become one, which learns half as fast.
    """
    module, calls = make(name)
    model = holder(copy.deepcopy(module))
    swap(model)
    for net in (module, model):
        # Peepholes that are no parameters do not learn before the swap: they must not learn after it here.
        weights = [p for n, p in net.named_parameters() if name != "Hzzone" or "peephole" not in n]
        optimiser = torch.optim.SGD(weights, lr=0.1)
        target = net if net is module else net["inner"]
        for _ in range(2):
            if name.startswith("snntorch"):
                target.reset_mem()
            optimiser.zero_grad()
            sum(x.square().mean() for call in calls[:1] for x in tensors_in(target(*call))).backward()
            optimiser.step()
    restored = unswap(model)["inner"]
    assert type(restored) is type(module)
    expected, actual = module.state_dict(), restored.state_dict()
    assert expected.keys() == actual.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", SERVED)
def test_unswap_returns_the_weights(name: str) -> None:
    module, _ = make(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = holder(module)
    swap(model)
    assert unswap(model)["inner"] is module
    after = module.state_dict()
    for key, value in after.items():
        if name.startswith(TWO_BIASES) and "bias" in key:  # the first has it all now
            other = key.replace("ih", "hh").replace("x2h", "h2h")
            first = key.replace("hh", "ih").replace("h2h", "x2h")
            torch.testing.assert_close(after[first] + after[other], before[first] + before[other])
        else:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", SERVED)
def test_checkpoint_of_before_loads_after(name: str) -> None:
    module, calls = make(name)
    checkpoint = holder(module).state_dict()
    other = holder(make(name)[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    swap(other)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    other.load_state_dict(checkpoint)
    if "snntorch" in name:
        module.reset_mem(), other["inner"].reset_mem()
    for a, b in zip(tensors_in(other["inner"](*calls[0])), tensors_in(module(*calls[0])), strict=True):
        torch.testing.assert_close(a, b)
    untouched = {key for key, value in other.state_dict().items() if torch.equal(value, before[key])}
    # The peepholes of Hzzone's are no parameters, so no checkpoint of before has them.
    assert all("peephole" in key if name == "Hzzone" else "threshold" in key for key in untouched), untouched
    other.load_state_dict(other.state_dict())  # and one of after the swap, of course


@pytest.mark.parametrize("name", SERVED)
def test_assigned_checkpoint_keeps_its_precision(name: str) -> None:
    module, calls = make(name)
    checkpoint = {key: value.clone() for key, value in holder(module).state_dict().items()}
    other = holder(make(name)[0].float())
    swap(other)
    other.load_state_dict(checkpoint, assign=True)
    if name != "Hzzone":  # its peepholes are in no checkpoint
        assert all(parameter.dtype == torch.float64 for parameter in other.parameters())
        if "snntorch" in name:
            module.reset_mem(), other["inner"].reset_mem()
        for a, b in zip(tensors_in(other["inner"](*calls[0])), tensors_in(module(*calls[0])), strict=True):
            torch.testing.assert_close(a, b)
    restored = holder(unswap(other)["inner"]).state_dict()
    assert all(value.dtype == checkpoint[key].dtype for key, value in restored.items())


def test_checkpoint_of_another_size_is_refused() -> None:
    model = holder(twins.Ndrplz(3, 4, (3, 3), 1))
    checkpoint = model.state_dict() | {"inner.cell_list.0.conv.bias": torch.zeros(1)}  # would broadcast
    swap(model)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for inner.cell_list.0.conv.bias: expected \(16,\), got \(1,\)"
    ):
        model.load_state_dict(checkpoint)


REFUSED = {
    "jhhuang96": (lambda: twins.Jhhuang96Lstm(SIZE, 3, 3, 4), ["GroupNorm on the pre-activations"]),
    "czifan": (
        lambda: twins.CzifanLstm(3, 4), ["BatchNorm2d on the pre-activations", "candidate passes through nothing"],
    ),
    "czifan without norm": (lambda: twins.CzifanLstm(3, 4, norm=False), ["candidate passes through nothing"]),
    "georgeyiasemis": (lambda: twins.GeorgeyiasemisLstmCell(3, 4, 3), ["candidate passes through tanh twice"]),
    "OpenSTL with LayerNorm": (
        lambda: twins.OpenSTLModel(2, 4, 2, layer_norm=True), ["LayerNorm on the pre-activations"],
    ),
    "SA-ConvLSTM with relu": (
        lambda: twins.SAConvLSTM(3, 4, 3, SIZE, torch.relu),
        ["candidate passes through relu", "cell state passes through relu"],
    ),
    "aserdega with sigmoid": (
        lambda: twins.Aserdega(SIZE, 3, [4], (3, 3), activation=torch.sigmoid), ["candidate passes through sigmoid"],
    ),
    "kamo-naoyuki with peepholes": (lambda: twins.Kamo(3, 4, 3, peephole=True), ["peepholes are convolutions"]),
    "kamo-naoyuki with groups": (lambda: twins.Kamo(4, 4, 3, groups=2), ["2 groups over all gates"]),
    "kamo-naoyuki with a stride": (lambda: twins.Kamo(3, 4, 3, stride=2), ["strided convolution"]),
    "ndrplz with an even kernel": (lambda: twins.Ndrplz(3, 4, (2, 2), 1), ["does not keep the size of the state"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    build, reasons = REFUSED[name]
    torch.manual_seed(0)
    model = holder(build())
    before = list(model.modules())
    report = swap(model)
    assert not report.replaced, str(report)
    assert list(model.modules()) == before
    for reason in reasons:
        assert any(reason in kept.reason for kept in report.kept), str(report)
        assert reason in str(report)


def with_padding_mode() -> nn.Module:
    cell = twins.GeorgeyiasemisLstmCell(3, 4, 3, twice=False)
    cell.x2h.padding_mode = "circular"
    return cell


def reshaped(change) -> nn.Module:
    """A module with nn.LSTM's names whose weights are of another kind of layer."""
    layer = twins.Kamo(3, 4, 3, bias=False)
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(change(weight.detach())))
    return layer


def with_a_lock() -> nn.Module:
    cell = twins.NdrplzCell(3, 4, (3, 3))
    cell.lock = threading.Lock()
    return cell


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: reshaped(lambda w: w[..., 0]), "its convolutions are 1-dimensional"),
        (lambda: reshaped(lambda w: w[:12]), "it does not have four gates"),
        (lambda: reshaped(lambda w: w[..., 0, 0]), "its weights are not of a convolution"),
        (with_padding_mode, "its two convolutions differ in their padding_mode"),
        (with_a_lock, "it cannot be copied to be tried out: TypeError"),
    ],
)
def test_other_reasons_to_keep(build, reason: str) -> None:
    module = build()
    module.__class__ = type("SomeLstm", (type(module),), {})
    assert reason in swap(holder(module)).kept[0].reason


@pytest.mark.parametrize("order", ["".join(letters) for letters in itertools.permutations("ifgo")])
def test_every_order_of_gates_is_found(order: str) -> None:
    cell = type("LstmCell", (twins.NdrplzCell,), {"order": order})(3, 4, (3, 3)).double()
    x, hx = frames(2, 3, *SIZE), state(2, 4, *SIZE)
    expected = cell(x, hx)
    report = swap(cell)
    assert report.replaced[0].how.endswith(f"gates {', '.join(order)}"), str(report)
    for a, b in zip(expected, report.model(input_tensor=x, cur_state=hx), strict=True):
        torch.testing.assert_close(b, a)


class Unlike(nn.Module):
    """A cell under names that tell nothing, with h before x, another bias, +1 on f and hard gates."""

    def __init__(self, gate=torch.nn.functional.hardsigmoid, offset=1.0) -> None:
        super().__init__()
        self.q = nn.Conv2d(7, 16, 3, padding=1)
        self.gate, self.offset = gate, offset

    def forward(self, a, b):
        z = self.q(torch.cat([b[0], a], dim=1))
        g, f, i, o = z.chunk(4, dim=1)
        c = self.gate(f + self.offset) * b[1] + self.gate(i) * g.tanh()
        return [self.gate(o) * c.tanh(), c]


@pytest.mark.parametrize("gate", [torch.sigmoid, nn.functional.hardsigmoid, lambda x: (0.2 * x + 0.5).clamp(0, 1)])
def test_maths_is_found_under_any_name(gate) -> None:
    cell = Unlike(gate).double()
    x, hx = frames(2, 3, *SIZE), state(2, 4, *SIZE)
    expected = cell(x, hx)
    report = swap(cell)
    assert "gates g, f, i, o, h before x, +1 on f" in report.replaced[0].how
    actual = report.model(x, hx)
    assert type(actual) is list
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a)
    assert torch.equal(unswap(report.model).q.bias, cell.q.bias)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(7, 16, 3, padding=1)

    def forward(self, x, h):
        a, b, c, d = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        return (a.sigmoid() * h + b.sigmoid() * c.tanh()) * d


def test_other_layers_are_left_alone_and_not_mentioned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()), nn.LSTM(4, 4), Gru())
    report = swap(model)
    assert not report.replaced
    assert not report.kept


def test_fused_layers_are_left_alone() -> None:
    model = nn.ModuleList([fused_convlstm.ConvLSTM2d(3, 4, 3), fused_convlstm.PooledGateConvLSTM2dCell(3, 4, 3)])
    assert str(swap(model)) == "replaced 0, kept 0"
    twice = holder(twins.Ndrplz(3, 4, (3, 3), 1))
    swap(twice)
    assert str(swap(twice)) == "replaced 0, kept 0"


def test_cells_of_a_stack_with_its_own_ideas() -> None:
    """A stack that no adapter fits keeps its loop; its cells are swapped."""

    class Peculiar(twins.Ndrplz):
        def forward(self, input_tensor, hidden_state=None):
            outputs, finals = super().forward(input_tensor, hidden_state)
            return [2 * output for output in outputs], finals

    model = holder(Peculiar(3, 4, (3, 3), 2).double())
    x = frames(4, 2, 3, *SIZE)
    expected = model["inner"](x)[0][0]
    report = swap(model)
    assert [one.name for one in report.replaced] == ["inner.cell_list.0", "inner.cell_list.1"]
    assert [one.name for one in report.kept] == ["inner"]
    assert "its results differ" in report.kept[0].reason
    torch.testing.assert_close(model["inner"](x)[0][0], expected)


class Regularised(twins.NdrplzCell):
    """Does ``what`` in training mode alone."""

    def __init__(self, what) -> None:
        super().__init__(3, 4, (3, 3))
        self.what = what

    def forward(self, input_tensor, cur_state):
        if self.training:
            return self.what(super().forward, input_tensor, *cur_state)
        return super().forward(input_tensor, cur_state)


@pytest.mark.parametrize(
    "what",
    [
        lambda step, x, h, c: step(nn.functional.dropout(x, 0.5), (h, c)),
        lambda step, x, h, c: step(nn.functional.dropout2d(x, 1e-6), (h, c)),  # too rare to show in a few frames
        lambda step, x, h, c: tuple(
            torch.where(torch.rand_like(h) < 0.1, a, b) for a, b in zip((h, c), step(x, (h, c)), strict=True)
        ),
        lambda step, x, h, c: step(x, (h + torch.randn_like(h), c)),
        lambda step, x, h, c: step(2 * x, (h, c)),
    ],
    ids=["dropout", "rare dropout", "zoneout", "noise", "another scale"],
)
@pytest.mark.parametrize("training", [False, True])
def test_another_computation_in_training_is_a_reason_to_keep(what, training: bool) -> None:
    model = holder(Regularised(what)).train(training)
    state = torch.get_rng_state()
    report = swap(model, verify=True)
    assert "it computes something else in training mode (dropout" in report.kept[0].reason
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())


def test_dropout_of_nothing_is_no_reason_to_keep() -> None:
    assert swap(holder(Regularised(lambda step, x, h, c: step(nn.functional.dropout(x, 0.0), (h, c))))).replaced


def test_random_numbers_of_the_caller_stay() -> None:
    class Drawing(twins.NdrplzCell):
        def forward(self, input_tensor, cur_state):
            torch.rand(1)
            return super().forward(input_tensor, cur_state)

    model = holder(Drawing(3, 4, (3, 3)))
    state = torch.get_rng_state()
    assert swap(model, verify=True).replaced
    assert torch.equal(torch.get_rng_state(), state)


class ClippedCell(twins.NdrplzCell):
    """As TensorFlow's LSTMs with cell_clip."""

    cell_clip = 3.0

    def forward(self, input_tensor, cur_state):
        h, c = cur_state
        z = twins.split(self.conv(torch.cat([input_tensor, h], dim=1)), self.order)
        c = torch.sigmoid(z["f"]) * c + torch.sigmoid(z["i"]) * torch.tanh(z["g"])
        c = c.clamp(-self.cell_clip, self.cell_clip)
        return torch.sigmoid(z["o"]) * torch.tanh(c), c


class ClippedStack(twins.Ndrplz):
    cell = ClippedCell


class ClippedSequence(twins.CzifanLstm):
    """Begins at zero, so that only many steps reach the limit."""

    def forward(self, inputs):
        h = c = inputs.new_zeros(inputs.size(0), self.num_features, *inputs.shape[3:])
        outputs = []
        for t in range(inputs.size(1)):
            h, c = twins.step(twins.split(self.conv(torch.cat([inputs[:, t], h], dim=1)), "ifgo"), c)
            c = c.clamp(-3.0, 3.0)
            outputs.append(torch.cat([h], dim=1))
        return torch.stack(outputs, dim=1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ClippedCell(3, 4, (3, 3)),
        lambda: ClippedStack(3, 4, (3, 3), 2),
        lambda: ClippedSequence(3, 4, norm=False, tanh=True),
    ],
    ids=["cell", "stack", "sequence"],
)
def test_clipped_states_are_a_reason_to_keep(build) -> None:
    report = swap(holder(build()))
    assert not report.replaced
    assert all("differ where states are large: it may clip them" in kept.reason for kept in report.kept)


@pytest.mark.parametrize("name", SERVED)
def test_recognised_in_single_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module is that cannot run in float64."""
    recognise = importlib.import_module("fused_convlstm.swap.recognise")
    monkeypatch.setattr(recognise, "TOLERANCE", {torch.float32: recognise.TOLERANCE[torch.float32]})
    report = swap(holder(make(name)[0].float()))
    assert report.replaced, str(report)
    assert not report.kept, str(report)


def test_detached_gradients_are_noticed() -> None:
    """Equal results are not enough: a cell that cuts the gradient through time is another layer for training."""

    class DetachingLstmCell(twins.NdrplzCell):
        def forward(self, input_tensor, cur_state):
            return super().forward(input_tensor, [x.detach() for x in cur_state])

    report = swap(holder(DetachingLstmCell(3, 4, (3, 3))))
    assert not report.replaced
    assert "differ" in report.kept[0].reason


def test_dry_run_changes_nothing() -> None:
    model = holder(twins.Ndrplz(3, 4, (3, 3), 2))
    report = swap(model, dry_run=True)
    assert report.dry_run
    assert "would replace inner (Ndrplz)" in str(report)
    assert type(model["inner"]) is twins.Ndrplz
    with pytest.raises(ValueError, match="dry_run"):
        swap(model, verify=True, dry_run=True)


def test_module_in_two_places_is_replaced_in_both() -> None:
    cell = twins.NdrplzCell(3, 4, (3, 3))
    model = nn.ModuleDict({"a": cell, "b": nn.ModuleList([cell])})
    assert len(swap(model).replaced) == 1
    assert isinstance(model["a"], SwappedLayer)
    assert model["a"] is model["b"][0]
    unswap(model)
    assert model["a"] is cell
    assert model["b"][0] is cell


def test_shared_weights_and_hooks_are_reasons_to_keep() -> None:
    first, second = twins.NdrplzCell(3, 4, (3, 3)), twins.NdrplzCell(3, 4, (3, 3))
    second.conv.weight = first.conv.weight
    report = swap(nn.ModuleList([first, second]))
    assert not report.replaced
    assert all("conv.weight is shared" in kept.reason for kept in report.kept)
    hooked = twins.NdrplzCell(3, 4, (3, 3))
    hooked.conv.register_forward_hook(lambda *_: None)
    assert "hooks" in swap(holder(hooked)).kept[0].reason
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        hooked = twins.NdrplzCell(3, 4, (3, 3))
        getattr(hooked.conv.bias, register)(lambda _: None)
        assert "its parameter conv.bias has hooks" in swap(holder(hooked)).kept[0].reason


def test_unswap_keeps_what_was_frozen_in_between() -> None:
    model = holder(twins.NdrplzCell(3, 4, (3, 3)))
    swap(model)
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in unswap(model).parameters())
    swap(model)
    model["inner"].layers[0].weight_hh.requires_grad_(True)
    assert [parameter.requires_grad for parameter in unswap(model).parameters()] == [True, False]
    layer = twins.Kamo(3, 4, 3)
    layer.bias_hh_l0.requires_grad_(False)  # stays, as what learns for both is trained
    assert [name for name, p in unswap(swap(layer).model).named_parameters() if not p.requires_grad] == ["bias_hh_l0"]


def test_frozen_weights_stay_frozen() -> None:
    cell = twins.NdrplzCell(3, 4, (3, 3)).requires_grad_(False)
    model = holder(nn.Sequential(cell))
    swap(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layer = twins.Kamo(3, 4, 3)
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(False)  # the other bias learns what both would
    swapped = swap(layer).model.layers[0]
    assert [p.requires_grad for p in (swapped.weight_ih_l0, swapped.weight_hh_l0, swapped.bias_l0)] == [
        False,
        True,
        True,
    ]


def test_frozen_peepholes_are_found() -> None:
    module, calls = make("aserdega with peepholes")
    model = holder(copy.deepcopy(module.requires_grad_(False)))
    assert swap(model).replaced
    torch.testing.assert_close(model["inner"](*calls[0])[0], module(*calls[0])[0])


def test_one_gate_frozen_is_a_reason_to_keep() -> None:
    module = twins.Automan000(3, [4], 3, 2, [1])
    module.cell0.Wxf.weight.requires_grad_(False)
    report = swap(holder(module))
    assert not report.replaced
    assert "frozen and others not" in report.kept[0].reason


def test_one_added_to_f_without_a_bias_does_not_learn() -> None:
    """The fused layer has it in a bias, for which the original has no place."""
    cell = Unlike(torch.sigmoid)
    cell.q.bias = None
    swapped = swap(cell).model
    assert not swapped.layers[0].bias.requires_grad
    assert unswap(swapped) is cell


@pytest.mark.parametrize(
    "wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_computed_from_others_are_a_reason_to_keep(wrap) -> None:
    stack = twins.Ndrplz(3, 4, (3, 3), 1)
    wrap(stack.cell_list[0].conv)
    report = swap(holder(stack))
    assert not report.replaced
    assert "weight is computed from others" in report.kept[0].reason


def test_weights_on_the_meta_device_are_a_reason_to_keep() -> None:
    with torch.device("meta"):
        stack = twins.Ndrplz(3, 4, (3, 3), 1)
    assert "meta device" in swap(holder(stack)).kept[0].reason


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*script_method:DeprecationWarning")
def test_compiled_and_scripted_modules() -> None:
    """What torch.compile has wrapped would go on running the module that it wrapped."""
    report = swap(holder(torch.compile(twins.NdrplzCell(3, 4, (3, 3)))))
    assert not report.replaced
    assert "torch.compile" in report.kept[0].reason
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(7, 16, 3)))
    assert str(swap(holder(scripted))) == "replaced 0, kept 0"


def test_unknown_conv_lstm_is_mentioned() -> None:
    class ConvLSTMCell3d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(7, 16, 3, padding=1)

    class ConvLSTMNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = ConvLSTMCell3d(), nn.Conv2d(4, 1, 1)

    report = swap(ConvLSTMNet())
    assert [(one.name, one.reason) for one in report.kept] == [
        ("cell", "its convolutions are in no arrangement that is known here")
    ]


def test_attributes_and_methods_of_the_replaced_module() -> None:
    module = twins.Ndrplz(3, 4, (3, 3), 2)
    swapped = swap(module).model.double()
    assert swapped.hidden_dim == [4, 4]
    cell = swap(twins.NdrplzCell(3, 4, (3, 3))).model
    assert cell.init_hidden(2, SIZE)[0].shape == (2, 4, *SIZE)
    with pytest.raises(AttributeError, match=r"conv.*not used any more"):
        _ = cell.conv
    with pytest.raises(AttributeError, match="nothing"):
        _ = cell.nothing
    swapped.return_all_layers = True
    assert len(swapped(frames(3, 2, 3, *SIZE))[0]) == 2


def test_cell_state_that_broadcasts() -> None:
    cell = twins.NdrplzCell(3, 4, (3, 3)).double()
    x, h = frames(2, 3, *SIZE), frames(2, 4, *SIZE)
    swapped = swap(copy.deepcopy(cell)).model
    for shape in ((1, 4, *SIZE), (4, 1, 1)):
        c = frames(*shape).requires_grad_()
        expected, actual = cell(x, (h, c)), swapped(x, (h, c))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(cell, actual, [c]), gradients(cell, expected, [c]))


def test_wrong_arguments() -> None:
    cell = swap(twins.NdrplzCell(3, 4, (3, 3))).model
    with pytest.raises(TypeError, match="cur_state"):
        cell(torch.randn(2, 3, *SIZE))
    with pytest.raises(TypeError, match="other"):
        cell(torch.randn(2, 3, *SIZE), None, other=1)
    for function in (swap, unswap):
        with pytest.raises(ValueError, match="model: expected a Module, got Tensor"):
            function(torch.zeros(1))
    wrapper = type("DistributedDataParallel", (nn.Sequential,), {})
    with pytest.raises(ValueError, match="model: expected one that is not in DistributedDataParallel yet"):
        swap(holder(wrapper(nn.Conv2d(1, 1, 1))))


@pytest.mark.parametrize("name", ["torchgeo", "aserdega with peepholes", "snntorch", "kamo-naoyuki"])
def test_copies_pickles_and_devices(name: str) -> None:
    module, calls = make(name)
    model = holder(module)
    swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model["inner"](*calls[0])
    for one in copies:
        for a, b in zip(tensors_in(one["inner"](*calls[0])), tensors_in(expected), strict=True):
            assert torch.equal(a, b)
        unswap(one)
        assert type(one["inner"]) is type(module)
        assert one["inner"] is not module
    model.float()
    assert next(unswap(model).parameters()).dtype == torch.float32


def test_spiking_neuron_is_still_found_by_its_library() -> None:
    module, calls = make("snntorch, hidden state, pooling")
    model = holder(module)
    swap(model)
    neuron = model["inner"]
    assert isinstance(neuron, twins.Spiking)
    neuron(*calls[0])
    assert neuron.mem.any()
    twins.Spiking.reset_hidden()
    assert not neuron.mem.any()


def test_spiking_neuron_comes_back_as_it_is_now() -> None:
    module, calls = make("snntorch, hidden state, pooling")
    known = len(twins.Spiking.instances)
    model = holder(module)
    swap(model)
    assert len(twins.Spiking.instances) == known + 1  # nothing that was only tried out
    model.double()  # makes new buffers
    model.load_state_dict(model.state_dict() | {"inner.threshold": torch.tensor(0.25)})
    model["inner"].max_pool = 3
    model["inner"](*calls[0])
    mem = model["inner"].mem
    assert unswap(model)["inner"] is module
    assert module.threshold == 0.25
    assert module.max_pool == 3
    assert module.mem is mem
    assert module.state_function.__self__ is module


def test_state_with_a_history_does_not_hinder() -> None:
    module, calls = make("snntorch")
    module(*calls[0])
    assert not module.mem.is_leaf
    assert swap(holder(module)).replaced


def test_modes_and_defaults_of_the_caller_do_not_matter() -> None:
    model = holder(twins.Ndrplz(3, 4, (3, 3), 1))
    with torch.inference_mode(), torch.device("meta"):
        assert swap(model).replaced
    model["inner"](torch.randn(2, 2, 3, *SIZE))[0][0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles() -> None:
    model = swap(twins.Ndrplz(3, 4, (3, 3), 2, True)).model
    x = torch.randn(2, 3, 3, *SIZE)
    outputs, _ = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(outputs[0], model(x)[0][0])


def test_verify_reports_errors_and_times() -> None:
    model = holder(twins.Ndrplz(3, 4, (3, 3), 3, True))
    report = swap(model, verify=True)
    assert report.verification.output_error < 1e-5
    assert report.verification.gradient_error < 1e-5
    assert all(seconds > 0 for seconds in report.verification.forward_seconds + report.verification.training_seconds)
    assert "random frames (2, 8, 3, 32, 32)" in str(report)


@pytest.mark.parametrize("name", ["snntorch", "snntorch, hidden state, pooling"])
def test_verify_leaves_the_state_of_a_neuron_alone(name: str) -> None:
    """A state with a history, too, is not run through again and again."""
    module, calls = make(name)
    module(*calls[0])
    mem = module.mem
    report = swap(holder(module), verify=True)
    assert report.verification.output_error < 1e-10
    assert report.model["inner"].mem is mem


def test_verify_leaves_every_module_in_its_mode() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3).eval(), "inner": twins.Ndrplz(3, 4, (3, 3), 1)})
    swap(model, verify=True)
    assert not model["norm"].training
    assert model["inner"].training
    assert unswap(model)["inner"].training


def test_verify_puts_everything_back_if_the_model_raises() -> None:
    model = Reader()
    before, lstm = list(model.modules()), model.lstm
    with pytest.raises(TypeError, match="scale"):
        swap(model, verify=True, example_input=torch.randint(0, 10, (2, 5)))
    assert list(model.modules()) == before
    assert model.lstm is lstm
    assert model.training


def test_example_inputs_that_verify_nothing() -> None:
    class Longest(Reader):
        def forward(self, tokens):
            return super().forward(tokens, 1.0)["mean"].argmax()

    with pytest.raises(ValueError, match="returns floating-point tensors"):
        swap(Longest(), verify=True, example_input=torch.randint(0, 10, (2, 5)))
    with pytest.raises(ValueError, match="example_input: expected None without verify=True"):
        swap(Reader(), example_input=torch.randint(0, 10, (2, 5)))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.dropout = nn.Dropout(0.5)
        self.lstm = twins.Ndrplz(3, 4, (3, 3), 2, True)

    def forward(self, tokens, scale):
        x = self.embed(tokens).unflatten(-1, (3, 2, 2))
        return {"mean": self.dropout(self.lstm(x)[0][0].mean((2, 3, 4))) * scale, "steps": x.size(1)}


def test_verify_with_an_example_input() -> None:
    """Integers among the arguments, dropout in the model: it is compared in evaluation mode, and left in training."""
    model = Reader().train()
    report = swap(model, verify=True, example_input=(torch.randint(0, 10, (2, 5)), torch.tensor(2.0)))
    assert report.verification.output_error < 1e-5
    assert "the example input" in str(report)
    assert isinstance(model.lstm, SwappedLayer)
    assert model.training
    assert model.lstm.training


@pytest.mark.parametrize("factor", [1.1, torch.nan])
@pytest.mark.parametrize("part", [0, 1])
def test_verify_puts_everything_back_if_the_results_differ(
    factor: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 0 are the results, part 1 the gradients."""
    model = holder(twins.Ndrplz(3, 4, (3, 3), 2, True))
    before = model["inner"]
    run = swap_steps.run

    def wrong_after(module: nn.Module, call: object) -> tuple[object, list[Tensor]]:
        both = run(module, call)
        for x in tensors_in(both[part]) if isinstance(module, SwappedLayer) else []:
            x.data.mul_(factor)
        return both

    monkeypatch.setattr(swap_steps, "run", wrong_after)
    with pytest.raises(RuntimeError, match="the model is as it was"):
        swap(model, verify=True)
    assert model["inner"] is before


def test_infinite_results_may_be_equal() -> None:
    x = torch.tensor([1.0, torch.inf, -2.0])
    assert largest_error(x, x.clone()) == 0
    assert largest_error(x, torch.tensor([1.0, torch.inf, -1.0])) == 0.5
    assert largest_error(x, torch.tensor([1.0, 3.0, -2.0])) == torch.inf
    assert largest_error(x[:0], x[:0]) == 0
