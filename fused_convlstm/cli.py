"""The command ``fused-convlstm``: from a folder of videos to a trained and examined lipreader."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

DESCRIPTION = """\
Deep convolutional LSTMs on video: from a folder of clips to a trained and examined lipreader.

  fused-convlstm generate mouths                      no data yet? a procedural set in LRW's layout
  fused-convlstm prepare lrw mouths cache             decode, find the mouths, write a compact cache
  fused-convlstm train resnet_convlstm_small cache runs/first
  fused-convlstm evaluate runs/first                  six-crop scores, confusion, each word
  fused-convlstm sensitivity runs/first               which scales matter (fig. 5 of the paper)
  fused-convlstm visualize runs/first                 what its layers look at, as pictures and video
  fused-convlstm predict runs/first video.mp4         words with their times
"""

READERS = {
    "lrw": "LRW: WORD/{train,val,test}/WORD_00001.mp4 with a .txt each",
    "lrw-npz": "LRW, preprocessed: WORD/{train,val,test}/WORD_00001.npz",
    "lrs": "LRS2 or LRS3: {main|trainval,pretrain,test}/ID/NNNNN.mp4 with a .txt each",
    "grid-words": "GRID: .mpg or .mp4 with an .align each, a clip for every word",
    "grid-sentences": "GRID: whole sentences",
    "folders": "your own clips: WORD/*.mp4 or WORD/{train,val,test}/*.mp4",
    "jester": "20BN-Jester: ID/00001.jpg ... and lists *train*.csv, *validation*.csv",
    "isogd-rgb": "ChaLearn IsoGD: lists of M_x.avi K_x.avi label; the colour videos",
    "isogd-depth": "the same, the depth videos",
    "ucf101": "UCF101: Class/v_x.avi and trainlist01.txt, testlist01.txt",
    "hmdb51": "HMDB51: CLASS/x.avi and CLASS_test_split1.txt",
}
WHOLE_FRAMES = ("jester", "isogd-rgb", "isogd-depth", "ucf101", "hmdb51")  # in colour, and no mouth is looked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Errors of use are one line on stderr and status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    errors: tuple[type[Exception], ...] = (ValueError, OSError, *_data_errors())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume (train), or again, goes on", file=sys.stderr)
        return 130
    except errors as error:
        print(f"fused-convlstm {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-convlstm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_generate(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_sensitivity(commands)
    _add_visualize(commands)
    _add_localize(commands)
    _add_fuse(commands)
    _add_predict(commands)
    return parser


# --- info ----------------------------------------------------------------------------------------------------------


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("info", help="versions, hardware and backends, for bug reports")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    from .info import info

    print(info())


# --- data ----------------------------------------------------------------------------------------------------------


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="render a procedural set of clips",
        description="Renders a set as mp4: faces that speak words (several speakers, in LRW's layout), hands that make "
        "gestures, or figures that act among others before a moving camera, with the actor's box (folders). Classes "
        "come in pairs, each the other played backwards. The same command goes on where it was interrupted.",
    )
    parser.add_argument("out", type=Path, help="folder of the set")
    parser.add_argument("--set", choices=("mouths", "gestures", "actors"), default="mouths", help="default mouths")
    parser.add_argument("--words", nargs="+", metavar="WORD", help="mouths: words of its lexicon; default all")
    parser.add_argument("--clips-per-word", type=int, default=60, metavar="N", help="of each class; default 60")
    parser.add_argument("--speakers", type=int, metavar="N", help="mouths: default 12")
    parser.add_argument("--camera", type=float, metavar="X", help="actors: factor of the camera's motion; default 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default one per core")
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from .data.procedural import generate, generate_actors, generate_gestures

    if options.camera is not None and options.set != "actors":
        raise ValueError("--camera: only with the set actors")
    if options.set == "mouths":
        speakers = 12 if options.speakers is None else options.speakers
        generate(options.out, options.words, options.clips_per_word, speakers, options.seed, workers=options.workers)
    else:
        if options.words is not None or options.speakers is not None:
            raise ValueError("--words, --speakers: only with the set mouths")
        if options.set == "gestures":
            generate_gestures(options.out, options.clips_per_word, options.seed, workers=options.workers)
        else:
            camera = 1.0 if options.camera is None else options.camera
            generate_actors(options.out, options.clips_per_word, options.seed, camera=camera, workers=options.workers)
    print(f"made {options.out}")


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    layouts = "\n".join(f"  {name:15} {text}" for name, text in READERS.items())
    parser = commands.add_parser(
        "prepare",
        help="decode clips, find the mouths, write a cache",
        description="Decodes every clip, cuts out the mouth (found by OpenCV's face cascade, tracked and smoothed)\n"
        "and writes a cache for train. Clips that cannot be used are skipped and listed at the end.\n"
        f"The same command goes on where it was interrupted.\n\nlayouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", choices=list(READERS), metavar="LAYOUT", help="one of the above")
    parser.add_argument("root", type=Path, help="folder of the videos")
    parser.add_argument("cache", type=Path, help="folder to write")
    parser.add_argument("--words", nargs="+", metavar="WORD", help="grid-words: only these words, or groups: digit ...")
    parser.add_argument("--frames", type=int, metavar="N", help="grid-words: frames around each word; default 29")
    parser.add_argument(
        "--box", nargs=4, type=float, metavar=("X", "Y", "WIDTH", "HEIGHT"), help="a fixed box in place of the mouth"
    )
    parser.add_argument(
        "--whole", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
        help="the whole picture, resized, in place of the mouth; gestures and actions: default 128 171",
    )  # fmt: skip
    parser.add_argument("--rgb", action="store_true", help="in colour, as gestures and actions always are")
    parser.add_argument("--flow", choices=("dis", "farneback"), help="add optical flow")
    parser.add_argument("--fold", type=int, choices=(1, 2, 3), help="ucf101, hmdb51: the split; default 1")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default one per core")
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from . import data

    if options.layout != "grid-words" and (options.words is not None or options.frames is not None):
        raise ValueError("--words, --frames: only with the layout grid-words")
    if options.fold is not None and options.layout not in ("ucf101", "hmdb51"):
        raise ValueError("--fold: only with the layouts ucf101 and hmdb51")
    reader: data.Reader
    if options.layout in ("ucf101", "hmdb51"):
        reader = (data.UCF101 if options.layout == "ucf101" else data.HMDB51)(options.root, options.fold or 1)
    elif options.layout in ("isogd-rgb", "isogd-depth"):
        reader = data.IsoGD(options.root, options.layout.removeprefix("isogd-"))
    elif options.layout == "jester":
        reader = data.Jester(options.root)
    elif options.layout == "grid-words":
        words = None if options.words is None else tuple(options.words)
        reader = data.GRID(options.root, "word", words, 29 if options.frames is None else options.frames)
    elif options.layout == "grid-sentences":
        reader = data.GRID(options.root, "sentence")
    else:
        classes: dict[str, Callable[..., data.Reader]] = {
            "lrw": data.LRW,
            "lrw-npz": data.LRWCrops,
            "lrs": data.LRS,
            "folders": data.WordFolders,
        }
        reader = classes[options.layout](options.root)
    if options.box is not None and options.whole is not None:
        raise ValueError("--box, --whole: expected one of them")
    crop: data.Crop | None = None if options.box is None else data.BoxCrop(*options.box)
    if options.whole is not None:
        crop = data.WholeFrame(*options.whole)
    elif crop is None and options.layout in WHOLE_FRAMES:
        crop = data.WholeFrame()
    report = data.prepare(
        reader, options.cache, crop=crop, rgb=options.rgb or options.layout in WHOLE_FRAMES, flow=options.flow,
        workers=options.workers,
    )  # fmt: skip
    for name, reason in report.skipped:
        print(f"skipped {name}: {reason}")
    print(f"{report.done} clips in {options.cache}, {len(report.skipped)} skipped, {report.resampled} videos resampled")
    if not report.done:
        raise ValueError("no clip could be used")


# --- training ------------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model by a recipe",
        description="Trains by a recipe: one that comes with the package (see --list) or a YAML file. Start it under "
        "torchrun to use several GPUs or machines:\n\n"
        "  torchrun --nproc-per-node 8 -m fused_convlstm train resnet_convlstm cache runs/lrw\n\n"
        "The run's folder gets the recipe, metrics.csv, curves.png, TensorBoard logs, the best model and checkpoints. "
        "With --resume a run that was stopped, at any moment, goes on as if it had not been.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or a YAML file")
    parser.add_argument("cache", nargs="?", type=Path, help="folder made by prepare")
    parser.add_argument("out", nargs="?", type=Path, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as training.epochs=20")
    parser.add_argument("--init-from", metavar="MODEL", help="start from this model file (training.init_from)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    parser.add_argument("--device", help="cpu, cuda, ...; default a GPU if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--list", action="store_true", help="list the recipes and models, and stop")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from .data.files import locked
    from .models import model_names
    from .training import Processes, Trainer, load_recipe, recipe_names
    from .training.memory import keep_freed_memory

    if options.list:
        print("recipes:", *recipe_names(), "\nmodels:", *model_names(), sep="\n  ")
        return
    if options.out is None:
        raise ValueError("expected RECIPE CACHE OUT (--list lists the recipes)")
    recipe = load_recipe(options.recipe, options.set)
    recipe = replace(recipe, data=replace(recipe.data, cache=str(options.cache)))
    if options.init_from is not None:
        recipe = replace(recipe, training=replace(recipe.training, init_from=options.init_from))
    keep_freed_memory()
    processes = Processes.join(options.device)
    with ExitStack() as stack:
        stack.callback(processes.leave)
        problem = None
        if processes.is_first:
            try:
                stack.enter_context(locked(options.out))
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := processes.gather(problem)[0]:  # the first process looks, and all of them raise
            raise ValueError(problem)
        trainer = Trainer(recipe, options.out, processes, resume=options.resume, progress=not options.quiet)
        best = trainer.fit()
        if processes.is_first:
            scores = ", ".join(f"{k} {v:.4f}" for k, v in best.items() if k.startswith("validation_"))
            print(f"best epoch {best.get('epoch')}: {scores}\nreport: {options.out}")


# --- analysis ------------------------------------------------------------------------------------------------------


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a run, or a model file")
    parser.add_argument("--cache", type=Path, help="folder made by prepare; default that of the run")
    parser.add_argument("--split", help="part of the cache")
    parser.add_argument("--out", type=Path, help="folder of the report; default one in the run's folder")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--device", help="cpu, cuda, ...; default a GPU if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="scores on the test clips",
        description="Averages the outputs of six crops (three sizes and their mirror images). Words: top-1, 5, 10, "
        "accuracy of each word, confusion matrix. Sentences: word and character error rates.",
    )
    _add_evaluation_arguments(parser)
    parser.add_argument("--one-crop", action="store_true", help="one crop only, six times as fast")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, evaluate

    cache, split, out = _evaluation_places(options, "test", "evaluation")
    reader = TrainedReader.load(options.model, _device(options.device))
    scores = evaluate(
        reader, cache, split, out, one_crop=options.one_crop, batch_size=options.batch_size, progress=not options.quiet
    )
    print(
        ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{value} {name}" for name, value in scores.items()
        )
    )
    print(f"report: {out}")


def _add_sensitivity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sensitivity",
        help="which spatiotemporal scales a model uses",
        description="Resets the states of the ConvLSTMs of one scale every T frames, all else untouched, and gives the "
        "score relative to normal: a table of scales and T, as CSV and as a heat map.",
    )
    _add_evaluation_arguments(parser)
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 3, 5, 10, 15], metavar="T")
    parser.add_argument("--clips", type=int, default=5000, metavar="N", help="random clips to use; default 5000")
    parser.set_defaults(run=_sensitivity)


def _sensitivity(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, sensitivity

    cache, split, out = _evaluation_places(options, "validation", "sensitivity")
    reader = TrainedReader.load(options.model, _device(options.device))
    rows = sensitivity(
        reader, cache, split, out, periods=options.periods, clips=options.clips, batch_size=options.batch_size,
        progress=not options.quiet,
    )  # fmt: skip
    print("score relative to normal when a scale's states are reset every T frames")
    print(" ".join(f"{name:>8}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{v:>8}" if isinstance(v, str) else f"{v:8.1%}" for v in row.values()))
    print(f"report: {out}")


def _add_visualize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "visualize",
        help="maps of the recurrent layers over clips, as pictures and video",
        description="For clips of each class: at every step the feature map with the largest sum of activations of "
        "each ConvLSTM (fig. 3 of Zhang et al.), and the attention maps of the layers that have them, over the frames.",
    )
    _add_evaluation_arguments(parser)
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="default 8")
    parser.set_defaults(run=_visualize)


def _visualize(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, visualize

    cache, split, out = _evaluation_places(options, "test", "maps")
    for path in visualize(
        TrainedReader.load(options.model, _device(options.device)), cache, split, out, clips=options.clips
    ):
        print(path)


def _add_localize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "localize",
        help="action tubes from the attention of a model that was trained on class labels",
        description="Smooths the attention over time and thresholds it: a box in every frame, as CSV and on pictures. "
        "Where the cache knows the true boxes, also the mean IoU with them.",
    )
    _add_evaluation_arguments(parser)
    parser.add_argument("--sigma", type=float, default=2.0, help="of the smoothing, in steps; default 2")
    parser.add_argument(
        "--power", type=float, default=1.0, help="to which attention is raised: below 1 evens it out; default 1"
    )
    parser.add_argument(
        "--spread", type=float, default=0.0, help="of a smoothing over the picture, as a share of its height; default 0"
    )
    parser.add_argument("--threshold", type=float, default=0.4, help="0 to 1, from median to largest; default 0.4")
    parser.set_defaults(run=_localize)


def _localize(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, localize

    cache, split, out = _evaluation_places(options, "test", "tubes")
    scores = localize(
        TrainedReader.load(options.model, _device(options.device)), cache, split, out, sigma=options.sigma,
        power=options.power, spread=options.spread, threshold=options.threshold,
    )  # fmt: skip
    print(", ".join(f"{name} {v:.4f}" if isinstance(v, float) else f"{v} {name}" for name, v in scores.items()))
    print(f"report: {out}")


def _add_fuse(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fuse",
        help="late fusion: scores of several models' mean probabilities",
        description="Averages the probabilities of models of the same classes, say of RGB, depth and flow, each on the "
        "cache of its run.",
    )
    parser.add_argument("models", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--split", help="part of the caches; default the test part of the first run")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the models; default equal")
    parser.add_argument("--device", help="cpu, cuda, ...; default a GPU if there is one")
    parser.set_defaults(run=_fuse)


def _fuse(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, fuse
    from .training import load_recipe

    recipes = [load_recipe(str(run / "recipe.yaml")) for run in options.models]
    readers = [TrainedReader.load(run, _device(options.device)) for run in options.models]
    split = options.split or recipes[0].data.test
    scores = fuse(readers, [recipe.data.cache for recipe in recipes], split, weights=options.weights)
    print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def _evaluation_places(options: argparse.Namespace, part: str, name: str) -> tuple[str, str, Path]:
    """Cache, part of it and report folder, from the run's recipe where the options do not say."""
    from .training import load_recipe

    run = options.model if options.model.is_dir() else options.model.parent
    recipe = run / "recipe.yaml"
    data = load_recipe(str(recipe)).data if recipe.is_file() else None
    if data is None and (options.cache is None or options.split is None):
        raise ValueError(f"--cache, --split: needed, as there is no recipe beside {options.model}")
    cache = str(options.cache) if options.cache is not None else data.cache  # type: ignore[union-attr]
    split = options.split if options.split is not None else getattr(data, part)
    return cache, split, options.out or run / name


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "predict",
        help="read the words of a video, or tell its gesture or action",
        description="Reads a video file and prints its words with their times in seconds and probabilities; a model of "
        "gestures or actions gives the whole video one class. The video is cut out, and its optical flow computed, as "
        "prepare did for the training clips. With --stream, frame by frame, carrying the model's state, as from a "
        "camera.",
    )
    parser.add_argument("model", type=Path, help="folder of a run, or a model file")
    parser.add_argument("video", type=Path)
    parser.add_argument("--stream", action="store_true", help="frame by frame")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of a word; default 0.5")
    parser.add_argument("--one-crop", action="store_true", help="one crop only, six times as fast")
    parser.add_argument(
        "--box", nargs=4, type=float, metavar=("X", "Y", "WIDTH", "HEIGHT"), help="a fixed box of the picture"
    )
    parser.add_argument("--fps", type=float, help="frame rate to resample to; default that of the training clips")
    parser.add_argument("--device", help="cpu, cuda, ...; default a GPU if there is one")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    from .analysis import TrainedReader, read_stream, read_words
    from .data import BoxCrop, read_video

    if not options.video.is_file():
        raise ValueError(f"no file {options.video}")
    reader = TrainedReader.load(options.model, _device(options.device))
    if options.fps is not None and options.fps <= 0:
        raise ValueError(f"--fps: expected more than 0, got {options.fps}")
    fps = reader.fps if options.fps is None else options.fps
    crop = None if options.box is None else BoxCrop(*options.box)
    if options.stream:
        pictures, _ = read_video(options.video, fps, rgb=reader.rgb)
        for step in read_stream(reader, pictures, crop):
            print(f"{step.frame / fps:7.2f}  {step.probability:.3f}  {step.text}", flush=True)
        return
    frames = reader.read_video(options.video, crop, fps)
    print("  start      end  probability  word")
    for word in read_words(reader, frames, threshold=options.threshold, one_crop=options.one_crop):
        start, end = word.start / fps, word.end / fps
        print(f"{start:7.2f}  {end:7.2f}  {word.probability:11.3f}  {word.text}")


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _data_errors() -> tuple[type[Exception], ...]:
    """The errors that data raise; none where the extra ``train`` is not installed."""
    try:
        from .data import NoFaceError, PrepareError, VideoError
    except ImportError:
        return ()
    return NoFaceError, PrepareError, VideoError
