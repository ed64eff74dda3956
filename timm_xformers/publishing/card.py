"""A model card: a template filled from records, below the metadata that the Hub reads."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_xformers.data.known_sets import describe
from timm_xformers.files.tables import markdown_table
from timm_xformers.publishing.finished_run import public_settings
from timm_xformers.recipe import Recipe, load_recipe, shipped_recipes
from timm_xformers.records.headline import AGREEMENT, MAP
from timm_xformers.records.results_json import Record

__all__ = ["LICENSE", "Card", "changed_settings", "reproduction", "write_card"]

LICENSE = "apache-2.0"
TAGS = ("timm", "timm-xformers", "image-classification", "efficient-attention")
TEMPLATE = Path(__file__).with_name("card.md.jinja")


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
        repeat: Where the recipe of ``command`` comes from, behind "To repeat it".
        command: Trains it again.
        license: Of the weights, as the Hub calls it.
        base_model: Name on the Hub of the model it was fine-tuned from; None: of none there.
        started_from: The same in words; empty: trained from random weights.
        source: A sentence with a published figure to compare with; empty if there is none.
        curves: Image of the run's curves beside the card; empty if there is none.
        calibration: How far the probabilities are to be believed.
        namesakes: In Markdown, other names that load the same file; empty if there is none.
    """

    title: str
    load: str
    attention: str
    trained: Record
    tested: Record
    recipe: Recipe
    repeat: str
    command: str
    license: str = LICENSE
    base_model: str | None = None
    started_from: str = ""
    source: str = ""
    curves: str = ""
    calibration: str = "The probabilities were not calibrated."
    namesakes: str = ""


def write_card(card: Card) -> str:
    """The whole file."""
    data = describe(card.trained.data)
    headline, tested = card.tested.headline, card.tested
    several = headline is MAP
    # Name -> what the Hub calls the metric, and its value.
    figures = {headline.words: (headline.metric, tested.percent("test"))}
    for word, value in headline.beside_of(tested, "test").items():
        words, metric = (word, "f1") if several else ("Top-5 accuracy", headline.metric)
        figures[words] = metric, value
    head = ModelCardData(
        license=card.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[*TAGS, "multi-label"] if several else list(TAGS),
        datasets=None if data.hub_id is None else [data.hub_id],
        base_model=card.base_model,
        metrics=list(dict.fromkeys(metric for metric, _ in figures.values())),
        model_name=card.title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=data.hub_id or card.trained.data,
                dataset_name=data.title,
                dataset_split="test",
                metric_type=metric,
                metric_name=f"{name}, %",
                metric_value=value,
            )
            for name, (metric, value) in figures.items()
        ],
    )
    phases = [("training", card.trained)]
    if card.tested.kind == "evaluate":
        phases.append(("evaluation", card.tested))
    fields = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    filled = ModelCard.from_template(
        head,
        template_path=str(TEMPLATE),
        **fields,
        data=data,
        several=several,
        unlabelled=headline is AGREEMENT,
        results=_results(card),
        replaced=bool(card.recipe.replace),
        settings=changed_settings(card.recipe),
        hardware=_hardware,
        phases=phases,
    )
    return f"{str(filled).rstrip()}\n"


def reproduction(record: Record, recipe: Recipe, otherwise: str) -> tuple[str, str]:
    """What repeats a run anywhere: a shipped recipe where one is the run's, else the run's own.

    ``otherwise`` says where recipe.yaml is, if no shipped recipe has the run's hash.

    Returns:
        `Card.repeat` and `Card.command`.
    """
    end = ("" if record.data == "digits" else " --data-dir DIR") + f" --seed {record.seed}"
    for name in shipped_recipes():
        own = load_recipe(name, {})
        if own.digest == recipe.digest:
            return "", f"timm-xformers train --recipe {name}{end}"
        changes = {"model": recipe.model, "model_kwargs": recipe.model_kwargs}
        if own.model_kwargs == recipe.model_kwargs and load_recipe(name, changes).digest == (
            recipe.digest
        ):
            return "", f"timm-xformers train --recipe {name} --model {recipe.model}{end}"
    return otherwise, f"timm-xformers train --recipe recipe.yaml{end}"


def changed_settings(recipe: Recipe) -> str:
    """Settings that differ from the defaults, as YAML that makes the same recipe."""
    defaults = public_settings(Recipe())
    changed = {
        name: value
        for name, value in public_settings(recipe).items()
        if value != defaults[name] or name in ("model", "data", "epochs", "batch_size", "lr")
    }
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def _results(card: Card) -> str:
    trained, tested = card.trained, card.tested
    parts = [("test, as trained", trained, "test")]
    if tested.weights_dtype is not None:
        parts.insert(0, (f"test, {tested.weights_dtype} weights, as they load", tested, "test"))
    if trained.val_images is not None:
        parts.append(("validation, as trained", trained, "val"))
    headline = tested.headline
    rows = []
    for words, record, split in parts:
        images, loss = (getattr(record, f"{split}_{name}") for name in ("images", "loss"))
        figures = [f"{images:,}", f"{headline.of(record, split):.2f}"]
        if ends := headline.interval_of(record, split):
            figures.append("{:.2f} to {:.2f}".format(*ends))
        shown = headline.beside_of(record, split)
        figures += [f"{shown[w]:.2f}" if w in shown else "-" for w in headline.beside.values()]
        rows.append([words, *figures, f"{loss:.4f}"])
    interval = ["95 % interval"] if headline.counted else []
    beside_heads = [f"{word} %" for word in headline.beside.values()]
    heads = ["images of", "number", f"{headline.word} %", *interval, *beside_heads, "loss"]
    return "\n".join(markdown_table(heads, rows, "lrrlrr"))


def _hardware(record: Record) -> str:
    hardware: dict[str, Any] = record.hardware
    if hardware.get("gpu"):
        return f"on {record.num_processes} x {hardware['gpu']}"
    count = hardware["threads"]
    threads = "one thread" if count == 1 else f"{count} threads"
    return f"on {threads} of {hardware['cpu']} ({hardware['cores']} cores)"
