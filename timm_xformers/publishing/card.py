"""A model card: Markdown below a YAML head, every figure of it from a record."""

import dataclasses
from typing import Any

import yaml

from timm_xformers.data.known_sets import describe
from timm_xformers.publishing.finished_run import public_settings
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import Record

__all__ = ["LICENSE", "Card", "write_card"]

LICENSE = "apache-2.0"
REPOSITORY_TAGS = ("timm", "timm-xformers", "image-classification", "efficient-attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is made of.

    Attributes:
        title: Heading.
        load: The model's name for ``timm.create_model``.
        attention: The mechanism's name; empty for models without one.
        trained: The run.
        tested: Figures of the very weights that the reader gets.
        recipe: Settings of the run.
        reproduce: Command that repeats it.
        source: A sentence with a published figure to compare with; empty if there is none.
        curves: Image of the run's curves beside the card; empty if there is none.
    """

    title: str
    load: str
    attention: str
    trained: Record
    tested: Record
    recipe: Recipe
    reproduce: str
    source: str = ""
    curves: str = ""


def write_card(card: Card) -> str:
    """The whole file."""
    trained, data = card.trained, describe(card.trained.data)
    mechanism = f", attention `{card.attention}`" if card.attention else ""
    cited = f" ({data.cite})" if data.cite else ""
    arguments = f" and arguments `{trained.model_kwargs}`" if trained.model_kwargs else ""
    parts = [
        _head(card),
        f"# {card.title}",
        f"An image classifier of {trained.num_classes} classes: architecture `{trained.model}`"
        f"{arguments}{mechanism}, {trained.params:,} parameters, inputs of {trained.img_size}x"
        f"{trained.img_size} pixels with {_channels(trained.in_chans)}. Made with "
        "timm-xformers; timm loads it wherever that package is installed.",
        "## Use",
        "```python\n"
        "import timm\n\n"
        f'model = timm.create_model("{card.load}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "```",
        "Meant for teaching, for comparing attention mechanisms and as a start for fine-tuning "
        "(other `num_classes`, `in_chans` and `img_size` are taken).",
        f"**Limits.** {data.limits} Nothing was done against bias in the data, and accuracy on "
        "other images was not measured.",
        "## Data",
        f"{data.title}{cited}: {data.images}. {_choice(trained)}",
        "## Results",
        _results(card),
        *([card.source] if card.source else []),
        *([f"![loss and accuracy over the epochs]({card.curves})"] if card.curves else []),
        "## Training",
        _effort(trained),
        "Settings that differ from the defaults:",
        f"```yaml\n{_settings(card.recipe)}```",
        "To repeat it:",
        f"```bash\n{card.reproduce}\n```",
        "## Speed",
        _speed(card),
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: Card) -> str:
    tested, data = card.tested, describe(card.trained.data)
    metrics = {
        "Top-1 accuracy, %": tested.test_top1_percent,
        "Top-5 accuracy, %": tested.test_top5_percent,
    }
    head: dict[str, Any] = {
        "license": LICENSE,
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": list(REPOSITORY_TAGS),
    }
    if data.hub_id is not None:
        head["datasets"] = [data.hub_id]
    head["metrics"] = ["accuracy"]
    head["model-index"] = [
        {
            "name": card.title,
            "results": [
                {
                    "task": {"type": "image-classification", "name": "Image Classification"},
                    "dataset": {
                        "type": data.hub_id or card.trained.data,
                        "name": data.title,
                        "split": "test",
                    },
                    "metrics": [
                        {"type": "accuracy", "name": name, "value": value}
                        for name, value in metrics.items()
                    ],
                }
            ],
        }
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _results(card: Card) -> str:
    trained, tested = card.trained, card.tested
    rows = []
    if tested.weights_dtype is not None:
        rows.append((f"test, {tested.weights_dtype} weights, as they load", tested, "test"))
    rows.append(("test, as trained", trained, "test"))
    if trained.val_images is not None:
        rows.append(("validation, as trained", trained, "val"))
    lines = [
        "| images of | number | top-1 % | 95 % interval | top-5 % | loss |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for words, record, split in rows:
        figures = {
            name: getattr(record, f"{split}_{name}")
            for name in ("images", "top1_percent", "top1_interval_percent", "top5_percent", "loss")
        }
        low, high = figures["top1_interval_percent"]
        lines.append(
            f"| {words} | {figures['images']:,} | {figures['top1_percent']:.2f} | "
            f"{low:.2f} to {high:.2f} | {figures['top5_percent']:.2f} | {figures['loss']:.4f} |"
        )
    note = "The test set was read once by the run, at its end"
    if tested.weights_dtype is not None:
        note += f", and once more to measure the same weights rounded to {tested.weights_dtype}"
    return "\n".join(lines) + f"\n\n{note}. Intervals are Wilson's, for one run."


def _choice(record: Record) -> str:
    if record.val_images is None:
        return "No images were held out; the last epoch is kept."
    return (
        f"{record.val_images:,} training images were held out and chose the epoch: "
        f"{record.best_epoch} of {record.epochs}."
    )


def _effort(record: Record) -> str:
    words = [
        f"{record.epochs} epochs, seed {record.seed}, recipe hash `{record.recipe_hash}`",
        f"{record.seconds:,.0f} s of training {_hardware(record)}",
        ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    ]
    if record.commit is not None:
        words.append(f"commit `{record.commit[:12]}`")
    return ". ".join(words) + "."


def _hardware(record: Record) -> str:
    hardware = record.hardware
    if hardware.get("gpu"):
        return f"on {record.num_processes} x {hardware['gpu']}"
    count = hardware["threads"]
    threads = "one thread" if count == 1 else f"{count} threads"
    return f"on {threads} of {hardware['cpu']} ({hardware['cores']} cores)"


def _speed(card: Card) -> str:
    phases = [("training", card.trained)]
    if card.tested.kind == "evaluate":
        phases.append(("evaluation", card.tested))
    lines = [
        f"{record.images_per_s:,.1f} images/s in {phase} (batch {record.batch_size}), "
        f"{_hardware(record)}."
        for phase, record in phases
    ]
    return "\n".join([*lines, "As it ran, with whatever else the machine was doing."])


def _channels(count: int) -> str:
    return "one channel" if count == 1 else f"{count} channels"


def _settings(recipe: Recipe) -> str:
    defaults = public_settings(Recipe())
    changed = {
        name: value
        for name, value in public_settings(recipe).items()
        if value != defaults[name] or name in ("model", "data", "epochs", "batch_size", "lr")
    }
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
