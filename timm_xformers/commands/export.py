"""``timm-xformers export``: a model as a file for ONNX Runtime, torch.export or OpenVINO."""

import argparse
from pathlib import Path

from timm_xformers.commands.options import MODEL_HELP, positive
from timm_xformers.recipe import weights_of

HELP = "write a model as ONNX, ExportedProgram, OpenVINO or folder; compare and time it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="new file: .onnx, .pt2 (ExportedProgram) or .xml (OpenVINO, if installed); without a "
        "dot: new folder for timm and transformers",
    )
    parser.add_argument(
        "--img-size",
        type=positive,
        metavar="PIXELS",
        help="of the input; default: the model's",
    )
    parser.add_argument(
        "--in-chans",
        type=positive,
        metavar="N",
        help="channels of the input: 3 lets a model of grey images take colour pictures",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="fix the batch; default: any size"
    )
    parser.add_argument(
        "--int8", action="store_true", help="store weights as int8, a quarter of the size"
    )
    parser.add_argument("--opset", type=positive, metavar="N", help="of ONNX")


def run(args: argparse.Namespace) -> None:
    """Export, and say how the file compares with the model."""
    from timm_xformers.exporting.export import FORMATS, export, sheet_of

    path = Path(args.output)
    done = export(
        weights_of(args.model),
        path,
        img_size=args.img_size,
        in_chans=args.in_chans,
        batch_size=args.batch_size,
        int8=args.int8,
        opset=args.opset,
    )
    batches = ", ".join(map(str, done.batch_sizes))
    free = "" if args.batch_size or not path.suffix else ", any batch size"
    print(f"{path}: {FORMATS[path.suffix]}, {done.megabytes:.2f} MB{free}")
    print(
        f"logits: {done.difference:.1e} of their norm from PyTorch's at batch {batches}, "
        f"{done.same_answer_percent:.0f} % of images with the same answer"
    )
    print(f"images/s on this CPU: {done.images_per_s:,.1f}, PyTorch {done.model_images_per_s:,.1f}")
    if path.suffix:
        print(f"what its inputs must be and its labels are in {sheet_of(path)}")
