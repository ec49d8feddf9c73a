"""Recipes: files, keys, schedules; tasks: characters, scores."""

import pytest
import torch

from fused_convlstm.data import Batch, Clip, collate
from fused_convlstm.models import create_model
from fused_convlstm.training.recipe import TrainingRecipe, load_recipe, recipe_names
from fused_convlstm.training.tasks import (
    ALPHABET,
    CharacterTask,
    decode_characters,
    encode_text,
    sentence_scores,
    word_scores,
)
from fused_convlstm.training.trainer import learning_rate


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package(name):
    recipe = load_recipe(name)
    # Runs of words need the words' times, which only one part of LRS2 and LRS3 has.
    assert recipe.data.train == ("pretrain" if name.endswith("_lrs") else "train")
    with torch.device("meta"):
        create_model(recipe.model.name, **recipe.model.options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "training: unknown 'epoch'; did you mean 'epochs'"),
        ("trainning.epochs=3", "^unknown 'trainning'; did you mean 'training'"),
        ("model.name=resnet_convlst", "^model.name: unknown 'resnet_convlst'; did you mean 'resnet_convlstm'"),
        ("model.options.mid_chanels=[8]", "^model.options: unknown 'mid_chanels'; did you mean 'mid_channels'"),
        ("model.options.blocks=3", "^model.options.blocks: expected a list, got 3"),
        ("model.options.blocks=[1, 0, 1, 1]", r"^model.options.blocks: expected numbers of at least 1, got \[1, 0"),
        ("model.options.num_classes=7", "^model.options.num_classes: it comes from the data"),
        ("model.options.in_channels=3", "^model.options.in_channels: it comes from the data"),
        ("transform.crop=[60, 50]", "^transform.crop: expected 0 < smallest <= largest"),
        ("transform.size=0", "^transform.size: expected at least 1, got 0"),
        ("transform.flip=2", "^transform.flip: expected a probability"),
        ("transform.shift=-1", "^transform.shift: expected at least 0, got -1"),
        ("transform.validation_crop=0", "^transform.validation_crop: expected at least 1, got 0"),
        ("transform.test_crops=[]", "^transform.test_crops: expected one side or more"),
        ("transform.test_crops=[48, 0]", r"^transform.test_crops: .* got \[48, 0\]"),
        ("training.epochs=0", "^training.epochs: expected at least 1, got 0"),
        ("training.momentum=1", "^training.momentum: expected from 0 to less than 1, got 1.0"),
        ("training.learning_rate=0", "^training.learning_rate: expected a finite number of more than 0, got 0.0"),
        ("training.learning_rate=.nan", "^training.learning_rate: expected a finite number of more than 0, got nan"),
        ("training.learning_rate=.inf", "^training.learning_rate: expected a finite number of more than 0, got inf"),
        ("training.clip_norm=-1", "^training.clip_norm: expected more than 0, got -1.0"),
        ("training.weight_decay=-1", "^training.weight_decay: expected at least 0.0, got -1.0"),
        ("seed=-1", "^seed: expected at least 0, got -1"),
        ("training.frames=[[0,24]", r"^--set: 'training.frames=\[\[0,24\]' is not YAML: [^\n]*$"),
        ("training.epochs=many", "training.epochs: expected int, got 'many'"),
        ("training.optimizer=adamw", "optimizer: expected one of"),
        ("training.frames=[[10, 24], [0, 29]]", "frames: expected"),
        ("data.fraction=0", "fraction: expected more than 0"),
        ("training.epochs", "expected section.key=value"),
        ("training.epochs.more=1", "is no section"),
        ("task=sentences", "unknown 'sentences'"),
    ],
)
def test_bad_keys_and_values(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe("resnet_convlstm_small", [override])


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="did you mean"):
        load_recipe("resnet_convlstn")
    with pytest.raises(ValueError, match="no file"):
        load_recipe(str(tmp_path / "none.yaml"))
    path = tmp_path / "bad.yaml"
    path.write_text("training: [")
    with pytest.raises(ValueError, match=r"not YAML: [^\n]*$"):
        load_recipe(str(path))
    path.write_bytes("# Gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.yaml': not text in UTF-8"):
        load_recipe(str(path))
    path.write_text("text")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_recipe(str(path))
    path.write_text("task: words")
    with pytest.raises(ValueError, match="missing 'model'"):
        load_recipe(str(path))


def test_overrides():
    recipe = load_recipe("resnet_convlstm_small", ["training.learning_rate=1e-5", "model.options.dropout=0.25"])
    assert recipe.training.learning_rate == 1e-5
    assert recipe.model.options["dropout"] == 0.25


def test_frames_of_an_epoch():
    recipe = TrainingRecipe(frames=((0, 24), (10, 29)))
    assert [recipe.frames_at(epoch) for epoch in (0, 9, 10, 50)] == [24, 24, 29, 29]
    assert TrainingRecipe(frames=()).frames_at(3) is None


def test_plateau_schedule():
    recipe = TrainingRecipe(learning_rate=1.0, factor=0.5, patience=1)
    scores = [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3]
    rates = [learning_rate(recipe, 0, 1, scores[:k]) for k in range(len(scores) + 1)]
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_polynomial_schedule_and_warmup():
    recipe = TrainingRecipe(
        learning_rate=1.0, final_learning_rate=0.1, schedule="polynomial", power=2.0, epochs=2, warmup=2
    )
    rates = [learning_rate(recipe, step, 5, []) for step in range(11)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.25)
    assert rates[10] == pytest.approx(0.1)


def path_of(text):
    """Probabilities (T, K) whose best path spells ``text``; "-" is the blank."""
    classes = [0 if c == "-" else ALPHABET.index(c) + 1 for c in text]
    probabilities = torch.full((len(classes), len(ALPHABET) + 1), 0.2 / len(ALPHABET))
    probabilities[torch.arange(len(classes)), classes] = 0.8
    return probabilities


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("--bb-i-nn--", [("bin", 2, 9)]),
        ("b-bii-n n-o-w-", [("bbin", 0, 7), ("now", 8, 13)]),
        ("----", []),
        (" -a- ", [("a", 2, 3)]),
        ("a", [("a", 0, 1)]),
        ("a  b", [("a", 0, 1), ("b", 3, 4)]),
    ],
)
def test_best_path(path, words):
    decoded = decode_characters(path_of(path))
    assert [(word.text, word.start, word.end) for word in decoded] == words
    assert all(word.probability == pytest.approx(0.8) for word in decoded)


def test_text_to_classes():
    assert encode_text("A b").tolist() == [3, 1, 4]
    assert CharacterTask().classes[3] == "a"
    with pytest.raises(ValueError, match="no class for"):
        encode_text("naïve")


def test_letters_belong_behind_the_pause():
    """CTC of what follows the pause, and blanks within it, each clip as if it were alone."""
    torch.manual_seed(0)
    task, lengths, pauses, texts = (
        CharacterTask(),
        torch.tensor([12, 9, 7]),
        torch.tensor([4, 0, 3]),
        ["ab", "now", "a"],
    )
    outputs = torch.randn(12, 3, len(task.classes), requires_grad=True)
    batch = Batch(torch.zeros(12, 3, 1, 4, 4), lengths, torch.full((3,), -1), texts, [""] * 3, pauses)
    loss = task.clip_loss(outputs, batch, lengths)
    expected = torch.zeros(())
    for clip, text in enumerate(texts):
        log_probs = outputs[: lengths[clip], clip].log_softmax(-1)
        target, start = encode_text(text), int(pauses[clip])
        spoken = log_probs[start:].unsqueeze(1)
        expected = expected + torch.nn.functional.ctc_loss(
            spoken, target[None], torch.tensor([len(spoken)]), torch.tensor([len(target)]), reduction="sum"
        )
        expected = expected - log_probs[:start, 0].sum()
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, outputs)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    batch.pauses = None
    assert task.clip_loss(outputs, batch, lengths) != loss
    batch.pauses = lengths + 5  # of boundaries that lie behind the end of the video
    assert task.clip_loss(outputs, batch, lengths).isfinite()


def test_batches_know_the_pauses():
    clips = [
        Clip(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), -1, "now", "a", (("now", 3, 9),)),
        Clip(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), 0, "now", "b"),
    ]
    assert collate(clips).pauses.tolist() == [3, 0]


def test_word_scores():
    probabilities = torch.eye(12)[torch.arange(12)] + 0.01 * torch.arange(12)
    labels = torch.arange(12)
    labels[0] = 11  # of row 0, class 11 is second
    scores = word_scores(probabilities, labels)
    assert scores["top1"] == pytest.approx(11 / 12)
    assert scores["top5"] == scores["top10"] == 1.0


def test_sentence_scores():
    scores = sentence_scores(["bin blue", "now"], ["bin red", "now"])
    assert scores["wer"] == pytest.approx(1 / 3)
    assert scores["accuracy"] == pytest.approx(1 - scores["cer"])
    assert sentence_scores(["bin blue"], ["BIN Blue"]) == {"wer": 0.0, "cer": 0.0, "accuracy": 1.0}
