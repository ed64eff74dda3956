"""ONNX, ExportedProgram and OpenVINO files of any timm model, and folders, each tried first.

The batch is free unless a size is asked for. A file is written beside its name, loaded back, and
compared with the model on batches of several sizes; only then does it get the name.
"""

import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UsageError, UserError, require_extra
from timm_xformers.exporting.int8 import quantize_weights
from timm_xformers.files.atomic import scratch_folder, write_text
from timm_xformers.training.build import build_model, check_input, is_multi_label
from timm_xformers.training.checkpoint import ModelInfo, save_best

__all__ = ["FORMATS", "Exported", "export", "sheet_of"]

Run = Callable[[Tensor], Tensor]
# Suffix -> name.
FORMATS = {
    ".onnx": "ONNX",
    ".pt2": "ExportedProgram",
    ".xml": "OpenVINO",
    "": "folder for timm and transformers",
}
LARGEST_BATCH = 4096
# Of logits against the model's: the norm of the difference over that of the logits.
CLOSE = 1e-3
CLOSE_INT8 = 0.1
TIMED_BATCH = 8
TIMED_SECONDS = 1.0
LARGEST_ONNX = 2 * 2**30  # what one file of protocol buffers holds


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        path: The file.
        megabytes: Its size, with the weights beside it if the format keeps them there.
        batch_sizes: Sizes that were compared.
        difference: Norm of the difference of logits over the norm of the model's, the largest.
        same_answer_percent: Images whose best class is the model's, or whose classes are, if they
            may have several.
        images_per_s: Of the file, at `TIMED_BATCH` images or the fixed size.
        model_images_per_s: Of the model in PyTorch, likewise.
    """

    path: Path
    megabytes: float
    batch_sizes: list[int]
    difference: float
    same_answer_percent: float
    images_per_s: float
    model_images_per_s: float


def export(
    name: str,
    path: Path,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
    batch_size: int | None = None,
    int8: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a model with its weights to a file, and beside it what its inputs must be.

    Args:
        name: A name that timm has weights for, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        path: New file; its suffix is one of `FORMATS`. FILE.json gets size, normalisation, labels.
            Without a suffix it is a folder that ``local-dir:`` and transformers open.
        img_size: Side of the input; the weights' own if None.
        in_chans: Channels; None: the weights' own. 3 makes a model of grey images take colours.
        batch_size: Fix the batch at so many images; None leaves it free.
        int8: Store weights as int8, see `int8`.
        opset: Of ONNX; None takes the exporter's.

    Raises:
        UserError: The model cannot be exported, or the file gives other logits than the model.
    """
    _check(path, opset, int8)
    channels: dict[str, Any] = {} if in_chans is None else {"in_chans": in_chans}
    model, model_args = build_model(name, img_size=img_size, pretrained=True, **channels)
    expects = Preprocessing.of_model(model, img_size, in_chans)
    sheet = _description(model, expects)
    several = is_multi_label(model)
    check_input(model, expects.shape)
    model.eval().requires_grad_(False)
    sizes = [1, 2, 5] if batch_size is None else [batch_size]
    rng = torch.Generator().manual_seed(0)
    images = [torch.randn(size, *expects.shape, generator=rng) for size in sizes]  # (B, C, H, W)
    with torch.no_grad():
        logits = [model(batch) for batch in images]  # (B, num_classes)
        timed = images[0] if batch_size else images[0].repeat(TIMED_BATCH, 1, 1, 1)
        model_speed = _images_per_s(model, timed)
        if int8:
            quantize_weights(model)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(fresh: Path) -> Run:
        if not path.suffix:
            names = tuple(sheet["label_names"])
            save_best(fresh, model, ModelInfo(model_args, expects, names, several))
            return (
                build_model(f"local-dir:{fresh}", pretrained=True)[0].eval().requires_grad_(False)
            )
        example = images[-1 if batch_size else 1]
        return _WRITERS[path.suffix](model, example, fresh, batch_size is None, opset)

    with scratch_folder(path) as scratch:
        fresh = scratch / path.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of exporters about themselves
                run = write(fresh)
                found = [run(batch) for batch in images]
                speed = _images_per_s(run, timed)
        except UserError:
            raise
        except Exception as error:  # each exporter has exceptions of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{name} cannot be exported as {FORMATS[path.suffix]} ({reason}); try "
                f"{'another format' if batch_size else 'a fixed --batch-size, or another format'}."
            ) from error
        difference = max(
            float((a - b).norm() / b.norm()) for a, b in zip(found, logits, strict=True)
        )
        limit = CLOSE_INT8 if int8 else CLOSE
        if not difference <= limit:
            raise UserError(
                f"The file's logits differ from the model's by {difference:.2g} of their norm, "
                f"more than {limit:g}, so it was not kept; "
                f"{'leave --int8 away' if int8 else 'try another format, or a fixed --batch-size'}."
            )
        pairs = list(zip(found, logits, strict=True))
        same = [a.argmax(1) == b.argmax(1) for a, b in pairs]
        if several:
            same = [((a >= 0) == (b >= 0)).all(1) for a, b in pairs]
        files = list(scratch.iterdir())
        size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
        del run  # it may hold the file open
        for file in files:
            file.replace(path.parent / file.name)
    if path.suffix:
        write_text(sheet_of(path), json.dumps(sheet, indent=2) + "\n")
    return Exported(
        path=path,
        megabytes=size / 1e6,
        batch_sizes=sizes,
        difference=difference,
        same_answer_percent=100 * float(torch.cat(same).float().mean()),
        images_per_s=speed,
        model_images_per_s=model_speed,
    )


def sheet_of(path: Path) -> Path:
    """Where the description of a file's inputs and outputs lies."""
    return path.with_name(f"{path.name}.json")


def _check(path: Path, opset: int | None, int8: bool) -> None:
    if path.suffix not in FORMATS:
        raise UsageError(
            f"--output {path} has no format to export to; end it in one of "
            f"{', '.join(filter(None, FORMATS))}, or give a folder's name without a dot."
        )
    if int8 and not path.suffix:
        raise UsageError("--int8 is for files, and a folder keeps weights as they are; drop it.")
    for taken in (path, sheet_of(path)):
        if taken.exists():
            raise UsageError(f"{taken} exists; choose another --output.")
    if opset is not None and path.suffix != ".onnx":
        raise UsageError("--opset is ONNX's; drop it, or end --output in .onnx.")
    if path.suffix == ".onnx":
        require_extra("export", "onnx", "onnxruntime", "onnxscript")
    if path.suffix == ".xml" and importlib.util.find_spec("openvino") is None:
        raise UserError(
            "An .xml file needs OpenVINO, not installed here; run: pip install openvino"
        )


def _program(model: nn.Module, example: Tensor, free: bool) -> Any:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    shapes = ({0: batch},) if free else None
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # else files carry the folders of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(
    model: nn.Module, example: Tensor, path: Path, free: bool, opset: int | None
) -> Run:
    import onnxruntime

    bytes_ = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if bytes_ > LARGEST_ONNX:
        raise UserError(f"{bytes_ / 2**30:.1f} GiB do not fit one ONNX file; export to .pt2.")
    program: Any = torch.onnx.export(
        _program(model, example, free),
        (),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        # It would multiply int8 weights out again.
        optimize=not any("parametrizations" in name for name, _ in model.named_modules()),
        verbose=False,
    )
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_program(
    model: nn.Module, example: Tensor, path: Path, free: bool, opset: int | None
) -> Run:
    torch.export.save(_program(model, example, free), str(path))
    loaded: Run = torch.export.load(str(path)).module()
    return loaded


def _write_openvino(
    model: nn.Module, example: Tensor, path: Path, free: bool, opset: int | None
) -> Run:
    import openvino

    network = openvino.convert_model(_program(model, example, free), verbose=False)
    openvino.save_model(network, str(path), compress_to_fp16=False)
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_program, ".xml": _write_openvino}


@torch.no_grad()
def _images_per_s(run: Run, images: Tensor) -> float:
    run(images)
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < TIMED_SECONDS:
        run(images)
        calls += 1
    return calls * len(images) / (time.perf_counter() - start)


def _description(model: Any, expects: Preprocessing) -> dict[str, Any]:
    """What an input must be, and what an output means."""
    return {
        "input": ["batch", *expects.shape],
        "pixels": "of [0, 1], less mean, over std",
        "mean": list(expects.mean),
        "std": list(expects.std),
        "crop_pct": expects.crop_pct,
        "interpolation": expects.interpolation,
        "num_classes": model.num_classes,
        "label_names": list(model.pretrained_cfg.get("label_names") or ()),
        "probabilities": "sigmoid, of each class" if is_multi_label(model) else "softmax",
    }
